"""RMSProp for people who train with plain NumPy: one flat buffer, one compiled pass, the reference's bits."""

from fastrms.buffers import FlatBuffer, Layout
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
from fastrms.kernels.reference import from_bfloat16
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
