"""What several test files use."""

import re
import sys
from importlib.util import find_spec

import numba
import numpy as np
import pytest

from fastrms import RMSProp

JIT = not numba.config.DISABLE_JIT

WITHOUT_TORCH = "torch is not installed. To run these tests: python -m pip install torch && python -m pytest -m torch"


def need_torch():
    """Return torch. Where it is not installed, skip the test or the test file that called.

    A test that needs torch has the mark `torch`, and conftest.py calls this. A file that needs torch to be imported
    calls this itself, and has ``pytestmark = pytest.mark.torch`` too. All skips come from one line with one reason, so
    that pytest's summary has one line for all of them.
    """
    return pytest.importorskip("torch", reason=WITHOUT_TORCH)


WITHOUT_FRAMEWORKS = (
    "a framework of the extra `examples` is not installed. To run these tests: "
    'python -m pip install -e ".[examples]" && python -m pytest -m frameworks'
)


def need_frameworks(modules):
    """Skip the test that called where a module is not installed; nothing is imported.

    A test that needs modules has the mark ``frameworks(*modules)``, and conftest.py calls this function.
    """
    if any(find_spec(module) is None for module in modules):
        pytest.skip(WITHOUT_FRAMEWORKS)


def undefine_gradients(patch):
    """Fill `opt.grads` with NaN where its contents are not defined, and raise an error where a step makes NaN of them.

    They are not defined after ``step(gradients)`` and after ``reopen``. `patch` is a `pytest.MonkeyPatch`.
    """
    step, reopen = RMSProp.step, RMSProp.reopen

    def fill(opt):
        for segment in opt.buffers["grads"].segments:
            segment[...] = np.nan

    def step_and_fill(opt, gradients=None):
        params = step(opt, gradients)
        assert all(np.isfinite(segment).all() for segment in opt.buffers["params"].segments), "undefined gradients"
        if gradients is not None:
            fill(opt)
        return params

    def reopen_and_fill(*args, **options):
        opt = reopen(*args, **options)
        fill(opt)
        return opt

    patch.setattr(RMSProp, "step", step_and_fill)
    patch.setattr(RMSProp, "reopen", reopen_and_fill)


# The same for a program in a process of its own.
UNDEFINE_GRADIENTS = "import helpers, pytest; helpers.undefine_gradients(pytest.MonkeyPatch())"


def case_id(value):
    """The string of a parameter of a test, without the addresses in it: they differ between the processes of xdist."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def steps(many):
    """A number of steps that the interpreter can do where the JIT is off."""
    return many if JIT else max(2, many // 200)


def wide(rng, size, dtype, low=-18, high=18):
    """Numbers of both signs with magnitudes from 10**low to 10**high."""
    return (rng.choice([-1.0, 1.0], size) * 10.0 ** rng.uniform(low, high, size)).astype(dtype)


def bits(array):
    """The bits of an array, with one bit pattern for NaN: which of its many an operation returns is not specified."""
    array = np.array(array)
    if array.dtype.kind == "f":
        array[np.isnan(array)] = np.nan
    if array.dtype.char == "g" and np.finfo(array.dtype).nmant == 63:  # 10 bytes of 16, without the padding
        return array.reshape(-1, 1).view(np.uint8)[:, :10].tobytes()
    return array.tobytes()


def assert_same_bits(ours, theirs, what=""):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    if bits(ours) != bits(theirs):
        bad = np.flatnonzero(~((ours == theirs) | (np.isnan(ours) & np.isnan(theirs))).ravel())
        raise AssertionError(f"{what}: {bad.size} of {ours.size} elements differ, first at {bad[:3]}")


class Exchanged:
    """An array that speaks DLPack and nothing else; `device` is where it says it lies."""

    def __init__(self, array, device=(1, 0)):
        self.array, self.device = array, device

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device


def count_calls(function, events=("call", "c_call")):
    """How many functions a call enters, of Python and of C; without "c_call", of Python only."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in events

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def items(tree):
    """What is in a nesting of lists, tuples and dicts, in order."""
    if isinstance(tree, dict):
        return [item for part in tree.values() for item in items(part)]
    if isinstance(tree, list | tuple):
        return [item for part in tree for item in items(part)]
    return [tree]


def leaves(tree):
    """The arrays of a nesting of lists, tuples and dicts, in order."""
    return [np.asarray(item) for item in items(tree)]


def same_structure(given, ours):
    """Whether `ours` has arrays where `given` has items, in the same lists, tuples and dicts."""
    if isinstance(given, dict):
        return (
            isinstance(ours, dict)
            and list(given) == list(ours)
            and all(map(same_structure, given.values(), ours.values()))
        )
    if isinstance(given, list | tuple):
        return type(given) is type(ours) and len(given) == len(ours) and all(map(same_structure, given, ours))
    return isinstance(ours, np.ndarray)


def everything(opt):
    """All bytes that a step may change, and the count of steps."""
    return {name: b.block.tobytes() for name, b in opt.buffers.items() if name != "grads"} | {"steps": opt.steps}


def whole(opt):
    """All that a checkpoint has: parameters, state and counts."""
    state = opt.state_dict()
    arrays = {name: array.tobytes() for name, array in state["arrays"].items()}
    return arrays | {"steps": state["steps"], "skipped_steps": state["skipped_steps"]}


def assert_same_state(ours, theirs, what=""):
    """Compare all that a checkpoint has, whatever backends two optimizers have."""
    mine, other = ours.state_dict(), theirs.state_dict()
    arrays = mine.pop("arrays"), other.pop("arrays")
    assert mine == other, what
    assert arrays[0].keys() == arrays[1].keys()
    for name, array in arrays[1].items():
        assert_same_bits(arrays[0][name], array, f"{name} {what}")


def assert_same_optimizers(ours, theirs):
    """Compare counts, parameters, state and options of two optimizers, to the bit."""
    assert (ours.steps, ours.skipped_steps) == (theirs.steps, theirs.skipped_steps)
    assert ours.backend.state.counts.absent.tolist() == theirs.backend.state.counts.absent.tolist()
    assert ours.buffers.keys() == theirs.buffers.keys()
    for name in ours.buffers.keys() - {"grads"}:
        for mine, other in zip(ours.buffers[name].segments, theirs.buffers[name].segments, strict=True):
            assert_same_bits(mine, other, name)
    assert [dict(group) | {"params": None} for group in ours.param_groups] == [
        dict(group) | {"params": None} for group in theirs.param_groups
    ]


def contents(path):
    """What is in a folder, but for when it was changed."""
    return {item.name: item.read_bytes() for item in path.iterdir()} if path.is_dir() else None


# A block of Python in a page.
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


# For programs, within a string that is indented by four columns.
PEAK = """def peak():
        # In bytes, of what is resident at once, since the last call.
        with open("/proc/self/status") as stream:
            status = dict(line.split(":") for line in stream)
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
        return 1024 * int(status["VmHWM"].split()[0])"""
