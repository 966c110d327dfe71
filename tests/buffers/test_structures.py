"""Structures of arrays, and parameters that share memory."""

import itertools
import pickle
import re
import tracemalloc
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Mapping

import numpy as np
import pytest
from helpers import count_calls
from numpy.lib.stride_tricks import as_strided

from fastrms import StructureError
from fastrms.buffers import Layout
from fastrms.buffers.aliasing import refuse_overlap

# Structures.


Pair = namedtuple("Pair", "W b")


class Frozen(Mapping):
    """A Mapping that is no dict."""

    def __init__(self, items):
        self._items = items

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


class OwnList(list):
    pass


def nesting(rng, depth, count):
    """A random nesting of numbered arrays."""
    kind = rng.integers(0, 6 if depth else 1)
    if kind < 2:
        return np.array(float(next(count)))
    items = [nesting(rng, depth - 1, count) for _ in range(rng.integers(0, 4))]
    if kind == 2:
        return items
    if kind == 3:
        return tuple(items)
    if kind == 4 and len(items) == 2:
        return Pair(*items)
    return {["a", 1, (2, "b")][k]: item for k, item in zip(rng.permutation(3), items, strict=False)}


def alike(rng, tree):
    """The same in other containers that may stand for them."""
    if isinstance(tree, dict):
        items = [(key, alike(rng, item)) for key, item in tree.items()]
        order = rng.permutation(len(items))
        kind = [dict, OrderedDict, lambda items: Frozen(dict(items)), lambda items: defaultdict(list, items)]
        return kind[rng.integers(0, 4)]([items[k] for k in order])
    if isinstance(tree, list | tuple):
        return [list, tuple, OwnList][rng.integers(0, 3)]([alike(rng, item) for item in tree])
    return tree


def spoilt(rng, tree):
    """The same with one container changed, and the path to it and the error that this is to give."""
    if isinstance(tree, dict):
        inner = [key for key, item in tree.items() if isinstance(item, dict | list | tuple)]
        if inner and rng.random() < 0.7:
            key = inner[rng.integers(0, len(inner))]
            item, path, error = spoilt(rng, tree[key])
            return tree | {key: item}, f"[{key!r}]{path}", error
        changes = [
            (tree | {"new": 1}, "unknown 'new'"),
            (list(tree.values()), "expected a dict"),
            (None, "expected a dict"),
        ]
        if tree:
            changes.append((dict(list(tree.items())[1:]), f"missing {next(iter(tree))!r}"))
            changes.append((defaultdict(list, list(tree.items())[1:]), f"missing {next(iter(tree))!r}"))
        item, error = changes[rng.integers(0, len(changes))]
        return item, "", error
    inner = [k for k, item in enumerate(tree) if isinstance(item, dict | list | tuple)]
    if inner and rng.random() < 0.7:
        k = inner[rng.integers(0, len(inner))]
        item, path, error = spoilt(rng, tree[k])
        return [*tree[:k], item, *tree[k + 1 :]], f"[{k}]{path}", error
    item = [[*tree, 1], {}, 3, {1}, np.ones(len(tree))][(which := rng.integers(0, 5))]
    return item, "", "expected a list or tuple" if which else f"expected {len(tree)} items"


@pytest.mark.parametrize("seed", range(200))
def test_any_structure_is_taken_apart_and_its_differences_are_named(seed):
    rng = np.random.default_rng(seed)
    count = itertools.count()
    tree = [nesting(rng, 4, count) for _ in range(3)] + [np.array(float(next(count)))]
    layout = Layout(tree)
    layout = pickle.loads(pickle.dumps(layout)) if seed % 2 else layout
    in_order = [float(k) for k in range(len(layout.leaves))]
    for same in (tree, tuple(tree), alike(rng, tree), alike(rng, tree)):
        assert list(map(float, layout.flatten(same, "given"))) == in_order
    for _ in range(10):
        changed, path, error = spoilt(rng, tree)
        with pytest.raises(StructureError, match=f"^{re.escape(f'given{path}: {error}')}"):
            layout.flatten(changed, "given")


@pytest.mark.parametrize(
    "tree",
    [
        lambda n: {f"layer {k}": {"W": np.ones(2), "b": np.ones(1)} for k in range(n)},
        lambda n: [(np.ones(2), [np.ones(1), {"scale": np.ones(1)}]) for _ in range(n)],
        lambda n: {"a": [np.ones(1) for _ in range(n)], "b": {k: np.ones(1) for k in range(n)}},
    ],
    ids=["layers", "deep", "long"],
)
def test_a_nesting_costs_no_call_for_each_of_its_arrays(tree):
    calls = []
    for n in (100, 200):
        layout = Layout(tree(n))
        given = tree(n)
        calls.append(count_calls(lambda: layout.flatten(given, "given")))  # noqa: B023
    # Only a dict with a single item takes a call of its own.
    assert calls[1] - calls[0] == 100 * ("scale" in str(tree(1)))


# Parameters that share memory.


@pytest.mark.parametrize("seed", range(300))
def test_overlap_is_found_as_numpy_finds_it(seed):
    rng = np.random.default_rng(seed)
    memory = np.zeros(4000, np.uint8)
    views = []
    for _ in range(rng.integers(2, 7)):
        dtype = rng.choice([np.float32, np.float64])
        base = memory[rng.integers(0, 8) * rng.choice([1, 4, 8]) :][:3200].view(dtype)
        shape = tuple(rng.integers(0 if rng.random() < 0.1 else 1, 5, rng.integers(0, 4)).tolist())
        strides = (base.itemsize * rng.choice([0, 1, 2, 3, 5, 12, 30], len(shape))).tolist()
        view = as_strided(base[rng.integers(0, 200) :], shape, strides)
        views.append(view[tuple(slice(None, None, int(rng.choice([-1, 1]))) for _ in shape)])
    expected = {(i, k) for k in range(len(views)) for i in range(k) if np.shares_memory(views[i], views[k])}
    layout = Layout(views)
    try:
        refuse_overlap(layout, views)
        found = None
    except StructureError as error:
        found = tuple(sorted(map(int, re.findall(r"params\[(\d)\]", str(error)))))
    assert (found in expected) if expected else found is None


@pytest.mark.parametrize(
    "views",
    [
        lambda n: list(np.zeros((50, n)).T),
        lambda n: np.split(np.zeros((50, 2 * n)), n, axis=1),
        lambda n: list(np.moveaxis(np.zeros((5, 4, 2 * n)), 2, 0)[::-2]),
        lambda n: np.split(np.zeros(50 * n), n),
        lambda n: [np.zeros(50) for _ in range(n)],
    ],
    ids=["columns", "pairs of columns", "planes, backwards", "neighbours", "arrays"],
)
def test_the_look_for_shared_memory_takes_a_time_in_proportion_to_the_parameters(views):
    made = [views(n) for n in (200, 400)]
    made = [(Layout(arrays), arrays) for arrays in made]
    calls = [count_calls(lambda: refuse_overlap(*one)) for one in made]  # noqa: B023
    assert calls[1] < 2.2 * calls[0]
    layout, arrays = made[0]
    arrays[150] = arrays[20][:2]
    with pytest.raises(StructureError, match=r"params\[(20|150)\] and params\[(20|150)\] share memory"):
        refuse_overlap(layout, arrays)


def test_two_halves_of_an_array_are_not_marked_cell_by_cell():
    array = np.zeros(10**6, np.float32)
    layout = Layout([array[::2], array[1::2]])
    tracemalloc.start()
    refuse_overlap(layout, [array[::2], array[1::2]])
    with pytest.raises(StructureError, match="share memory"):
        refuse_overlap(layout, [array[::2], array[:-1:2]])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < array.size // 10
