"""Arrays of other libraries: read where they lie, copied once, or refused with an error that says what to do."""

import ctypes
import gc
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import Exchanged, assert_same_bits, everything

from fastrms import DtypeError, FlatBuffer, RMSProp
from fastrms.buffers.bfloat16 import bits_of, from_bfloat16, to_bfloat16
from fastrms.buffers.conversion import as_array

F32 = np.dtype(np.float32)


class Old(Exchanged):
    """As libraries had it before DLPack 1.0."""

    def __dlpack__(self, *, stream=None):
        return self.array.__dlpack__(stream=stream)


class BFloat16(Exchanged):
    """An array of uint16 that says it has bfloat16."""

    code = 4  # kDLBfloat
    place = 1  # kDLCPU

    def __dlpack__(self, **options):
        capsule = self.array.__dlpack__()
        pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
        address = pointer_of(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, b"dltensor")
        ctypes.c_int32.from_address(address + 8).value = self.place
        ctypes.c_uint8.from_address(address + 20).value = self.code
        return capsule


@pytest.mark.parametrize("kind", [Exchanged, Old])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
def test_what_speaks_dlpack_is_shown_and_not_copied(kind, dtype):
    given = np.arange(6, dtype=dtype).reshape(2, 3)
    for array in (given, given.T, given[:, ::2], given[1, 1:1]):
        view = as_array(kind(array), "x", F32)
        np.testing.assert_array_equal(view, array, strict=True)
        assert view.size == 0 or np.shares_memory(view, array)


@pytest.mark.parametrize("kernel", ["numpy", "serial"])
def test_a_step_takes_what_speaks_dlpack(kernel, rng):
    shapes = [(3, 4), (), (600,), (0, 2)]
    start = [rng.standard_normal(shape) for shape in shapes]
    opt, other = (
        RMSProp([Exchanged(np.asarray(array)) for array in start], kernel=kernel),
        RMSProp(start, kernel=kernel),
    )
    for dtype in (np.float64, np.float32, np.int8):
        gradients = [np.asarray(10 * rng.standard_normal(shape)).astype(dtype) for shape in shapes]
        opt.step([Exchanged(array) if k != 2 else array for k, array in enumerate(gradients)])
        other.step(gradients)
        assert everything(opt) == everything(other)


@pytest.mark.parametrize("array", ["dense", "strided", "transposed", "0-d", "empty"])
def test_bfloat16_is_read_without_ml_dtypes(array, monkeypatch, rng):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    bits = to_bfloat16(rng.standard_normal((4, 6)))
    bits = {
        "dense": bits, "strided": bits[:, ::-2], "transposed": bits.T, "0-d": np.array(bits[1, 1]), "empty": bits[:, :0]
    }[array]  # fmt: skip
    shown = bits_of(BFloat16(bits))
    np.testing.assert_array_equal(shown, bits, strict=True)
    assert shown.size == 0 or np.shares_memory(shown, bits)
    assert not shown.flags.writeable
    for target in (F32, np.dtype(np.float64)):
        assert_same_bits(as_array(BFloat16(bits), "x", target), from_bfloat16(bits))
        buffer = FlatBuffer([np.zeros(bits.shape, target)])
        buffer.gather([BFloat16(bits)])
        assert_same_bits(buffer.views[0], from_bfloat16(bits).astype(target))


def test_a_view_of_bfloat16_holds_its_memory():
    released = []

    class Owner(np.ndarray):
        def __del__(self):
            released.append(True)

    bits = to_bfloat16(np.arange(1000.0)).view(Owner)
    shown = bits_of(BFloat16(bits))[10:]
    del bits
    gc.collect()
    assert not released
    assert from_bfloat16(shown)[:3].tolist() == [10, 11, 12]
    del shown
    gc.collect()
    assert released


def test_bfloat16_goes_where_float32_goes_and_is_no_dtype_of_parameters():
    given = BFloat16(to_bfloat16(np.ones(2)))
    with pytest.raises(DtypeError, match=r"^params\[0\]: expected an array with a NumPy dtype, got bfloat16; conv"):
        RMSProp([given])
    with pytest.raises(DtypeError, match=r"^arrays\[0\]: expected a dtype that can be cast to int64 .*, got float32$"):
        FlatBuffer([np.zeros(2, int)]).gather([given])


def test_other_dtypes_of_dlpack_are_refused():
    given = BFloat16(np.ones(2, np.uint16))
    given.code = 3  # an opaque handle
    assert bits_of(given) is None
    with pytest.raises(DtypeError, match=r"^params\[0\]: expected an array, got BFloat16 object: "):
        RMSProp([given])


@pytest.mark.parametrize(
    ("device", "name"), [((2, 1), "cuda:1"), ((8, 0), "metal:0"), ((10, 3), "rocm:3"), ((99, 2), "device type 99:2")]
)
def test_an_array_elsewhere_is_refused_by_the_name_of_its_device(device, name):
    given = BFloat16(np.ones(2, np.uint16), device)
    given.place = device[0]
    opt = RMSProp([np.ones(2)])
    before = everything(opt)
    with pytest.raises(
        DtypeError, match=rf"^gradients\[0\]: expected an array on the host, got BFloat16 object on {name}; copy it to "
    ):
        opt.step([given])
    assert bits_of(given) is None
    assert everything(opt) == before


def of_jax():
    import jax.numpy as jnp

    start = [np.ones(2, np.float32), np.ones((2, 300), np.float32)]
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8):
        opt, other = RMSProp(start), RMSProp(start)
        gradients = [jnp.array([1.5, 2], dtype), jnp.arange(600).reshape(2, 300).astype(dtype)]
        opt.step(gradients)
        other.step([np.asarray(gradient).astype(np.float32) for gradient in gradients])
        assert everything(opt) == everything(other)
    array = jnp.arange(6, dtype=jnp.float32)
    view = as_array(array, "x", F32)
    assert view.__array_interface__["data"][0] == array.unsafe_buffer_pointer()
    assert_same_bits(as_array(Exchanged(jnp.arange(6, dtype=jnp.bfloat16)), "x", F32), np.arange(6, dtype=np.float32))


def test_arrays_of_jax():
    pytest.importorskip("jax")
    # In a process of its own: where JAX was imported, each later fork warns.
    program = "import test_conversion; test_conversion.of_jax()"
    paths = [os.path.dirname(__file__), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.torch
@pytest.mark.parametrize(
    "kind",
    ["plain", "0-d", "strided", "expanded", "negative", "double", "half", "bfloat16", "bfloat16 negative", "int"],
)
def test_tensors_of_torch(kind):
    import torch

    base = torch.linspace(-3, 3, 12).reshape(3, 4)
    tensor = {
        "plain": lambda: base,
        "0-d": lambda: base[1, 1],
        "strided": lambda: base.T[:, ::2],
        "expanded": lambda: base[:, :1].expand(3, 4),
        "negative": lambda: torch.complex(base, base).conj().imag,
        "double": base.double,
        "half": base.half,
        "bfloat16": lambda: base.T.to(torch.bfloat16),
        "bfloat16 negative": lambda: torch._neg_view(base.to(torch.bfloat16)),
        "int": base.int,
    }[kind]()
    assert (kind in ("negative", "bfloat16 negative")) == tensor.is_neg()
    expected = tensor.resolve_neg().float().numpy()
    array = as_array(tensor, "x", F32)
    assert_same_bits(array.astype(np.float32), expected)
    if kind in ("plain", "0-d", "strided", "expanded", "double", "half", "int"):
        assert array.__array_interface__["data"][0] == tensor.data_ptr()
    opt, other = RMSProp([np.ones(tensor.shape, np.float32)]), RMSProp([np.ones(tensor.shape, np.float32)])
    opt.step([tensor])
    other.step([expected])
    assert everything(opt) == everything(other)


@pytest.mark.torch
def test_tensors_of_torch_that_are_refused():
    import torch

    base = torch.ones(2, 2)
    refused = {
        r"got Tensor object: .*requires grad. Use tensor.detach\(\)": base.clone().requires_grad_(),
        r"got Parameter object: .*requires grad. Use tensor.detach\(\)": torch.nn.Parameter(base.bfloat16()),
        r"got Tensor object: .*sparse.*to_dense\(\)": base.to_sparse(),
        r"got Tensor object: .*meta": base.to("meta"),
        r"got Tensor object: .*conjugate bit set. Use tensor.resolve_conj\(\)": torch.complex(base, base).conj(),
        r"a dtype that can be cast to float32 .*, got complex64": torch.complex(base, base),
        r"a dtype that can be cast to float32 .*, got bool": base > 0,
    }
    opt = RMSProp([np.ones((2, 2), np.float32)])
    before = everything(opt)
    for message, tensor in refused.items():
        with pytest.raises(DtypeError, match=r"(?i)^gradients\[0\]: expected .*" + message):
            opt.step([tensor])
    assert everything(opt) == before


@pytest.mark.torch
def test_parameters_can_be_tensors_of_torch():
    import torch

    tensors = [torch.arange(6.0).reshape(2, 3).T, torch.ones(2, dtype=torch.float64)]
    opt = RMSProp(tensors)
    assert [view.dtype for view in opt.params] == [np.float32, np.float64]
    assert_same_bits(opt.params[0], tensors[0].numpy())
    for kind, message in (
        (torch.bfloat16, "a NumPy dtype, got bfloat16"),
        (torch.float16, "float32 or float64, got float1"),
    ):
        with pytest.raises(DtypeError, match=rf"^params\[1\]: expected .*{message}"):
            RMSProp([tensors[0], tensors[1].to(kind)])
