"""Checkpoints: a save replaces the old file whole, with its mode, owner and links, or leaves it as it was."""

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from cases import posix
from checkpoint_files import saved

from fastrms import CheckpointError, RMSProp
from fastrms.checkpoints import formats


def test_names_and_places(tmp_path):
    opt = RMSProp([np.zeros(3)])
    with pytest.raises(CheckpointError, match=r"expected a name that ends in \.npz or \.safetensors"):
        opt.save(tmp_path / "state.pt")
    with pytest.raises(FileNotFoundError):
        opt.load(tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError, match=r"expected a folder to write to, got none: '.*nowhere'"):
        opt.save(tmp_path / "nowhere" / "state.npz")
    opt.save(str(tmp_path / "state.npz"))
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    (tmp_path / "usual").unlink()
    assert (tmp_path / "state.npz").stat().st_mode == usual
    assert [item.name for item in tmp_path.iterdir()] == ["state.npz"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    opt = RMSProp([np.zeros(3)])
    path = tmp_path / "state.npz"
    opt.save(path)
    before = path.read_bytes()
    opt.step([np.ones(3)])

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(OSError, match="No space left"):
                opt.save(path)
        assert path.read_bytes() == before
        assert [item.name for item in tmp_path.iterdir()] == ["state.npz"]


@posix
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o640, 0o644, 0o777])
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_the_mode_of_a_file_that_is_saved_over_stays(kind, mode, tmp_path):
    opt, path, _ = saved(tmp_path, kind)
    path.chmod(mode)
    opt.step()
    opt.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert RMSProp.from_checkpoint(path).steps == 2


@posix
def test_what_replaces_a_private_file_is_private_from_the_first_byte_on(tmp_path):
    path = tmp_path / "state.npz"
    path.touch(0o600)
    with formats.replaced(path) as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only the superuser gives files away")
def test_the_owner_of_a_file_that_is_saved_over_stays(tmp_path):
    opt, path, _ = saved(tmp_path, "npz")
    os.chown(path, 1234, 5678)
    path.chmod(0o640)
    opt.save(path)
    about = path.stat()
    assert (about.st_uid, about.st_gid, stat.S_IMODE(about.st_mode)) == (1234, 5678, 0o640)


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs a user to become")
def test_another_group_that_cannot_be_kept_gets_no_rights():
    program = """if True:
        import os, sys
        from pathlib import Path
        from fastrms.checkpoints import formats
        os.setgroups([]); os.setgid(1235); os.setuid(1234)
        with formats.replaced(Path(sys.argv[1])) as temporary:
            temporary.write_text("new")
    """
    with tempfile.TemporaryDirectory() as folder:  # others cannot look into pytest's own
        os.chmod(folder, 0o777)
        path = Path(folder, "state.npz")
        path.touch()
        os.chown(path, 1234, 5678)
        path.chmod(0o6664)  # the bits that lend the rights of owner and group go too
        subprocess.run([sys.executable, "-c", program, path], check=True)
        about = path.stat()
    assert (about.st_uid, about.st_gid, stat.S_IMODE(about.st_mode)) == (1234, 1235, 0o644)


@posix
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_saving_to_a_link_replaces_what_it_leads_to(kind, tmp_path):
    opt, path, _ = saved(tmp_path, kind)
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / f"target.{kind}"
    path.rename(target)
    path.symlink_to(Path("there", target.name))
    chain = tmp_path / f"chain.{kind}"
    chain.symlink_to(path.name)
    opt.step()
    opt.save(chain)
    assert chain.is_symlink()
    assert path.is_symlink()
    assert not target.is_symlink()
    assert RMSProp.from_checkpoint(target).steps == 2
    target.unlink()
    opt.save(path)  # also where there is nothing yet
    assert path.is_symlink()
    assert RMSProp.from_checkpoint(target).steps == 2
    assert sorted(item.name for item in (tmp_path / "there").iterdir()) == [target.name]


@posix
def test_what_must_not_be_replaced_is_refused_and_stays(tmp_path):
    opt, path, before = saved(tmp_path, "npz")
    path.chmod(0o444)
    with pytest.raises(PermissionError, match=r"expected a file that can be written, got one that is read-only: .*npz"):
        opt.save(path)
    assert path.read_bytes() == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(IsADirectoryError, match="expected a file, got a folder"):
        opt.save(tmp_path / "folder.npz")
    (tmp_path / "null.npz").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("null.npz", "pipe.npz"):
        with pytest.raises(OSError, match="expected an ordinary file, got a device"):
            opt.save(tmp_path / name)
    (tmp_path / "circle.npz").symlink_to("circle.npz")
    with pytest.raises(OSError, match="got a link that leads to itself"):
        opt.save(tmp_path / "circle.npz")
    (tmp_path / "dangling.npz").symlink_to("nowhere/state.npz")
    with pytest.raises(FileNotFoundError, match=r"expected a folder to write to, got none: '.*nowhere'"):
        opt.save(tmp_path / "dangling.npz")
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("letter", ["x", "\N{LATIN SMALL LETTER U WITH DIAERESIS}"])
def test_names_as_long_as_the_system_allows(letter, kind, tmp_path):
    if kind == "safetensors":
        pytest.importorskip("safetensors")
    opt = RMSProp([np.ones(3)])
    for length in (1, 41, 42, 64, 233, 234, 255):
        stem = letter * ((length - len(kind) - 1) // len(os.fsencode(letter)))
        path = tmp_path / f"{stem}.{kind}" if stem else tmp_path / f"a.{kind}"
        opt.save(path)
        opt.save(path)
        assert RMSProp.from_checkpoint(path).steps == 0
        path.unlink()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_killed_a_hundred_times_while_saving(kind, tmp_path):
    if kind == "safetensors":
        pytest.importorskip("safetensors.numpy")
    path = tmp_path / f"state.{kind}"
    size = 20_000
    opt = RMSProp([np.zeros(size)])
    start = time.perf_counter()
    for _ in range(5):
        opt.save(path)
    saving = (time.perf_counter() - start) / 5  # of a disk that may be busy
    generator = random.Random(0)
    seen = set()
    for _ in range(100):
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads
            child = os.fork()
        if child == 0:
            while True:  # until killed
                opt.steps += 1
                opt.params[0][...] = opt.steps
                opt.save(path)
                os.write(writing, b".")
        os.read(reading, 1 << 16)  # it has begun, which takes long where this process is large
        time.sleep(generator.uniform(0, 4 * saving))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        opt.load(path)
        assert (opt.params[0] == opt.steps).all()
        seen.add(opt.steps)
        os.close(reading)
        os.close(writing)
    assert len(seen) == 100  # each child saved at least once, and was killed at one of the next times


def test_a_file_that_cannot_be_made_is_named_as_it_was_given(tmp_path, monkeypatch):
    def refuse(path, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    opt = RMSProp([np.ones(2)])
    monkeypatch.setattr(formats.os, "open", refuse)  # what the superuser may do is no test of it
    with pytest.raises(PermissionError, match=r"one that is read-only: '.*state\.npz'$"):
        opt.save(tmp_path / "state.npz")
