"""Modules that some tests need and that are not installed everywhere."""

import importlib
import os
from types import ModuleType

import pytest


def require(name: str) -> ModuleType:
    """Import a module for a test; without it the test is skipped, or fails where it may not be missing.

    A skipped test looks like a passed one in a summary. So a run that is set up to have a module names it in
    FASTRMS_REQUIRE (comma separated), and there its absence is a failure.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that is there but misses one of its own is broken, which is not "not installed".
        if error.name is None or name.partition(".")[0] != error.name.partition(".")[0]:
            raise
        needed = {item.strip() for item in os.environ.get("FASTRMS_REQUIRE", "").split(",")}
        if name in needed:
            pytest.fail(f"{name} is not installed, and FASTRMS_REQUIRE lists it", pytrace=False)
        pytest.skip(f"{name} is not installed")
