"""Fixtures of all tests in the simulator."""

import numpy as np
import pytest
from simulator import cuda


@pytest.fixture
def no_waiting(monkeypatch):
    """Make everything that waits for the device raise; a list, to which the name of what was called is added."""
    called = []

    def refuse(name):
        def refused(*args, **kwargs):
            called.append(name)
            raise AssertionError(f"{name} waits for the device")

        return refused

    array, stream, event = type(cuda.to_device(np.zeros(1))), type(cuda.stream()), type(cuda.event())
    for kind, name in ((array, "copy_to_host"), (stream, "synchronize"), (event, "synchronize")):
        monkeypatch.setattr(kind, name, refuse(f"{kind.__name__}.{name}"))
    return called
