"""A folder of mapped files: damaged, linked, read-only, replaced and older ones; disks that are full or fail."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from cases import posix
from helpers import assert_same_bits, assert_same_optimizers, contents

import fastrms.backends.mapped
import fastrms.backends.pages
from fastrms import (
    OptionError,
    RMSProp,
    StorageError,
)

STATE = ("params", "cache", "momentum_buffer", "grad_avg")


def test_folders_that_are_refused_stay_as_they_are(tmp_path, path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    with pytest.raises(StorageError, match="expected the path of a folder, got that of a file"):
        RMSProp([np.ones(2)], storage=tmp_path / "file")
    with pytest.raises(StorageError, match=r"expected a new or empty folder, got one with 'thesis\.tex' in it"):
        RMSProp([np.ones(2)], storage=tmp_path / "folder")
    with pytest.raises(StorageError, match=r"expected a folder with head\.json, got none; it was not finished"):
        RMSProp.reopen(tmp_path / "folder")
    for nothing in (tmp_path / "file", tmp_path / "nowhere"):
        with pytest.raises(StorageError, match=r"expected a folder with head\.json, got none$"):
            RMSProp.reopen(nothing)
    with pytest.raises(FileNotFoundError, match="expected a folder in which to make the new one"):
        RMSProp([np.ones(2)], storage=tmp_path / "no" / "where")
    RMSProp([np.ones(2)], storage=path).close()
    before = contents(path)
    with pytest.raises(
        StorageError, match=r"got one with an optimizer in it: .*; RMSProp\.reopen\(path\) opens that one"
    ):
        RMSProp([np.ones(2)], storage=path)
    assert contents(path) == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "folder", "run"]
    assert contents(tmp_path / "folder") == {"thesis.tex": b"mine"}


def rewrite(path, **changes):
    head = json.loads((path / "head.json").read_text())
    (path / "head.json").write_text(json.dumps(head | changes))


def recount(path, place, count):
    counts = np.memmap(path / "counts.bin", np.int64)
    counts[place] = count
    counts.flush()


DAMAGE = {
    "no JSON": (lambda path: (path / "head.json").write_text("{"), "cannot be read"),
    "not a head": (lambda path: (path / "head.json").write_text("[]"), "cannot be read"),
    "newer": (lambda path: rewrite(path, version=99), "version: expected 1 to 1, got 99"),
    "a checkpoint's": (lambda path: rewrite(path, storage=None), "expected a dict with 'clean' and 'buffers'"),
    "newer storage": (
        lambda path: rewrite(path, storage={"version": 3, "clean": True, "buffers": ["params", "grads", "cache"]}),
        "storage: expected version 1 or 2, got 3; it needs a newer fastrms",
    ),
    "no cache": (
        lambda path: rewrite(path, storage={"version": 1, "clean": True, "buffers": ["params", "grads"]}),
        "expected the buffers of an optimizer",
    ),
    "other buffers": (
        lambda path: rewrite(
            path, storage={"version": 1, "clean": True, "buffers": ["params", "grads", "cache", "../x"]}
        ),
        "expected the buffers of an optimizer",
    ),
    "no structure": (lambda path: rewrite(path, structure=None), "cannot be rebuilt"),
    "another structure": (lambda path: rewrite(path, structure=["list", [0]]), "do not fit"),
    "groups": (
        lambda path: rewrite(path, param_groups=[{"speed": 1, "lr": 1.0}]),
        "'speed' is not an option of a parameter group",
    ),
    "no group": (lambda path: rewrite(path, param_groups=[]), "cannot be read"),
    "shorter": (lambda path: os.truncate(path / "cache.bin", 5), r"cache\.bin: expected 4,096 bytes, got 5"),
    "counts": (lambda path: os.truncate(path / "counts.bin", 5), r"counts\.bin: expected 4,096 bytes, got 5"),
    "option": (lambda path: rewrite(path, param_groups=[{"momentum": 2.0}]), "cannot be read: momentum: expected"),
    "order": (lambda path: rewrite(path, structure=["list", [1, 0]]), "structure: cannot be rebuilt"),
    "no steps": (lambda path: recount(path, 1, -1), r"counts\.bin: steps: expected a number of steps, got -1"),
    "steps of no run": (
        lambda path: recount(path, 1, 2**63 - 1),
        r"counts\.bin: steps: expected .*, got 92233720368",
    ),
    "skips of no run": (
        lambda path: recount(path, 2, 2**62),
        "skipped_steps: expected a number of steps, got 461",
    ),
    "sat out": (
        lambda path: recount(path, 3, 1),
        r"counts\.bin: skipped\[0\]: expected 0 to 0, .*; got 1: the file",
    ),
    "sat out less": (lambda path: recount(path, 4, -5), r"counts\.bin: skipped\[1\]: expected 0 to 0, .*; got -5"),
    "gone": (lambda path: (path / "params.bin").unlink(), r"params\.bin"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_and_left_alone(damage, path):
    if os.sysconf("SC_PAGESIZE") != 4096:
        pytest.skip("sizes in messages are those of 4 KiB pages")
    RMSProp([np.ones(2), np.ones(3)], storage=path).close()
    spoil, message = DAMAGE[damage]
    spoil(path)
    before = contents(path)
    for _ in range(2):  # and it is not left locked
        with pytest.raises(OSError, match=message):
            RMSProp.reopen(path)
    assert contents(path) == before


def test_counts_of_a_process_that_was_killed_are_used_as_far_as_they_go_together(path):
    with RMSProp([np.ones(2), np.ones(3)], storage=path, bias_correction=True) as opt:
        opt.step([None, np.ones(3)])
    head = json.loads((path / "head.json").read_text())
    rewrite(path, storage=head["storage"] | {"clean": False})
    recount(path, 3, 2)  # more than there were steps
    with RMSProp.reopen(path, after_crash="use") as opt:
        assert (opt.steps, opt.backend.state.counts.absent.tolist()) == (1, [1, 0])
        opt.step([np.ones(2), np.ones(3)])
        assert np.isfinite(opt.params[0]).all()
    rewrite(path, storage=head["storage"] | {"clean": False})
    recount(path, 3, -1)
    with pytest.raises(StorageError, match="got -1"):
        RMSProp.reopen(path, after_crash="use")


# What is in the folder, and is shared with another place or must not be written.


@posix
@pytest.mark.parametrize("name", ["params.bin", "grads.bin", "cache.bin", "counts.bin", "head.json", "lock"])
@pytest.mark.parametrize("how", ["link", "hard link", "pipe"])
def test_files_that_are_also_elsewhere_are_refused(name, how, tmp_path):
    for folder in ("one", "other"):
        RMSProp([np.ones(3)], storage=tmp_path / folder).close()
    file, other = tmp_path / "one" / name, tmp_path / "other" / name
    file.unlink()
    if how == "link":
        file.symlink_to(Path("..", "other", name))
    elif how == "hard link":
        os.link(other, file)
    else:
        os.mkfifo(file)
    before = contents(tmp_path / "other")
    for after_crash in ("raise", "use"):
        with pytest.raises(StorageError, match=r"expected a file of this folder( alone)?, got"):
            RMSProp.reopen(tmp_path / "one", after_crash=after_crash)
    assert contents(tmp_path / "other") == before
    if how == "link":
        RMSProp.reopen(tmp_path / "other").close()


@posix
def test_a_new_buffer_does_not_go_where_a_link_leads(path, tmp_path):
    opt = RMSProp([np.ones(3)], storage=path)
    (tmp_path / "thesis").write_text("mine")
    (path / "momentum_buffer.bin").symlink_to("../thesis")
    opt.param_groups[0]["momentum"] = 0.5
    opt.step([np.ones(3)])
    opt.close()
    assert (tmp_path / "thesis").read_text() == "mine"
    assert not (path / "momentum_buffer.bin").is_symlink()
    RMSProp.reopen(path).close()


@posix
@pytest.mark.parametrize("name", ["params.bin", "counts.bin", "lock"])
def test_read_only_files_are_refused(name, path):
    RMSProp([np.ones(3)], storage=path).close()
    (path / name).chmod(0o444)
    before = contents(path)
    with pytest.raises(PermissionError):
        RMSProp.reopen(path)
    assert contents(path) == before
    (path / name).chmod(0o600)
    RMSProp.reopen(path).close()


# No room, and disks that fail.


def test_a_buffer_that_cannot_be_made_leaves_the_folder_as_it_was(path, monkeypatch):
    opt = RMSProp([np.ones(3)], storage=path)
    opt.step([np.ones(3)])
    opt.flush()
    names = sorted(contents(path))

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("posix_fallocate", "ftruncate") if hasattr(os, "posix_fallocate") else ("ftruncate",):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            if function == "ftruncate":
                patch.delattr(os, "posix_fallocate", raising=False)
            with pytest.raises(OSError, match="expected room for") as caught:
                opt.param_groups[0]["momentum"] = 0.5
            assert caught.value.errno == errno.ENOSPC
            assert sorted(contents(path)) == names
    with monkeypatch.context() as patch:
        patch.setattr(fastrms.backends.mapped.mmap, "mmap", full)
        with pytest.raises(OSError, match="No space"):
            opt.param_groups[0]["momentum"] = 0.5
        assert sorted(contents(path)) == names
    assert opt.momentum_buffer is None
    with RMSProp([np.ones(3)]) as inside:
        inside.step([np.ones(3)])
        assert opt.param_groups[0]["momentum"] == 0
        opt.step([np.ones(3)])
        inside.step([np.ones(3)])
        opt.close()
        assert_same_optimizers(RMSProp.reopen(path), inside)


def test_what_a_killed_process_left_of_a_buffer_is_made_anew(path):
    opt = RMSProp([np.ones(3)], storage=path)
    (path / "momentum_buffer.bin").write_bytes(b"x" * 100)
    opt.param_groups[0]["momentum"] = 0.5
    assert opt.momentum_buffer[0].tolist() == [0, 0, 0]
    opt.close()
    RMSProp.reopen(path).close()


def test_an_error_of_the_disk_in_a_step_counts_nothing(path, monkeypatch):
    opt = RMSProp([np.ones(3), np.ones(2)], storage=path, bias_correction=True)

    def broken(*arguments):
        raise OSError(errno.EIO, "cannot be read or written")

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(opt.backend.storage.pages, "call_in_parts", broken)
            with pytest.raises(OSError, match="cannot be read or written"):
                opt.step([None, np.ones(2)])
        assert (opt.steps, opt.backend.state.counts.absent.tolist()) == (0, [0, 0])
        assert opt.backend.storage.counts[1:5].tolist() == [0, 0, 0, 0]
    opt.step([None, np.ones(2)])
    assert opt.backend.storage.counts[:5].tolist() == [0, 1, 0, 1, 0]
    opt.close()
    with RMSProp.reopen(path) as opt:
        assert (opt.steps, opt.backend.state.counts.absent.tolist()) == (1, [1, 0])
        opt.step([np.ones(3), np.ones(2)])
        assert np.isfinite(opt.params[0]).all()


def test_a_step_that_was_not_taken_is_counted_in_the_folder_at_once(path):
    opt = RMSProp([np.ones(3)], storage=path, nonfinite="skip")
    opt.step([np.ones(3)])
    opt.flush()
    opt.step([np.full(3, np.nan)])
    assert np.fromfile(path / "counts.bin", np.int64)[:3].tolist() == [0, 1, 1]
    assert not json.loads((path / "head.json").read_text())["storage"]["clean"]
    opt.close()
    with RMSProp.reopen(path) as opt:
        assert (opt.steps, opt.skipped_steps) == (1, 1)


def test_what_cannot_be_removed_does_not_hide_the_error(path, monkeypatch):
    unlink = Path.unlink

    def refuses(self, missing_ok=False):
        if self.name in ("params.bin", "head.json") and self.exists():
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(self, missing_ok)

    path.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuses)
        patch.setattr(
            fastrms.backends.storage.Storage, "_write_metadata", lambda *a, **k: (_ for _ in ()).throw(KeyError("mine"))
        )
        with pytest.raises(KeyError, match="mine"):
            RMSProp([np.ones(3)], storage=path)
    assert list(contents(path)) == ["params.bin"]


def test_the_folder_has_what_its_page_says(path):
    RMSProp([np.ones(2)], storage=path, momentum=0.5, centered=True).close()
    page = (Path(__file__).parent.parent.parent / "docs" / "storage.md").read_text(encoding="utf-8")
    for item in path.iterdir():
        assert f"`{item.name}`" in page


@pytest.mark.parametrize("what", ["removed", "moved", "replaced"])
def test_a_folder_in_the_place_of_the_one_that_was_opened_is_left_alone(what, rng, tmp_path):
    path = tmp_path / "run"
    first = RMSProp([np.ones(300)], lr=0.5, storage=path)
    first.step([np.ones(300)])
    if what == "moved":
        path.rename(tmp_path / "moved")
    else:
        shutil.rmtree(path)
    second = None
    if what == "replaced":
        second = RMSProp([np.zeros(300)], lr=0.001, storage=path)
        second.step([np.ones(300)])
        second.flush()
        before = {file.name: file.read_bytes() for file in path.iterdir()}
    for call in (lambda: setattr(first, "momentum", 0.9), first.flush, first.close):
        with pytest.raises(StorageError, match="expected the folder that was opened, got none or another one in its"):
            call()
    assert first.momentum == 0
    if second is None:
        assert not path.exists()
    else:
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
        second.close()
        again = RMSProp.reopen(path)
        assert (again.lr, again.steps) == (0.001, 1)
        again.close()


def test_an_empty_path_is_no_folder():
    with pytest.raises(OptionError, match="storage: expected the path of a folder or None, got ''"):
        RMSProp([np.ones(2)], storage="")


def test_a_folder_of_an_older_version(tmp_path):
    """It was written before the buffers of an optimizer belonged to a backend."""
    folder = shutil.copytree(Path(__file__).parent.parent / "checkpoints" / "folder1", tmp_path / "run")
    with RMSProp.reopen(folder) as opt:
        assert (opt.steps, opt.skipped_steps, opt.lr, opt.momentum) == (4, 0, 0.01, 0.5)
        expected = RMSProp({"W": np.ones((2, 3)), "b": np.zeros(2, np.float32)}, lr=0.01, momentum=0.5)
        for gradient in (np.ones(2), np.ones(2), np.ones(2), None):
            expected.step({"W": np.ones((2, 3)), "b": gradient})
        for optimizer in (opt, expected):
            optimizer.step({"W": np.full((2, 3), 0.5), "b": np.ones(2)})
        for name in STATE[:3]:
            for key, view in opt.buffers[name].views.items():
                assert_same_bits(view, expected.buffers[name].views[key], name)


def test_the_current_folder_changes(tmp_path, monkeypatch):
    places = [tmp_path / name for name in ("one", "other")]
    opts = []
    for number, place in enumerate(places):
        place.mkdir()
        monkeypatch.chdir(place)
        opts.append(RMSProp([np.full(3, float(number))], lr=0.5 + number, storage="run"))
        assert opts[-1].storage == place / "run"
    for number, opt in enumerate(opts):
        opt.step([np.ones(3)])
        opt.param_groups[0]["momentum"] = 0.5  # makes a file, and changes the head
        opt.param_groups[0]["weight_decay"] = number + 0.25
        opt.flush()
        opt.close()
    for number, place in enumerate(places):
        monkeypatch.chdir(place)
        opt = RMSProp.reopen("run")
        monkeypatch.chdir(tmp_path)
        assert (opt.lr, opt.param_groups[0]["weight_decay"]) == (0.5 + number, number + 0.25)
        opt.step([np.ones(3)])
        opt.close()
        assert RMSProp.reopen(place / "run").steps == 2
    assert sorted(item.name for item in tmp_path.iterdir()) == ["one", "other"]


@posix
def test_a_link_to_the_folder_that_leads_elsewhere_later(tmp_path):
    latest = tmp_path / "latest"
    opts = []
    for name in ("one", "other"):
        latest.unlink(missing_ok=True)
        latest.symlink_to(name)
        opts.append(RMSProp([np.ones(3)], storage=latest))
    opts[0].param_groups[0]["momentum"] = 0.5
    for opt in opts:
        opt.close()
    with RMSProp.reopen(tmp_path / "one") as one, RMSProp.reopen(latest) as other:
        assert [opt.param_groups[0]["momentum"] for opt in (one, other)] == [0.5, 0.0]
