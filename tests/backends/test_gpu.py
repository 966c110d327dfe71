"""`RMSProp(kernel="cuda")` on a GPU: `python -m pytest -m gpu`, where there is one; a minute.

Needs "fastrms[cuda]", and cupy and a torch that can use the GPU: what is missing is a failure, not a skip. The logic is
tested without a GPU too, by `test_cuda.py`; here is what the simulator cannot show: bits of the hardware, streams,
memory of other libraries, and that nothing waits.
"""

import copy
import importlib
import pickle
import time

import numpy as np
import pytest
from cases import OPTIONS, combinations
from helpers import assert_same_bits, wide

from fastrms import DtypeError, NonfiniteError, RMSProp, StructureError

pytestmark = pytest.mark.gpu

DTYPES = [np.float32, np.float64]
SHAPES = [(40, 5), (), (0,), (65,), (7, 3), (9000,)]
MIXED = [np.float32, np.float64, np.float64, np.float32, np.float64, np.float32]


@pytest.fixture(scope="module")
def cuda():
    from fastrms.cuda import why_not

    assert why_not() is None
    return importlib.import_module("numba.cuda")


@pytest.fixture(scope="module")
def cupy(cuda):
    return importlib.import_module("cupy")


@pytest.fixture(scope="module")
def torch(cuda):
    module = importlib.import_module("torch")
    assert module.cuda.is_available()
    return module


def arrays(rng, low=-3, high=1):
    return [np.asarray(wide(rng, s, np.float64, low, high)).astype(d) for s, d in zip(SHAPES, MIXED, strict=True)]


def pair(params, **options):
    return RMSProp(params, kernel="serial", **options), RMSProp(params, kernel="cuda", **options)


def assert_same_state(optimizer, oracle, what=""):
    ours, theirs = optimizer.state_dict(), oracle.state_dict()
    assert ours["arrays"].keys() == theirs["arrays"].keys()
    for name, array in theirs["arrays"].items():
        assert_same_bits(ours["arrays"][name], array, f"{name} {what}")
    assert (ours["steps"], ours["skipped_steps"]) == (theirs["steps"], theirs["skipped_steps"])


# Bits.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 31, 4095, 4096, 4097, 1_000_003])
def test_default_options_have_the_bits_of_the_host(size, dtype, cuda, rng):
    oracle, optimizer = pair([wide(rng, size, dtype, -3, 3)])
    for _ in range(50):
        gradient = wide(rng, size, dtype)
        oracle.step([gradient])
        optimizer.step([cuda.to_device(gradient)])
    assert_same_state(optimizer, oracle)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals_inf_and_nan_have_the_bits_of_the_host(dtype, cuda, rng):
    lowest = {np.float32: -45, np.float64: -320}[dtype]
    start = wide(rng, 3000, dtype, lowest, 1)
    start[:3] = np.inf, -np.inf, np.nan
    for options in ({}, {"flush_subnormals": False}, {"flush_subnormals": False, "centered": True, "momentum": 0.9}):
        oracle, optimizer = pair([start], **options)
        for t in range(100):
            gradient = wide(rng, 3000, dtype, lowest, -lowest // 2)
            gradient[10:13] = (np.inf, -np.inf, np.nan) if t == 5 else 0.0
            gradient[1500 if t > 20 else 3000 :] = 0
            for opt in (oracle, optimizer):
                opt.step([gradient])
        assert_same_state(optimizer, oracle, str(options))


@pytest.mark.parametrize("part", range(4))
def test_every_combination_of_options_has_the_bits_of_the_host(part, cuda, rng):
    for names in combinations()[part::4]:
        options = {name: OPTIONS[name] for name in sorted(names)}
        oracle, optimizer = pair(arrays(rng), lr=0.01, **options)
        for t in range(4):
            gradients = arrays(rng, -30 if t % 2 else -3)
            if t == 2:
                gradients[0] = None
            for opt in (oracle, optimizer):
                opt.step(gradients)
        assert_same_state(optimizer, oracle, str(options))


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_norms_have_the_bits_of_the_host(limit, cuda, rng):
    sizes = [*rng.integers(0, 5000, 300), 1_000_003]
    for low, high in ((-3, 3), (-300, 300), (-320, -300), (150, 307)):
        oracle, optimizer = pair([np.ones(n) for n in sizes], clip_norm=10 * limit, global_clip_norm=limit)
        gradients = [wide(rng, n, np.float64, low, high) for n in sizes]
        for opt in (oracle, optimizer):
            opt.step(gradients)
        assert_same_state(optimizer, oracle, f"10**{low} to 10**{high}")


def test_gradients_that_are_not_finite(cuda, rng):
    for options in ({}, {"clip_norm": 1.0}, {"clip_value": 1.0, "global_clip_norm": 1.0}):
        params = arrays(rng)
        oracle, skipping = pair(params, nonfinite="skip", bias_correction=True, **options)
        _, raising = pair(params, nonfinite="raise", **options)
        for t in range(20):
            gradients = arrays(rng)
            if t % 3 == 1:
                gradients[5][8999] = np.nan
            for opt in (oracle, skipping):
                opt.step(gradients)
            if t % 3 == 1:
                with pytest.raises(NonfiniteError, match=r"gradients\[5\]: 1 NaN and 0 inf among 9000 values"):
                    raising.step([cuda.to_device(g) if g.ndim else g for g in gradients])
        assert_same_state(skipping, oracle)
        assert raising.steps == 0


def test_a_run_goes_on_elsewhere_with_the_same_bits(cuda, rng, tmp_path):
    oracle, optimizer = pair(arrays(rng), momentum=0.9, centered=True)
    for t in range(6):
        gradients = arrays(rng)
        for opt in (oracle, optimizer):
            opt.step(gradients)
        optimizer.save(tmp_path / "run.npz")
        optimizer = RMSProp.from_checkpoint(tmp_path / "run.npz", kernel="cuda" if t % 2 else "serial")
        optimizer = pickle.loads(pickle.dumps(optimizer))
        assert_same_state(optimizer, oracle)


def test_one_parameter_at_a_time_has_the_bits_of_a_whole_step_on_the_host(cuda, rng):
    for names in combinations():
        if names & {"global_clip_norm", "nonfinite"}:  # they need all gradients together
            continue
        options = {name: OPTIONS[name] for name in sorted(names)}
        oracle, optimizer = pair(arrays(rng), lr=0.01, **options)
        for t in range(3):
            gradients = arrays(rng)
            if t == 1:
                gradients[5] = None
            for number in rng.permutation(len(gradients)):
                gradient = gradients[number]
                there = gradient is not None and gradient.size and number % 2
                optimizer.step_parameter(int(number), cuda.to_device(gradient) if there else gradient)
            oracle.step(gradients)
        assert_same_state(optimizer, oracle, str(options))


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0, "momentum": 0.9, "bias_correction": True}], ids=str)
@pytest.mark.parametrize("width", [1, 50, 300, 5000])
def test_rows_have_the_bits_of_the_host(width, options, cuda, rng):
    oracle, optimizer = pair([wide(rng, (2000, width), np.float32, -1, 1)], **options)
    for size in (1, 700, 5000, 3):
        rows = rng.integers(0, 2000, size)
        gradient = wide(rng, (size, width), np.float32, -1, 1)
        oracle.step_rows(0, rows, gradient)
        optimizer.step_rows(0, cuda.to_device(rows) if size % 2 else rows, cuda.to_device(gradient))
        oracle.step_rows(0, rows[:2], gradient[:2])
        optimizer.step_rows(0, rows[:2], gradient[:2])
    assert_same_state(optimizer, oracle)


# Memory of other libraries.


def test_cupy_shares_memory_and_gives_gradients_of_every_kind(cupy, rng):
    params = [np.ones((30, 4), np.float32), np.ones(50, np.float32), np.float32(1)]
    oracle, optimizer = pair(params)
    shared = [cupy.asarray(view) for view in optimizer.params]
    for view, wrapped in zip(optimizer.params, shared, strict=True):
        assert wrapped.data.ptr == view.__cuda_array_interface__["data"][0]
    for _ in range(5):
        gradients = [np.asarray(rng.standard_normal(p.shape), np.float32) for p in params]
        oracle.step(gradients)
        optimizer.step([
            cupy.asfortranarray(cupy.asarray(gradients[0])),
            cupy.repeat(cupy.asarray(gradients[1], np.float64), 2)[::2],
            cupy.asarray(gradients[2]),
        ])  # fmt: skip
    optimizer.synchronize()
    for wrapped, ours in zip(shared, oracle.params, strict=True):
        assert_same_bits(wrapped.get(), ours)
    shared[1][...] = 7  # and what is written there is the parameter
    assert (optimizer.params[1].copy_to_host() == 7).all()
    again = RMSProp([cupy.ones((2, 3)).T, cupy.ones(())], kernel="cuda")
    assert again.params[0].copy_to_host().shape == (3, 2)


@pytest.mark.parametrize("count", [1, 1000])
def test_torch_shares_memory_and_its_gradients_are_read_where_they_lie(count, torch, rng):
    start = [rng.standard_normal((10, 10)).astype(np.float32) for _ in range(count)]
    oracle, optimizer = pair(start)
    shared = [torch.as_tensor(view, device="cuda") for view in optimizer.params]
    for _ in range(5):
        gradients = [rng.standard_normal((10, 10)).astype(np.float32) for _ in range(count)]
        given = [torch.tensor(g, device="cuda") for g in gradients]
        oracle.step(gradients)
        optimizer.step(given)
        found = optimizer.backend._finder.find(tuple(given), optimizer.backend.written)
        assert found.sources.tolist() == [tensor.data_ptr() for tensor in given]
        assert found.others == found.arrays == []
    optimizer.synchronize()
    for tensor, ours in zip(shared, oracle.params, strict=True):
        assert_same_bits(tensor.cpu().numpy(), ours)
    optimizer.step([None, *given[1:]]) if count > 1 else optimizer.step([given[0].T])
    oracle.step([None, *gradients[1:]] if count > 1 else [gradients[0].T])
    assert_same_state(optimizer, oracle)


# Parameters in the program's own arrays.


def assert_updated_in_place(given, to_host, opt, oracle, addresses):
    opt.synchronize()
    for array, param, address in zip(given, oracle.params, addresses, strict=True):
        assert_same_bits(to_host(array), param)
        assert array.__cuda_array_interface__["data"][0] == address
    assert all(ours is array for ours, array in zip(opt.params, given, strict=True))
    assert_same_state(opt, oracle)


@pytest.mark.parametrize("library", ["cupy", "numba", "torch"])
@pytest.mark.parametrize("part", range(4))
def test_every_combination_of_options_in_place_has_the_bits_of_the_host(part, library, request, rng):
    module = request.getfixturevalue("cuda" if library == "numba" else library)
    place, to_host = {
        "cupy": (lambda a: module.asarray(a), lambda a: a.get()),
        "numba": (lambda a: module.to_device(a), lambda a: a.copy_to_host()),
        "torch": (lambda a: module.tensor(a, device="cuda"), lambda a: a.cpu().numpy()),
    }[library]

    def some(arrays):  # Numba has no arrays without an axis
        return [array for array in arrays if array.ndim or library != "numba"]

    for names in combinations()[part::4]:
        options = {name: OPTIONS[name] for name in sorted(names)}
        start = some(arrays(rng))
        given = list(map(place, start))
        addresses = [array.__cuda_array_interface__["data"][0] for array in given]
        oracle = RMSProp(start, kernel="serial", lr=0.01, **options)
        opt = RMSProp(given, kernel="cuda", in_place=True, lr=0.01, **options)
        for t in range(4):
            gradients = some(arrays(rng, -30 if t % 2 else -3))
            if t == 2:
                gradients[0] = None
            oracle.step(gradients)
            opt.step([g if g is None or t == 3 else place(g) for g in gradients])
        assert_updated_in_place(given, to_host, opt, oracle, addresses)


@pytest.mark.parametrize("count", [1, 1000])
def test_parameters_of_a_torch_model_are_updated_in_place(count, torch, rng):
    start = [rng.standard_normal((10, 10)).astype(np.float32) for _ in range(count)]
    model = [torch.nn.Parameter(torch.tensor(array, device="cuda")) for array in start]
    given = [parameter.detach() for parameter in model]
    oracle, opt = RMSProp(start, kernel="serial"), RMSProp(given, kernel="cuda", in_place=True)
    for _ in range(5):
        gradients = [rng.standard_normal((10, 10)).astype(np.float32) for _ in range(count)]
        for parameter, gradient in zip(model, gradients, strict=True):
            parameter.grad = torch.tensor(gradient, device="cuda")
        oracle.step(gradients)
        opt.step([parameter.grad for parameter in model])
    opt.step([given[-1], *(parameter.grad for parameter in model[1:])])  # another parameter, or the parameter itself
    oracle.step([oracle.params[-1].copy(), *gradients[1:]])
    for parameter, param in zip(model, oracle.params, strict=True):
        assert_same_bits(parameter.detach().cpu().numpy(), param)
    with pytest.raises(DtypeError, match=r"params\[0\]: .* got Parameter object that requires gradients; pass its"):
        RMSProp(model, kernel="cuda", in_place=True)
    before = opt.state_dict()["arrays"]
    there = given[0].data
    given[0].data = given[0].data.clone()
    with pytest.raises(StructureError, match=r"params\[0\]: expected the original array"):
        opt.step([parameter.grad for parameter in model])
    given[0].data = there
    for name, array in opt.state_dict()["arrays"].items():
        assert_same_bits(array, before[name])


@pytest.mark.parametrize("make", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_copies_of_program_and_optimizer_in_place(library, make, request, tmp_path, rng):
    module = request.getfixturevalue(library)
    start = arrays(rng)
    given = [module.asarray(a) if library == "cupy" else module.tensor(a, device="cuda") for a in start]
    oracle, opt = RMSProp(start, momentum=0.9), RMSProp(given, kernel="cuda", in_place=True, momentum=0.9)
    copied, other = make((given, opt))
    assert all(ours is theirs for ours, theirs in zip(other.params, copied, strict=True))
    gradients = arrays(rng)
    other.step(gradients)
    assert_same_state(opt, oracle)
    oracle.step(gradients)
    assert_same_state(other, oracle)
    oracle.save(tmp_path / "run.npz")
    opt.load(tmp_path / "run.npz")
    assert_same_state(opt, oracle)


def test_the_streams_of_the_parameters_are_waited_for(cupy, rng):
    values, gradient = (rng.standard_normal(1_000_000).astype(np.float32) for _ in range(2))
    theirs, other = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    for stream in (None, other):
        oracle = RMSProp([values], kernel="serial")
        source, param, there = cupy.asarray(values), cupy.zeros(values.size, np.float32), cupy.asarray(gradient)
        opt = RMSProp([param], kernel="cuda", in_place=True, stream=stream)
        cupy.cuda.runtime.deviceSynchronize()
        busy(cupy, theirs)
        with theirs:
            param[...] = source  # not there yet when the step is asked for
            opt.step([there])
            read = param.copy()  # not before the step has written it
        oracle.step([gradient])
        theirs.synchronize()
        assert_same_bits(read.get(), oracle.params[0])
        assert_same_state(opt, oracle)


def test_a_step_in_place_does_not_wait_for_the_device(cupy, rng):
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        params, gradients = ([cupy.ones((30, 4), np.float32), cupy.ones(50)] for _ in range(2))
        opt = RMSProp(params, kernel="cuda", in_place=True, stream=stream)
        for _ in range(3):
            opt.step(gradients)
        opt.synchronize()
        busy(cupy, stream, 1.0)
        for _ in range(10):
            opt.step(gradients)
        assert not stream.done, "the steps were taken after all that was asked of the stream before"
    opt.synchronize()
    assert opt.steps == 13


# Streams and waiting.


def busy(cupy, stream, seconds=0.3):
    """Let a stream be busy for about so long, with work that is not the optimizer's."""
    with stream:
        matrix = cupy.ones((4096, 4096), np.float32)
        cupy.matmul(matrix, matrix)
        stream.synchronize()
        begin = time.perf_counter()
        cupy.matmul(matrix, matrix)
        stream.synchronize()
        one = time.perf_counter() - begin
        for _ in range(max(1, round(seconds / one))):
            cupy.matmul(matrix, matrix)


def test_the_stream_of_who_made_a_gradient_is_waited_for(cupy, rng):
    values = rng.standard_normal(1_000_000).astype(np.float32)
    oracle, optimizer = pair([np.ones_like(values)])
    theirs = cupy.cuda.Stream(non_blocking=True)
    other = cupy.cuda.Stream(non_blocking=True)
    source = cupy.asarray(values)
    cupy.cuda.runtime.deviceSynchronize()
    for stream in (None, other):
        optimizer.stream = stream
        gradient = cupy.zeros_like(source)
        cupy.cuda.runtime.deviceSynchronize()
        busy(cupy, theirs)
        with theirs:
            gradient[...] = source  # not there yet when the step is asked for
            optimizer.step([gradient])
            gradient[...] = np.nan  # and gone soon, but not before it has been read
        oracle.step([values])
        optimizer.synchronize()
        assert_same_state(optimizer, oracle)


@pytest.mark.parametrize(
    "options",
    [{}, {"clip_norm": 1.0, "global_clip_norm": 1.0}, {"nonfinite": "skip", "bias_correction": True}],
    ids=lambda options: "-".join(options) or "default",
)
def test_a_steady_step_does_not_wait_for_the_device(options, cuda, cupy, rng):
    stream = cupy.cuda.Stream(non_blocking=True)
    params = [np.ones((30, 4), np.float32), np.ones(50)]
    optimizer = RMSProp(params, kernel="cuda", stream=stream, **options)
    with stream:
        gradients = [cupy.asarray(p) for p in params]
    for _ in range(3):
        optimizer.step(gradients)
    optimizer.synchronize()
    busy(cupy, stream, 1.0)
    begin = time.perf_counter()
    for _ in range(10):
        optimizer.step(gradients)
    assert not stream.done, "the steps were taken after all that was asked of the stream before"
    asked = time.perf_counter() - begin
    optimizer.synchronize()
    print(f"ten steps were asked for in {1e3 * asked:.2f} ms")
    assert optimizer.steps == 13


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0, "bias_correction": True}], ids=str)
def test_one_parameter_at_a_time_does_not_wait_for_the_device(options, cuda, cupy, rng):
    stream = cupy.cuda.Stream(non_blocking=True)
    params = [np.ones((30, 4), np.float32), np.ones(50)]
    optimizer = RMSProp(params, kernel="cuda", stream=stream, **options)
    with stream:
        first, second = (cupy.asarray(p) for p in params)
    rows = [3, 0, 3]

    def step():
        optimizer.step_rows(0, rows, first[:3])
        optimizer.step_parameter(1, second)

    for _ in range(20):  # the first ones allocate pinned memory
        step()
    optimizer.synchronize()
    busy(cupy, stream, 1.0)
    for _ in range(5):
        step()
    assert not stream.done, "the steps were taken after all that was asked of the stream before"
    optimizer.synchronize()
    assert optimizer.steps == 25


def test_the_stream_of_who_made_the_gradient_of_one_parameter_is_waited_for(cupy, rng):
    values = rng.standard_normal((1000, 1000)).astype(np.float32)
    oracle, optimizer = pair([np.ones_like(values)])
    theirs = cupy.cuda.Stream(non_blocking=True)
    source, rows = cupy.asarray(values), rng.integers(0, 1000, 1000)
    for step in (lambda opt, g: opt.step_parameter(0, g), lambda opt, g: opt.step_rows(0, rows, g)):
        gradient = cupy.zeros_like(source)
        cupy.cuda.runtime.deviceSynchronize()
        busy(cupy, theirs)
        with theirs:
            gradient[...] = source  # not there yet when the update is asked for
            step(optimizer, gradient)
            gradient[...] = np.nan  # and gone soon, but not before it has been read
        step(oracle, values)
        optimizer.synchronize()
        assert_same_state(optimizer, oracle)


def test_numpy_gradients_do_not_overtake_one_another(cuda, rng):
    oracle, optimizer = pair([np.ones(3_000_000, np.float32)])
    gradient = np.zeros(3_000_000, np.float32)
    for t in range(30):
        gradient[...] = np.float32(t - 11.5)  # the same memory, written again as soon as the step has returned
        oracle.step([gradient])
        optimizer.step([gradient])
    assert_same_state(optimizer, oracle)


def test_addresses_do_not_overtake_one_another(cuda, rng):
    oracle, optimizer = pair([np.ones(5, np.float32), np.ones(6, np.float32)])
    values = [[np.full(5, t + 0.5, np.float32), np.full(6, -t - 0.5, np.float32)] for t in range(100)]
    there = [[cuda.to_device(g) for g in gradients] for gradients in values]
    for gradients, given in zip(values, there, strict=True):
        oracle.step(gradients)
        optimizer.step(given)
    assert_same_state(optimizer, oracle)
