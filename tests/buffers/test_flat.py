"""FlatBuffer: views, casts, copies, and arrays that cannot be packed."""

import copy
import pickle
from collections import OrderedDict, defaultdict, namedtuple

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same_bits, case_id, leaves, same_structure
from numpy.lib.stride_tricks import as_strided

from fastrms import DtypeError, FlatBuffer, StructureError
from fastrms.buffers import Layout
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


def test_a_layout_is_cut_into_a_part_of_each_segment():
    layout = Layout({"W": np.ones((2, 3)), "b": np.ones(4, np.float32), "c": np.ones(2)})
    part = layout.cut([slice(4, 7), slice(1, 4)])
    assert [(leaf.path, leaf.shape, leaf.segment, leaf.start, leaf.stop) for leaf in part.leaves] == [
        ("['W']", (2,), 0, 0, 2), ("['b']", (3,), 1, 0, 3), ("['c']", (1,), 0, 2, 3),
    ]  # fmt: skip
    assert [segment.size for segment in part.segments] == [3, 3]
    assert [leaf.shape for leaf in layout.cut([slice(6, 8), slice(0, 0)]).leaves] == [(0,), (0,), (2,)]
    assert list(FlatBuffer.from_layout(part).views) == ["W", "b", "c"]
    assert layout.leaves[0].shape == (2, 3)


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
    with pytest.raises(StructureError, match="expected 2 vectors, one for each dtype, got 3"):
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
    with pytest.raises(
        DtypeError, match=rf"^arrays\[0\]: .*a NumPy dtype, got {name}; convert it with .astype\(np.float32\)"
    ):
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
        ({"W": np.zeros(2)}, "arrays: missing 'b'; expected the keys 'W', 'b', got 'W'"),
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
