"""The errors that fastrms raises for bad input.

Each is also the builtin exception that a NumPy user would expect (`ValueError` or `TypeError`), so code that
catches those keeps working. Every message names the argument, what was expected and what came.
"""

__all__ = ["DtypeError", "FastrmsError", "OptionError", "OptionTypeError", "StructureError"]


class FastrmsError(Exception):
    """Base class of all errors that fastrms raises on purpose."""


class OptionError(FastrmsError, ValueError):
    """A hyper-parameter or another option has a value outside its range, or its name is unknown."""


class OptionTypeError(FastrmsError, TypeError):
    """A hyper-parameter or another option is of the wrong kind, such as a string where a number belongs."""


class DtypeError(FastrmsError, TypeError):
    """An array has a dtype, or is of a kind, that cannot be used where it was given."""


class StructureError(FastrmsError, ValueError):
    """Arrays do not fit together: wrong count, key, shape or nesting, nothing given, or memory that overlaps."""
