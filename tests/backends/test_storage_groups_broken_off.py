"""Errors, interrupts and kills while a group is added to a folder, and folders with groups that are damaged."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from helpers import assert_same_state, contents, whole

import fastrms.backends.mapped
from fastrms import RMSProp, StorageError
from fastrms._state import OptimizerState
from fastrms.backends.host import HostBackend
from fastrms.backends.storage import Storage

BODY = {"W": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3), "b": np.linspace(-1, 1, 5)}
HEAD = [np.linspace(-2, 1, 7, dtype=np.float32), np.linspace(0, 1, 3)]
GROUP = {"params": HEAD, "momentum": 0.5}


def stepped(opt):
    """Take a step with ones, whatever groups there are, and return the optimizer."""
    layout = opt.buffers["grads"].layout
    opt.step(layout.structure(np.ones(leaf.shape) for leaf in layout.leaves))
    return opt


def failing(function, number, error):
    """Return a function that raises an error in its call with this number, counted from 1."""

    def call(*arguments, **options):
        call.count += 1
        if call.count == number:
            raise error
        return function(*arguments, **options)

    call.count = 0
    return call


FULL = OSError(errno.ENOSPC, "No space left on device")
ERRORS = {"full": FULL, "no memory": MemoryError("none"), "Ctrl-C": KeyboardInterrupt("stop")}
# Where an error may arise, and in how many calls. The present group has no momentum: a file is made for that too.
FAILURES = {
    "room": (os, "posix_fallocate", 6),
    "mapping": (fastrms.backends.mapped.mmap, "mmap", 6),
    "taking in": (OptimizerState, "take_in", 1),
    "writing out": (Storage, "_write_out", 5),
    "metadata": (os, "replace", 1),
}
needs_fallocate = pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="there is no posix_fallocate")


@needs_fallocate
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    ("where", "number"), [(where, k + 1) for where, (*_, count) in FAILURES.items() for k in range(count)]
)
def test_an_error_leaves_optimizer_and_folder_as_they_were(where, number, error, path, monkeypatch):
    error, opt = ERRORS[error], stepped(RMSProp(BODY, storage=path))
    inside = stepped(RMSProp(BODY, kernel="numpy"))
    opt.flush()
    before, files = whole(opt), contents(path)
    place, name, _ = FAILURES[where]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, failing(getattr(place, name), number, error))
        with pytest.raises(type(error), match=str(error.args[-1])):
            opt.add_param_group(GROUP)
    if len(opt.param_groups) == 2:
        assert isinstance(error, KeyboardInterrupt)
        inside.add_param_group(GROUP)
    else:
        assert (whole(opt), contents(path)) == (before, files)
        assert opt.momentum_buffer is None
    assert_same_state(stepped(opt), stepped(inside))
    for each in (opt, inside):  # and then it works
        each.add_param_group(GROUP)
        stepped(each)
    opt.close()
    with RMSProp.reopen(path) as again:
        assert_same_state(again, inside)


@needs_fallocate
def test_how_often_each_place_is_reached(path, monkeypatch):
    """Otherwise the test above could miss a call, or pass without an error."""
    opt = RMSProp(BODY, storage=path)
    calls = {where: failing(getattr(place, name), 0, FULL) for where, (place, name, _) in FAILURES.items()}
    with monkeypatch.context() as patch:
        for where, (place, name, _) in FAILURES.items():
            patch.setattr(place, name, calls[where])
        opt.add_param_group(GROUP)
    assert {where: call.count for where, call in calls.items()} == {w: count for w, (*_, count) in FAILURES.items()}


def test_a_state_buffer_that_cannot_be_made_for_all_groups_is_made_for_none(path, monkeypatch):
    opt = RMSProp(BODY, storage=path)
    opt.add_param_group({"params": HEAD})
    names = set(contents(path))
    for number in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(fastrms.backends.mapped, "_reserve", failing(fastrms.backends.mapped._reserve, number, FULL))
            with pytest.raises(OSError, match="No space"):
                opt.momentum = 0.5
        assert set(contents(path)) == names
    assert (opt.momentum, opt.momentum_buffer) == (0.0, None)
    opt.momentum = 0.5
    stepped(opt).close()
    RMSProp.reopen(path).close()


@pytest.mark.parametrize("what", ["moved", "closed"])
def test_a_folder_that_is_gone_or_closed(what, path, tmp_path):
    opt, there = RMSProp(BODY, storage=path), tmp_path / "moved" if what == "moved" else path
    if what == "closed":
        opt.close()
    else:
        path.rename(there)
    before = contents(there)
    with pytest.raises(StorageError, match="closed" if what == "closed" else "none or another one in its place"):
        opt.add_param_group({"params": HEAD})
    assert (contents(there), len(opt.param_groups)) == (before, 1)
    there.rename(path)
    opt.close()


def test_an_interrupt_before_the_parameters_are_prepared_leaves_a_whole_group(path, monkeypatch):
    opt = stepped(RMSProp(BODY, storage=path))
    with monkeypatch.context() as patch:
        # The first call is that of the optimizer of the new group alone.
        patch.setattr(HostBackend, "_use_parameters", failing(HostBackend._use_parameters, 2, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            opt.add_param_group({"params": HEAD})
    stepped(opt).close()
    with RMSProp.reopen(path) as again:
        assert (len(again.param_groups), again.steps) == (2, 2)


class Interrupter:
    """A function for `sys.settrace` that raises KeyboardInterrupt at one line of the files that take part."""

    FILES = ("storage.py", "stored_counts.py", "making.py", "host.py", "joined.py", "mapped.py")

    def __init__(self, number):
        self.left = number

    def __call__(self, frame, event, argument):
        if event == "call":
            return self if frame.f_code.co_filename.endswith(self.FILES) else None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def test_ctrl_c_at_every_line_leaves_all_of_a_group_or_nothing(path):
    number, ended, seen = 0, False, set()
    while not ended:
        number += 1
        folder = path.with_name(f"run-{number}")
        opt, inside = stepped(RMSProp(BODY, storage=folder)), stepped(RMSProp(BODY, kernel="numpy"))
        sys.settrace(Interrupter(number))
        try:
            opt.add_param_group(GROUP)
            ended = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        added = len(opt.param_groups) == 2
        seen.add(added)
        if added:
            inside.add_param_group(GROUP)
        assert_same_state(stepped(opt), stepped(inside), f"line {number}")
        opt.close()
        with RMSProp.reopen(folder) as again:
            assert_same_state(again, inside, f"line {number}")
    assert seen == {True, False}
    assert number > 100


# Processes that are killed while a group is added.

ADDING = """
    import os, signal, sys
    import numpy as np
    import fastrms.backends.mapped as mapped
    from fastrms import RMSProp
    from fastrms.backends.storage import Storage
    path, place, name, number, clean = sys.argv[1:]
    opt = RMSProp([np.ones(9000)], storage=path)
    opt.step([np.ones(9000)])
    if clean == "flushed":
        opt.flush()
    place, left = {"os": os, "mapped": mapped, "Storage": Storage}[place], [int(number)]
    function = getattr(place, name)
    def call(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    setattr(place, name, call)
    opt.add_param_group({"params": [np.full(9000, 2.0)], "momentum": 0.5})
    os.kill(os.getpid(), signal.SIGKILL)
"""
KILLS = {
    "before the first file": ("mapped", "_reserve", 1),
    "among the files of the group": ("mapped", "_reserve", 4),
    "before the last file": ("mapped", "_reserve", 6),
    "while they are written out": ("Storage", "_write_out", 3),
    "before the metadata": ("os", "replace", 1),
    "after the metadata": ("os", "replace", 2),
}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no such signal")
@pytest.mark.parametrize("clean", ["flushed", "in use"])
@pytest.mark.parametrize("kill", KILLS)
def test_a_kill_leaves_the_folder_as_before_or_as_after(kill, clean, path):
    command = [sys.executable, "-c", textwrap.dedent(ADDING), path, *map(str, KILLS[kill]), clean]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    after = kill == "after the metadata"
    inside = RMSProp([np.ones(9000)], kernel="numpy")
    inside.step([np.ones(9000)])
    if after:
        inside.add_param_group({"params": [np.full(9000, 2.0)], "momentum": 0.5})
    if after or clean == "in use":
        with pytest.raises(StorageError, match="nothing was under way, 1 steps were finished"):
            RMSProp.reopen(path)
    with RMSProp.reopen(path, after_crash="use" if after or clean == "in use" else "raise") as opt:
        assert_same_state(opt, inside)
        for each in (opt, inside):  # files that the process has left are replaced
            each.add_param_group({"params": [np.full(5, 3.0)], "momentum": 0.5})
        assert_same_state(stepped(opt), stepped(inside))
    with RMSProp.reopen(path) as opt:
        assert_same_state(opt, inside)


# Damage.


def rewrite(path, **changes):
    head = json.loads((path / "head.json").read_text())
    head["storage"] = {name: value for name, value in (head["storage"] | changes).items() if value is not None}
    (path / "head.json").write_text(json.dumps(head))


DAMAGE = {
    "none added": (lambda path: rewrite(path, added=0), "expected 'added' to be a number of groups, got 0"),
    "all added": (lambda path: rewrite(path, added=2), "expected 'added' to be a number of groups, got 2"),
    "no number": (lambda path: rewrite(path, added="1"), "expected 'added' to be a number of groups, got '1'"),
    "no entry": (lambda path: rewrite(path, added=None), "expected 'added' to be a number of groups, got None"),
    "an old version": (lambda path: rewrite(path, version=1), "expected no 'added' in version 1"),
    "a newer version": (lambda path: rewrite(path, version=3), "expected version 1 or 2, got 3; it needs a newer fas"),
    "counts": (lambda path: os.truncate(path / "counts-1.bin", 5), r"counts-1\.bin: expected [\d,]+ bytes, got 5"),
    "parameters": (lambda path: os.truncate(path / "params-1.bin", 5), r"params-1\.bin: expected [\d,]+ bytes, got 5"),
    "no cache": (lambda path: (path / "cache-1.bin").unlink(), r"cache-1\.bin"),
    "too many steps": (
        lambda path: np.full(512, 9).tofile(path / "counts-1.bin"),
        r"counts\.bin: skipped\[2\]: expected 0 to 1, .*; got 9: the file is damaged",
    ),
}


@pytest.mark.skipif(os.name != "posix" or os.sysconf("SC_PAGESIZE") != 4096, reason="files have pages of 4 KiB here")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_and_left_alone(damage, path):
    opt = stepped(RMSProp(BODY, storage=path))
    opt.add_param_group({"params": HEAD})
    opt.close()
    spoil, message = DAMAGE[damage]
    spoil(path)
    before = contents(path)
    for _ in range(2):  # and it is not left locked
        with pytest.raises(OSError, match=message):
            RMSProp.reopen(path)
    assert contents(path) == before
