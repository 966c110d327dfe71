"""What holds for any layout, dtype, option and gradient, and that memory beyond the arrays stays untouched."""

import copy
import itertools

import numpy as np
from cases import WAYS
from helpers import JIT, assert_same_bits, everything, leaves, same_structure
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastrms import FlatBuffer, RMSProp

EXAMPLES = 300 if JIT else 30
SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 5e-324, 1e-20, -1e-160, 3e38, -1e300, np.inf, -np.inf, np.nan]
ORDINARY = [0.0, -0.0, 1e-45, 5e-324, 1e-20, 3.0, -1e10]
CANARY = 0xA5

shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple) | st.sampled_from([(), (1,), (64,), (17, 3), (400,)])
arrays = st.tuples(shapes, st.sampled_from([np.float32, np.float64]))
keys = st.text("Wb\u03b3_ ", min_size=1, max_size=3) | st.integers(0, 9)
trees = st.recursive(
    arrays,
    lambda inside: (
        st.lists(inside, min_size=1, max_size=4)
        | st.lists(inside, min_size=1, max_size=3).map(tuple)
        | st.dictionaries(keys, inside, min_size=1, max_size=3)
    ),
    max_leaves=8,
)
rates = st.floats(0, 0.99)
optional = {
    "lr": st.floats(0, 10),
    "decay_rate": rates,
    "epsilon": st.floats(1e-12, 1),
    "momentum": rates,
    "centered": st.booleans(),
    "weight_decay": st.floats(0, 1),
    "decoupled_weight_decay": st.booleans(),
    "maximize": st.booleans(),
    "eps_in_sqrt": st.booleans(),
    "initial_scale": st.floats(0, 2),
    "bias_correction": st.booleans(),
    "lr_in_momentum": st.booleans(),
    "clip_value": st.floats(1e-3, 10) | st.none(),
    "clip_norm": st.floats(1e-3, 10) | st.none(),
    "global_clip_norm": st.floats(1e-3, 10) | st.none(),
    "flush_subnormals": st.booleans(),
    "nonfinite": st.sampled_from(["propagate", "skip"]),
}
options = st.fixed_dictionaries({}, optional=optional)


def is_array(tree):
    """Whether this is a pair of shape and dtype, rather than a container of such pairs."""
    return isinstance(tree, tuple) and len(tree) == 2 and isinstance(tree[1], type)


def filled(tree, make):
    """The tree with what `make` returns for each shape and dtype."""
    if is_array(tree):
        return make(*tree)
    if isinstance(tree, dict):
        return {key: filled(item, make) for key, item in tree.items()}
    return type(tree)(filled(item, make) for item in tree)


def numbers(rng, special):
    """A function that makes arrays with numbers of many sizes, some of them special."""

    def make(shape, dtype):
        values = rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 6, shape)
        with np.errstate(over="ignore", under="ignore"):
            values = np.where(rng.random(shape) < 0.1, rng.choice(special, shape), values)
            return np.asarray(values).astype(dtype)

    return make


def in_another_form(rng, array):
    """A gradient that means the same, in one of the forms that a step accepts."""
    wider = array.astype(np.longdouble)
    forms = [array, array, array, array.copy("F"), array.astype(array.dtype.newbyteorder()), wider, None]
    strided = np.repeat(array[..., None], 2, -1)[..., 0]
    return [*forms, strided][rng.integers(len(forms) + 1)]


def changed(given, rng):
    """A function that makes, call by call, the arrays of a tree in another form."""
    items = iter(leaves(given))
    return lambda *_: in_another_form(rng, next(items))


def guarded(optimizer):
    """Put canaries into all memory of the optimizer that belongs to no array, and return a function that looks."""
    spaces = []
    for buffer in optimizer.buffers.values():
        outside = np.ones(buffer._memory.size, bool)
        for segment in buffer.segments:
            first = segment.ctypes.data - buffer._memory.ctypes.data
            outside[first : first + segment.nbytes] = False
        buffer._memory[outside] = CANARY
        spaces.append((buffer._memory, outside))
    return lambda: all((memory[outside] == CANARY).all() for memory, outside in spaces)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(tree=trees, options=options, special=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_any_layout_option_and_gradient_gives_the_same_bits_on_every_kernel(tree, options, special, seed):
    rng = np.random.default_rng(seed)
    params = filled(tree, numbers(rng, ORDINARY))
    before = copy.deepcopy(params)
    if seed % 2 and all(leaf.dtype == np.float32 for leaf in leaves(params)):
        options = options | {"cache_dtype": "bfloat16"}
    optimizers = {name: RMSProp(params, **options, **way) for name, way in WAYS.items()}
    looks = {name: guarded(optimizer) for name, optimizer in optimizers.items()}
    for step in range(3):
        given = filled(tree, numbers(rng, SPECIAL if special else ORDINARY))
        if step < 2:
            given = filled(tree, changed(given, rng))
        if given is None:  # of a single array: without an argument a step reads the buffer, which has no gradient
            continue
        kept = copy.deepcopy(given)
        for optimizer in optimizers.values():
            optimizer.step(given)
        for ours, theirs in zip(leaves(given), leaves(kept), strict=True):
            assert ours.tobytes() == theirs.tobytes()
    oracle = optimizers.pop("numpy")
    assert same_structure(params, oracle.params)
    for ours, theirs in zip(leaves(params), leaves(before), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    for name, optimizer in optimizers.items():
        assert optimizer.check() == []
        assert looks[name]()
        assert (optimizer.steps, optimizer.skipped_steps) == (oracle.steps, oracle.skipped_steps)
        for buffer in oracle.buffers.keys() - {"grads"}:
            pairs = zip(optimizer.buffers[buffer].segments, oracle.buffers[buffer].segments, strict=True)
            for ours, theirs in pairs:
                assert_same_bits(ours, theirs, f"{buffer} of {name}")
    assert looks["numpy"]()


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(tree=trees, options=options, seed=st.integers(0, 2**32 - 1), way=st.sampled_from(sorted(WAYS)))
def test_what_is_not_finite_stays_in_its_element(tree, options, seed, way):
    # A norm is of many elements, so clipping by norm spreads what is not finite; everything else must not.
    options = {k: v for k, v in options.items() if k not in ("clip_norm", "global_clip_norm", "nonfinite")}
    rng = np.random.default_rng(seed)
    make = numbers(rng, ORDINARY)
    params = filled(tree, make)
    clean, spoilt = (RMSProp(params, **options, **WAYS[way]) for _ in range(2))
    bad = [rng.random(leaf.shape) < 0.2 for leaf in leaves(params)]
    for _ in range(3):
        gradients = filled(tree, make)
        clean.step(gradients)
        for gradient, where in zip(leaves(gradients), bad, strict=True):
            gradient[where] = rng.choice([np.nan, np.inf, -np.inf], np.count_nonzero(where))
        spoilt.step(gradients)
    for name in clean.buffers.keys() - {"grads"}:
        for ours, theirs, where in zip(spoilt.buffers[name].leaves, clean.buffers[name].leaves, bad, strict=True):
            assert_same_bits(ours[~where], theirs[~where], name)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(tree=trees, options=options, seed=st.integers(0, 2**32 - 1), later=options)
def test_a_state_that_is_loaded_goes_on_with_the_same_bits(tree, options, seed, later, tmp_path_factory):
    rng = np.random.default_rng(seed)
    make = numbers(rng, ORDINARY)
    params = filled(tree, make)
    later.pop("initial_scale", None)
    whole, other = RMSProp(params, **options), RMSProp(filled(tree, make), **later)
    whole.step(filled(tree, make))
    other.load_state_dict(whole.state_dict())
    path = tmp_path_factory.getbasetemp() / "state.npz"
    whole.save(path)
    from_file = RMSProp.from_checkpoint(path)
    assert same_structure(params, from_file.params)
    gradients = filled(tree, make)
    for optimizer in (whole, other, from_file):
        optimizer.step(gradients)
    assert everything(whole) == everything(from_file)
    ours, theirs = everything(whole), everything(other)
    assert all(theirs[name] == value for name, value in ours.items())


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(tree=trees, seed=st.integers(0, 2**32 - 1))
def test_packing_and_unpacking_gives_back_what_was_there(tree, seed):
    rng = np.random.default_rng(seed)
    given = filled(tree, numbers(rng, SPECIAL))
    buffer = FlatBuffer(given)
    assert same_structure(given, buffer.views)
    for ours, theirs in zip(buffer.leaves, leaves(given), strict=True):
        assert_same_bits(ours, theirs)
        assert ours.size == 0 or np.shares_memory(ours, buffer.block)
    spans = sorted((view.ctypes.data, view.ctypes.data + view.nbytes) for view in buffer.leaves if view.size)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
    again = buffer.unflatten(buffer.flat)
    for ours, theirs in zip(leaves(again), leaves(given), strict=True):
        assert_same_bits(ours, theirs)


def test_the_canaries_would_show_a_write():
    opt = RMSProp([np.ones(3, np.float32), np.ones(2)])
    look = guarded(opt)
    assert look()
    opt.buffers["cache"]._memory[-1] = 0
    assert not look()
