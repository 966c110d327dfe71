"""Buffers in files, and other processes: those that are killed, that have them too, that have little room or memory."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from helpers import JIT, PEAK, assert_same_bits, assert_same_optimizers, contents

from fastrms import RMSProp, StorageError


def run(program, *arguments, status=0):
    """Run a program, with these arguments in `sys.argv`, and return what it prints, with how it ended."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *map(str, arguments)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    assert status or not done.stderr, done.stderr
    return done.stdout.split()


TRAIN = """
    import os, signal, sys
    import numpy as np
    import fastrms.backends.pages
    from fastrms import RMSProp
    fastrms.backends.pages.PART_BYTES = 4096
    start = np.linspace(-1, 1, 9000)
    opt = RMSProp([start], storage=sys.argv[1], momentum=0.5)
    def train(steps):
        for _ in range(steps):
            opt.step([opt.params[0] - 0.5])
"""


def trained(steps):
    opt = RMSProp([np.linspace(-1, 1, 9000)], momentum=0.5)
    for _ in range(steps):
        opt.step([opt.params[0] - 0.5])
    return opt


CRASHES = {
    "between steps": ("train(3)\n    os.kill(os.getpid(), signal.SIGKILL)", "nothing was under way, 3 .* 0 when"),
    "after a flush": (
        "train(3); opt.flush(); train(2); os.kill(os.getpid(), signal.SIGKILL)",
        "nothing was under way, 5 steps were finished, 3 when it was flushed last",
    ),
    "at the start": ("os.kill(os.getpid(), signal.SIGKILL)", "nothing was under way, 0 steps were finished"),
    "without close": ("train(1); os._exit(-9)", "nothing was under way, 1 steps were finished"),
}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no such signal")
@pytest.mark.parametrize("crash", CRASHES)
def test_killed_between_steps(crash, path):
    end, message = CRASHES[crash]
    run(TRAIN + f"    {end}\n", path, status=247 if "exit" in end else -signal.SIGKILL)
    before = contents(path)
    with pytest.raises(StorageError, match=message):
        RMSProp.reopen(path)
    assert contents(path) == before
    with RMSProp.reopen(path, after_crash="use") as opt:
        # Only the process ended; what it wrote to memory was the system's.
        assert_same_optimizers(opt, trained(opt.steps))
        assert f"{opt.steps} steps" in message or opt.steps == 3
        opt.step([opt.params[0] - 0.5])
    with RMSProp.reopen(path) as opt:
        assert_same_optimizers(opt, trained(opt.steps))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no such signal")
@pytest.mark.parametrize("part", [0, 5, 11])
def test_killed_in_a_step(part, path):
    program = (
        TRAIN
        + f"""
    train(2); opt.flush(); train(2)
    release, left = fastrms.backends.pages.Pages.release, [4 * {part} + 1]
    def release_or_die(self, array):
        left[0] -= bool(opt.backend.storage.counts[0])  # where gradients are copied, that comes first
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        release(self, array)
    fastrms.backends.pages.Pages.release = release_or_die
    train(1)
    """
    )
    run(program, path, status=-signal.SIGKILL)
    with pytest.raises(StorageError, match="a step was under way, 4 steps were finished, 2 when it was flushed last"):
        RMSProp.reopen(path)
    with RMSProp.reopen(path, after_crash="use") as opt:
        assert opt.steps == 4
        before, after = trained(4), trained(5)
        new = opt.params[0] == after.params[0]
        done = 512 * (part + 1)  # elements of 8 bytes in the parts that were done
        assert_same_bits(opt.params[0][:done], after.params[0][:done])
        assert_same_bits(opt.params[0][done:], before.params[0][done:])
        assert 0 < new.sum() < 9000
    RMSProp.reopen(path).close()  # what was used is what counts


def test_killed_while_it_is_made(path):
    program = TRAIN.replace(
        "opt = ", "fastrms.backends.storage.Storage._write_metadata = lambda *a, **k: os._exit(3)\n    opt = "
    )
    run(program, path, status=3)
    with pytest.raises(StorageError, match="it was not finished: remove it"):
        RMSProp.reopen(path)
    with pytest.raises(StorageError, match="expected a new or empty folder"):
        RMSProp([np.ones(2)], storage=path)


@pytest.mark.parametrize("end", ["", "del opt", "sys.exit(0)", "raise SystemExit"])
def test_a_program_that_ends_by_itself_closes(end, path):
    run(TRAIN + f"    train(2)\n    {end}\n", path)
    with RMSProp.reopen(path) as opt:
        assert_same_optimizers(opt, trained(2))


def test_at_exit_all_are_closed_also_where_some_cannot_be(tmp_path):
    program = """
        import sys
        import numpy as np
        from fastrms import RMSProp
        opts = [RMSProp([np.ones(3)], storage=f"{sys.argv[1]}/{k}") for k in range(6)]
        def failing(opt):
            def fail():
                raise OSError(5, f"no disk for {opt.storage}")
            return fail
        for opt in opts:
            opt.step([np.ones(3)])
        for opt in opts[::3]:
            opt.backend.storage.flush = failing(opt)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), tmp_path], capture_output=True, text=True, check=True
    )
    for k in range(6):
        failed = k % 3 == 0
        assert (f"no disk for {tmp_path / str(k)}" in done.stderr) is failed
        with RMSProp.reopen(tmp_path / str(k), after_crash="use" if failed else "raise") as opt:
            assert opt.steps == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_after_a_fork_all_are_told_also_where_one_raises(tmp_path):
    program = """
        import os, sys
        import numpy as np
        from fastrms import RMSProp, StorageError
        opts = [RMSProp([np.ones(3)], storage=f"{sys.argv[1]}/{k}") for k in range(6)]
        def fail():
            raise OSError("this one")
        for opt in opts[::3]:
            opt.backend.storage.after_fork = fail
        child = os.fork()
        if not child:
            told = 0
            for opt in opts:
                try:
                    opt.step()
                except StorageError as error:
                    told += "child of fork" in str(error)
            os._exit(told)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["4"]


LOCKED = (
    "expected a folder that is not open, got one that another process, or another optimizer of this process, has open"
)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_two_at_once(path):
    opt = RMSProp([np.linspace(-1, 1, 9000)], storage=path)
    opt.step([opt.params[0]])
    values = opt.params[0].copy()
    for after_crash in ("raise", "use"):
        with pytest.raises(StorageError, match=LOCKED):
            RMSProp.reopen(path, after_crash=after_crash)
    program = """
        import sys
        from fastrms import RMSProp, StorageError
        try:
            RMSProp.reopen(sys.argv[1], after_crash="use")
        except StorageError as error:
            print("refused" if "another process" in str(error) else error)
    """
    assert run(program, path) == ["refused"]
    assert_same_bits(opt.params[0], values)
    opt.close()
    RMSProp.reopen(path).close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_of_fork_can_read_and_takes_no_step(path):
    program = """
        import os, sys
        import numpy as np
        from fastrms import RMSProp, StorageError
        opt = RMSProp([np.ones(3)], storage=sys.argv[1])
        opt.step([np.ones(3)])
        child = os.fork()
        if not child:
            for call in (opt.step, opt.flush):
                try:
                    call()
                except StorageError as error:
                    print("refused" if "child of fork" in str(error) else error)
            print(float(opt.params[0][0]) < 1)
            opt.close()
            sys.exit()  # which does not close it for the parent
        os.waitpid(child, 0)
        try:
            RMSProp.reopen(sys.argv[1])
        except StorageError as error:
            print("locked" if "that is not open" in str(error) else error)
        opt.step([np.ones(3)])
        print(opt.steps)
    """
    assert run(program, path) == ["refused", "refused", "True", "locked", "2"]
    assert RMSProp.reopen(path).steps == 2


def test_the_parent_can_close_while_a_child_lives(path):
    program = """
        import os, sys
        import numpy as np
        from fastrms import RMSProp
        opt = RMSProp([np.ones(3)], storage=sys.argv[1])
        read, write = os.pipe()
        if not os.fork():
            os.close(write)
            os.read(read, 1)
            os._exit(0)
        os.close(read)
        opt.close()
        print(RMSProp.reopen(sys.argv[1]).steps)
    """
    assert run(program, path) == ["0"]


FULL = """
    import resource, sys
    import numpy as np
    from fastrms import RMSProp
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    {before}
    try:
        {code}
    except OSError as error:
        print(error.errno, error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_no_room_is_an_error_when_it_is_made(tmp_path):
    program = FULL.format(before="", code="RMSProp([np.ones(20_000)], storage=sys.argv[1])")
    words = run(program, tmp_path / "new")
    assert words[0] == "27"
    assert " ".join(words).endswith(
        f"expected room for 160,000 bytes, got: File too large: '{tmp_path}/new/params.bin'"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_no_room_for_state_that_is_added_later(tmp_path):
    before = """
    opt = RMSProp([np.ones(12_000)], storage=sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 100_000))
    """
    program = FULL.format(before=before, code="opt.param_groups[0]['momentum'] = 0.5")
    program += "    opt.step([np.ones(12_000)])\n"
    assert "room" in run(program, tmp_path / "new")
    with RMSProp.reopen(tmp_path / "new") as opt:
        assert (opt.steps, opt.param_groups[0]["momentum"], opt.momentum_buffer) == (1, 0, None)
        inside = RMSProp([np.ones(12_000)])
        inside.step([np.ones(12_000)])
        assert_same_optimizers(opt, inside)


# Memory.

MEMORY = f"""
    import os, sys
    import numpy as np
    from fastrms import RMSProp

    {PEAK}

    kernel, size = sys.argv[2], 20_000_000
    warm = RMSProp([np.ones(70_000, "f"), np.ones(70_000, "f")], kernel=kernel, clip_norm=1.0, momentum=0.5)
    warm.step()
    warm.step([np.ones(70_000, "f")] * 2)
    warm.save(sys.argv[1] + "/warm.npz")
    warm.load(sys.argv[1] + "/warm.npz")
    peak()
    before = peak()
    opt = RMSProp(
        [np.broadcast_to(np.float32(1), (4, size // 4)), np.broadcast_to(np.float32(1), 5)],
        storage=sys.argv[1] + "/run", kernel=kernel, clip_norm=1.0, momentum=0.5, initial_scale=0.5,
    )
    print("making", peak() - before)
    for _ in range(2):
        opt.step()
    print("step", peak() - before)
    opt.step([np.broadcast_to(0.5, (4, size // 4)), np.ones(5)])
    print("casting", peak() - before)
    opt.save(sys.argv[1] + "/a.npz")
    print("save", peak() - before)
    opt.load(sys.argv[1] + "/a.npz")
    print("load", peak() - before)
    opt.close()
    print("close", peak() - before)
    with RMSProp.reopen(sys.argv[1] + "/run", kernel=kernel) as opt:
        opt.step()
        print("reopened", peak() - before)
        assert opt.params[0][0, 0] == opt.params[0][-1, -1] < 1
    print(sum(buffer.nbytes for buffer in opt.buffers.values()), "in", len(opt.buffers))
"""


@pytest.mark.skipif(not JIT or sys.platform != "linux", reason="pages are given back on Linux; the JIT for its speed")
@pytest.mark.parametrize("kernel", ["serial", "parallel", "numpy"])
def test_what_is_in_memory_at_once_is_bounded(kernel, tmp_path):
    words = run(MEMORY, tmp_path, kernel)
    found = dict(zip(words[:-3:2], map(int, words[1:-3:2]), strict=True))
    assert words[-3:] == [str(4 * 80_000_064), "in", "4"]
    # 80 MB a buffer, 320 MB in all.
    assert {what: nbytes for what, nbytes in found.items() if nbytes > 25 << 20} == {}
    assert len(found) == 7
