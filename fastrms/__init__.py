"""RMSProp for training in plain NumPy: one flat buffer, one compiled pass, the bits of the NumPy reference."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastrms.buffers import FlatBuffer, Layout
    from fastrms.buffers.bfloat16 import from_bfloat16
    from fastrms.dialects import dialect
    from fastrms.errors import (
        CheckpointError,
        DeviceError,
        DtypeError,
        FastrmsError,
        NonfiniteError,
        OptionError,
        OptionTypeError,
        RankError,
        StepInProgressError,
        StorageError,
        StructureError,
    )
    from fastrms.functional import rmsprop_update, warmup
    from fastrms.optimizer import RMSProp
    from fastrms.options import ParamGroup

__all__ = [
    "CheckpointError",
    "DeviceError",
    "DtypeError",
    "FastrmsError",
    "FlatBuffer",
    "Layout",
    "NonfiniteError",
    "OptionError",
    "OptionTypeError",
    "ParamGroup",
    "RMSProp",
    "RankError",
    "StepInProgressError",
    "StorageError",
    "StructureError",
    "dialect",
    "from_bfloat16",
    "rmsprop_update",
    "warmup",
]

__version__ = "0.1.0"

_MODULES = ("buffers", "buffers.bfloat16", "dialects", "errors", "functional", "optimizer", "options")


def __getattr__(name: str) -> Any:
    """Import all of it at the first use of a public name.

    Importing Numba takes most of a second. The command line imports this package first of all, and has to answer
    Ctrl-C and wrong settings of Numba in that time.
    """
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in [import_module(f"{__name__}.{each}") for each in _MODULES]:
        globals().update({public: getattr(module, public) for public in module.__all__ if public in __all__})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
