"""FlatBuffer: packing, views, structure, and what it refuses."""

import copy
import itertools
import pickle
import re
import tracemalloc
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same_bits, case_id, count_calls, leaves, same_structure
from numpy.lib.stride_tricks import as_strided

from fastrms import DtypeError, FlatBuffer, StructureError
from fastrms.buffers import Layout
from fastrms.buffers.aliasing import refuse_overlap
from fastrms.buffers.flat import PAGE, PAGE_ALIGNED_FROM

Pair = namedtuple("Pair", "W b")


def structures():
    W, b = np.arange(6.0).reshape(2, 3), np.array([1.0, 2.0])
    return {
        "array": W,
        "list": [W, b],
        "tuple": (W, b),
        "namedtuple": Pair(W, b),
        "dict": {"W": W, "b": b},
        "ordered-dict": OrderedDict(b=b, W=W),
        "nested": {"layers": [{"W": W, "b": b}, (W + 1,)], "head": [], "scale": np.float64(3)},
        "0-d-and-empty": [np.array(5.0), np.zeros((0, 3)), b],
        "mixed": [W.astype(np.float32), b, {"i": np.arange(3), "c": np.array([1j])}, W.astype(np.float32) + 1],
    }


@pytest.mark.parametrize("size", [PAGE_ALIGNED_FROM, 10 * PAGE_ALIGNED_FROM + 1])
def test_a_large_block_begins_on_a_page(size):
    blocks = [FlatBuffer([np.zeros(size, np.uint8)]).block for _ in range(5)]
    assert [block.ctypes.data % PAGE for block in blocks] == [0] * 5


@pytest.mark.parametrize("name", structures())
def test_views_have_the_structure_and_values_and_share_one_aligned_block(name):
    tree = structures()[name]
    buffer = FlatBuffer(tree)
    assert same_structure(tree, buffer.views)
    assert buffer.block.ctypes.data % 64 == 0
    for segment in buffer.segments:
        assert segment.ctypes.data % 64 == 0
        assert segment.flags.c_contiguous
    for given, view in zip(leaves(tree), buffer.leaves, strict=True):
        np.testing.assert_array_equal(view, given, strict=True)
        assert np.shares_memory(view, buffer.block) or view.size == 0
        assert not np.shares_memory(view, given)
    assert buffer.size == sum(leaf.size for leaf in leaves(tree))


def test_flat_is_dense_and_in_order():
    buffer = FlatBuffer([np.array([[1.0, 2], [3, 4]]), np.array(5.0), np.array([6.0])])
    assert buffer.flat.tolist() == [1, 2, 3, 4, 5, 6]
    buffer.flat[:] = 0
    assert buffer.views[1] == 0
    buffer.views[2][0] = 7
    assert buffer.flat.tolist() == [0, 0, 0, 0, 0, 7]


def test_assigning_to_flat_copies_in():
    buffer = FlatBuffer([np.ones(2), np.ones(1)])
    view = buffer.views[0]
    buffer.flat *= 3
    buffer.flat += [1, 2, 3]
    assert view.tolist() == [4, 5]
    buffer.flat = np.arange(3)
    assert view.tolist() == [0, 1]
    for bad in (np.ones(2), np.ones((1, 3))):
        with pytest.raises(StructureError, match=r"flat: expected shape \(3,\), got"):
            buffer.flat = bad
    with pytest.raises(StructureError, match="flat: there are 2 dtypes"):
        FlatBuffer([np.ones(2), np.ones(1, int)]).flat = 0


def test_several_dtypes_have_one_dense_segment_each_in_one_block():
    a32, a64 = np.arange(3, dtype=np.float32), np.arange(5.0)
    buffer = FlatBuffer([a32, a64, a32 + 10])
    first, second = buffer.flat
    assert first.dtype == np.float32
    assert first.tolist() == [0, 1, 2, 10, 11, 12]
    assert second.tolist() == [0, 1, 2, 3, 4]
    assert first.base is second.base is buffer.views[0].base


@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(12.0)[::2],
        np.arange(6.0)[::-1],
        np.arange(6.0).astype(">f8"),
        np.broadcast_to(np.float32(2), (3, 2)),
        np.frombuffer(np.arange(4.0).tobytes()),
        np.frombuffer(b"\0" + np.arange(4.0).tobytes(), dtype=np.uint8)[1:].view(np.float64),
    ],
    ids=["fortran", "strided", "reversed", "byte-swapped", "broadcast", "read-only", "misaligned"],
)
def test_any_memory_layout_is_copied_in_and_comes_out_native(array):
    before = array.copy()
    view = FlatBuffer([array]).views[0]
    np.testing.assert_array_equal(view, before)
    assert view.dtype.isnative
    assert view.flags.c_contiguous
    assert view.flags.writeable
    assert view.flags.aligned


def test_like_has_the_layout_and_its_own_memory():
    buffer = FlatBuffer({"a": np.ones(3), "b": np.ones(2, np.float32)})
    other = buffer.like(7)
    assert other.layout is buffer.layout
    assert other.views["a"].tolist() == [7, 7, 7]
    assert not np.shares_memory(other.block, buffer.block)
    assert buffer.like().views["b"].tolist() == [0, 0]
    assert buffer.like(-2).views["b"].tolist() == [-2, -2]
    assert np.signbit(buffer.like(-0.0).views["a"]).all()


def test_a_buffer_is_made_from_a_layout_in_memory_of_ones_own():
    layout = Layout({"a": np.ones(3), "b": np.ones(2, np.float32)})
    assert FlatBuffer.from_layout(layout).views["b"].tolist() == [0, 0]
    memory = np.ones(1000, np.uint8)
    buffer = FlatBuffer.from_layout(layout, lambda size, dtype: memory[:size].view(dtype))
    assert buffer.layout is layout
    assert np.shares_memory(buffer.block, memory)
    buffer.views["a"][...] = 7
    assert FlatBuffer(buffer.views).flat[0].tolist() == [7, 7, 7]


def test_unflatten_gives_views_of_any_vector():
    buffer = FlatBuffer({"W": np.zeros((2, 3)), "b": np.zeros(2)})
    for vector in (np.arange(8.0), np.arange(8, dtype=np.int16), np.arange(16.0)[::2]):
        tree = buffer.unflatten(vector)
        assert tree["W"].shape == (2, 3)
        assert tree["W"].dtype == vector.dtype
        assert np.concatenate([tree["W"].ravel(), tree["b"]]).tolist() == vector.tolist()
        tree["b"][1] = -1
        assert vector[-1] == -1


def test_unflatten_of_several_dtypes_takes_a_vector_each():
    buffer = FlatBuffer([np.zeros(2, np.float32), np.zeros(3)])
    tree = buffer.unflatten([np.arange(2), np.arange(3)])
    assert [leaf.tolist() for leaf in tree] == [[0, 1], [0, 1, 2]]


@pytest.mark.parametrize(
    ("vector", "error", "message"),
    [
        (np.zeros(7), StructureError, r"vector: expected shape \(8,\), got \(7,\)"),
        (np.zeros((2, 4)), StructureError, r"vector: expected shape \(8,\), got \(2, 4\)"),
        ([0.0] * 8, DtypeError, "vector: expected a 1-D ndarray of 8 elements, got a list of 8 items"),
    ],
    ids=["length", "2-d", "list"],
)
def test_unflatten_refuses(vector, error, message):
    with pytest.raises(error, match=message):
        FlatBuffer([np.zeros((2, 3)), np.zeros(2)]).unflatten(vector)


def test_unflatten_refuses_one_vector_for_two_segments():
    with pytest.raises(StructureError, match="expected 2 vectors, one a dtype, got 3"):
        FlatBuffer([np.zeros(2, np.float32), np.zeros(3)]).unflatten(np.zeros((3, 5)))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.longdouble, ">f4"])
def test_gather_casts_numbers(dtype):
    buffer = FlatBuffer([np.zeros((2, 2), np.float32), np.zeros(3, np.float32)])
    buffer.gather([np.arange(4).reshape(2, 2).T.astype(dtype), np.arange(3).astype(dtype)])
    assert buffer.flat.tolist() == [0, 2, 1, 3, 0, 1, 2]


# Those of ml_dtypes that are floats, as JAX has them; all of their numbers are numbers of float32.
FLOATS = [name for name in ml_dtypes.__all__ if name.startswith(("bfloat", "float"))]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("target", [np.float32, np.float64])
def test_gather_takes_every_number_of_the_floats_of_ml_dtypes(name, target):
    dtype = np.dtype(getattr(ml_dtypes, name))
    numbers = np.arange(256 ** min(dtype.itemsize, 2), dtype=f"u{dtype.itemsize}")
    numbers = numbers[: 1 << ml_dtypes.finfo(dtype).bits].view(dtype)
    buffer = FlatBuffer([np.zeros(numbers.size, target)])
    with np.errstate(all="raise"):
        buffer.gather([numbers])
    assert_same_bits(buffer.flat, np.array([float(number) for number in numbers], target))


@pytest.mark.parametrize("name", ["bfloat16", "float8_e5m2", "int4", "complex32"])
def test_dtypes_of_other_packages_are_refused_where_they_cannot_be_kept_or_cast(name):
    numbers = np.zeros(2, getattr(ml_dtypes, name, None) or pytest.skip(f"an older ml_dtypes has no {name}"))
    with pytest.raises(DtypeError, match=rf"^arrays\[0\]: .*own, got {name}; convert it with .astype\(np.float32\)"):
        FlatBuffer([numbers])
    target = np.float32 if name == "complex32" else bool
    with pytest.raises(DtypeError, match=r"^arrays\[0\]: expected "):
        FlatBuffer([np.zeros(2, target)]).gather([numbers])


@pytest.mark.parametrize("large", [np.array([1e300, -1e300]), np.array(["1e4000", "-1e4000"], np.longdouble)])
def test_gather_makes_inf_of_what_is_too_large(large):
    buffer = FlatBuffer([np.zeros(2, np.float32)])
    for settings in ({}, {"all": "raise"}):
        buffer.flat = 0
        with np.errstate(**settings):
            buffer.gather([large])
        assert buffer.flat.tolist() == [np.inf, -np.inf]


def test_gather_copies_from_its_own_views_in_another_order():
    buffer = FlatBuffer([np.array([1.0, 2]), np.array([3.0, 4])])
    buffer.gather(buffer.views)
    assert buffer.flat.tolist() == [1, 2, 3, 4]
    buffer.gather([buffer.views[1], buffer.views[0]])
    assert buffer.flat.tolist() == [3, 4, 1, 2]
    buffer.gather([buffer.flat[1:3], buffer.flat[2:]])
    assert buffer.flat.tolist() == [4, 1, 1, 2]


@pytest.mark.parametrize("wrap", [as_strided, np.from_dlpack, lambda a: np.asarray(memoryview(a))])
def test_gather_copies_from_memory_of_its_own_that_has_another_base(wrap):
    buffer = FlatBuffer([np.array([1.0, 2]), np.array([3.0, 4])])
    buffer.gather([wrap(buffer.views[1]), wrap(buffer.views[0])])
    assert buffer.flat.tolist() == [3, 4, 1, 2]
    buffer.gather([wrap(buffer.flat)[1:3], wrap(buffer.flat)[2:]])
    assert buffer.flat.tolist() == [4, 1, 1, 2]
    buffer.flat = wrap(buffer.flat)[::-1]
    assert buffer.flat.tolist() == [2, 1, 1, 4]


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ([np.ones(2)], StructureError, "arrays: expected 2 items, got 1"),
        ([np.ones(2), np.ones(2)], StructureError, r"arrays\[1\]: expected shape \(3,\), got \(2,\)"),
        ([np.ones(2), None], DtypeError, r"arrays\[1\]: expected an array, got None"),
        ([np.ones(2), np.ones(3, complex)], DtypeError, r"arrays\[1\]: expected a dtype .* float64 .* got complex128"),
        ([np.ones(2), np.ones(3, bool)], DtypeError, r"arrays\[1\]: .* got bool"),
        ({"a": np.ones(2)}, StructureError, "arrays: expected a list or tuple of 2 items, got a dict of 1 items"),
        (np.ones(5), StructureError, r"arrays: expected a list or tuple of 2 items, got an array of shape \(5,\)"),
        ((a for a in "ab"), StructureError, "arrays: expected a list or tuple of 2 items, got generator object"),
    ],
    ids=["count", "shape", "none", "complex", "bool", "dict", "array", "generator"],
)
def test_gather_refuses_and_writes_nothing(arrays, error, message):
    buffer = FlatBuffer([np.zeros(2), np.zeros(3)])
    with pytest.raises(error, match=message):
        buffer.gather(arrays)
    assert not buffer.flat.any()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"W": np.zeros(2)}, "arrays: missing 'b'; expected the keys 'W', 'b'"),
        ({"W": np.zeros(2), "b": np.zeros(1), "c": np.zeros(1)}, "arrays: unknown 'c'; expected the keys 'W', 'b'"),
        ([np.zeros(2), np.zeros(1)], "arrays: expected a dict with the keys 'W', 'b', got a list of 2 items"),
    ],
    ids=["missing", "unknown", "list"],
)
def test_gather_names_keys(arrays, message):
    with pytest.raises(StructureError, match=message):
        FlatBuffer({"W": np.zeros(2), "b": np.zeros(1)}).gather(arrays)


def test_gather_refuses_a_dict_in_place_of_an_array():
    with pytest.raises(DtypeError, match=r"arrays\['b'\]: expected an array, got a dict of 0 items"):
        FlatBuffer({"W": np.zeros(2), "b": np.zeros(1)}).gather({"W": np.zeros(2), "b": {}})


def test_gather_takes_a_dict_in_any_order():
    buffer = FlatBuffer({"W": np.zeros(2), "b": np.zeros(1)})
    buffer.gather({"b": np.array([3]), "W": np.array([1, 2])})
    assert buffer.flat.tolist() == [1, 2, 3]


def test_a_dict_that_makes_missing_keys_is_asked_for_none():
    buffer = FlatBuffer([{"W": np.zeros(2), "b": np.zeros(1)}])
    given = defaultdict(lambda: np.ones(1), {"W": np.ones(2), "c": np.ones(1)})  # as many as there are
    with pytest.raises(StructureError, match=r"^arrays\[0\]: missing 'b'"):
        buffer.gather([given])
    assert list(given) == ["W", "c"]
    assert not buffer.flat.any()


class Misbehaves:
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("no array today")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (None, "got None"),
        ("text", "got str object"),
        (b"bytes", "got bytes object"),
        ({1.0}, "got set object"),
        (iter([1.0]), "got list_iterator object"),
        (object(), "got object object"),
        (np.array(["a"]), "expected an array of numbers, got dtype <U1"),
        (np.array([None]), "expected an array of numbers, got dtype object"),
        (np.array(["2020-01-01"], "M8[D]"), "expected an array of numbers, got dtype datetime64"),
        (np.ma.masked_array([1.0], [True]), "masked array; use .filled"),
        (np.ones((1, 1)).view(np.matrix), "np.matrix; use np.asarray"),
        (Misbehaves(), "got Misbehaves object: no array today"),
    ],
    ids=case_id,
)
def test_what_is_no_array_is_refused(item, message):
    with pytest.raises(DtypeError, match=rf"arrays\[1\]: .*{message}"):
        FlatBuffer([np.zeros(2), item])


@pytest.mark.parametrize("empty", [[], {}, (), [[], {}]], ids=str)
def test_nothing_to_pack_is_refused(empty):
    with pytest.raises(StructureError, match="expected at least one array"):
        FlatBuffer(empty)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_copies_and_pickles_have_views_of_their_own_block(again):
    buffer = FlatBuffer({"W": np.ones((2, 2)), "b": np.zeros(3, np.float32)})
    other = again(buffer)
    other.views["W"][...] = 5
    assert other.segments[0].tolist() == [5, 5, 5, 5]
    assert buffer.views["W"].tolist() == [[1, 1], [1, 1]]
    assert other.block.ctypes.data % 64 == 0
    # By which a step recognises an ordinary gradient without a look at its values.
    assert all(view.dtype is np.dtype(view.dtype.char) for view in other.leaves)
    assert all(segment.dtype is np.dtype(segment.dtype.char) for segment in other.layout.segments)


# Structures.


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
