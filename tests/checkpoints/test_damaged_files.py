"""Checkpoints: a damaged or hostile file changes nothing and runs nothing."""

import json
import os
import random
import tracemalloc

import numpy as np
import pytest
from checkpoint_files import rewritten, saved
from helpers import JIT, everything

from fastrms import CheckpointError, RMSProp
from fastrms.checkpoints import formats

MUTATIONS = 5_000  # of each kind of file


@pytest.mark.skipif(not JIT, reason="no compiled code takes part")
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_ten_thousand_damaged_files(kind, tmp_path):
    good, path, data = saved(tmp_path, kind)
    opt = RMSProp([np.zeros(40), np.zeros((3, 4), np.float32)], momentum=0.9)
    new, same = everything(opt), 0
    loaded = everything(good)
    generator = random.Random(0)
    for number in range(MUTATIONS):
        mutated = bytearray(data)
        what = number % 4
        if what == 0:
            mutated = mutated[: generator.randrange(len(data))]
        elif what == 1:
            mutated[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        elif what == 2:
            for _ in range(generator.randrange(2, 20)):
                mutated[generator.randrange(len(data))] = generator.randrange(256)
        else:
            first, second = sorted(generator.randrange(len(data)) for _ in range(2))
            mutated[first:second] = generator.randbytes(generator.randrange(50))
        path.write_bytes(mutated)
        try:
            opt.load(path)
        except CheckpointError:
            assert everything(opt) == new
        else:  # a date in the archive, for instance
            assert everything(opt) == loaded
            opt = RMSProp([np.zeros(40), np.zeros((3, 4), np.float32)], momentum=0.9)
            same += 1
    assert same < 0.1 * MUTATIONS


def with_head(entries, **changes):
    head = json.loads(bytes(entries["head"])) | changes
    return entries | {"head": np.frombuffer(json.dumps(head).encode(), np.uint8)}


def with_array(entries, name, values):
    array = np.array(values, entries[name].dtype)
    checksums = json.loads(bytes(entries["head"]))["checksums"] | {name: formats.checksum([array])}
    return with_head(entries, checksums=checksums) | {name: array}


def header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


class Bomb:
    def __reduce__(self):
        return os.abort, ()


SCALAR = {"path": "", "shape": [], "dtype": "float64", "group": 0}
HOSTILE = {
    "pickle": lambda e: e | {"params/float64": np.array([Bomb()] * 40)},
    "pickled head": lambda e: e | {"head": np.array([Bomb()])},
    "absurd shape": lambda e: e | {"params/float64": header(
        "{'descr': '<f8', 'fortran_order': False, 'shape': (10**15,)}")},
    "large shape": lambda e: e | {"cache/float64": header(
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }")},
    "code in a header": lambda e: e | {"cache/float64": header("__import__('os').abort()")},
    "deep header": lambda e: e | {"cache/float64": header("[" * 5000)},
    "deep signs": lambda e: e | {"cache/float64": header("-" * 9000 + "1")},
    "deep head": lambda e: e | {"head": np.frombuffer(b"[" * 60_000, np.uint8)},
    "no json": lambda e: e | {"head": np.frombuffer(b"\xff\xfe{}", np.uint8)},
    "no head": lambda e: {name: array for name, array in e.items() if name != "head"},
    "wrong dtype": lambda e: e | {"params/float64": np.ones(40, "c16")},
    "text": lambda e: e | {"params/float64": np.array(["x"] * 40)},
    "checksum": lambda e: e | {"params/float64": np.zeros(40)},
    "checksums": lambda e: with_head(e, checksums=None),
    "steps": lambda e: with_head(e, steps=1e308),
    "shape in head": lambda e: with_head(e, parameters=[SCALAR | {"shape": [2**62]}]),
    "shapes in head": lambda e: with_head(e, parameters=[SCALAR | {"shape": [0, 2**62, 2**62]}]),
    "dimensions": lambda e: with_head(e, parameters=[SCALAR | {"shape": [1] * 70}]),
    "structure": lambda e: with_head(e, structure=["dict", [[[1], 0]]]),
    "leaf": lambda e: with_head(e, structure=["list", [0, 7]]),
    "order": lambda e: with_head(e, structure=["list", [1, 0]]),
    "twice": lambda e: with_head(e, structure=["list", [0, 0]]),
    "a key twice": lambda e: with_head(e, structure=["dict", [["[0]", 0], ["[0]", 1]]]),
    "groups": lambda e: with_head(e, structure=["list", [["dict", [["params", 0]]], ["dict", [["a", 1]]]]]),
    "no list of groups": lambda e: with_head(e, structure=0, grouped=True),
    "nothing": lambda e: with_head(e, structure=["list", []]),
    "steps of no run": lambda e: with_head(e, steps=2**62),
    "skipped": lambda e: with_array(e, "skipped", [5, 0]),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file(name, tmp_path):
    _, path, _ = saved(tmp_path, "npz")
    rewritten(path, HOSTILE[name])
    opt = RMSProp([np.zeros(40), np.zeros((3, 4), np.float32)], momentum=0.9)
    before = everything(opt)
    tracemalloc.start()
    # Structure is what load does not need.
    if name not in ("structure", "leaf", "order", "twice", "a key twice", "groups", "no list of groups", "nothing"):
        with pytest.raises(CheckpointError, match=r"state\.npz: "):
            opt.load(path)
    with pytest.raises(CheckpointError, match=r"state\.npz: "):
        RMSProp.from_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22
    assert everything(opt) == before


def test_sizes_beyond_the_end_of_the_file(tmp_path):
    _, path, data = saved(tmp_path, "npz")
    size = (40 * 8 + 128).to_bytes(4, "little")
    assert data.count(size) >= 4
    path.write_bytes(data.replace(size, (1 << 30).to_bytes(4, "little")))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"npz: .*expected an entry inside the file, got one of 1073741824"):
        RMSProp.from_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22


def test_a_compressed_bomb_and_a_large_file(tmp_path):
    size = 1 << 20
    opt = RMSProp([np.zeros(size)])
    path = tmp_path / "state.npz"
    RMSProp([np.ones(size)]).save(path)
    expected = 2 * 8 * size
    tracemalloc.start()
    opt.load(path)
    usual = tracemalloc.get_traced_memory()[1]
    with np.load(path) as archive:
        entries = dict(archive)
    tracemalloc.reset_peak()
    np.savez_compressed(path, **entries)
    with pytest.raises(CheckpointError, match="not compressed"):
        opt.load(path)
    np.savez(path, **(entries | {"more": np.zeros(8 * size)}))
    del entries
    tracemalloc.reset_peak()
    with pytest.raises(CheckpointError, match="expected at most"):
        opt.load(path)
    large = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert usual < 2 * expected
    assert large < 2 * expected
