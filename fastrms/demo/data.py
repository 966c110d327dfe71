"""The demo's data: scikit-learn's digits or a file of the user's, checked, split and standardised."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastrms.demo.mlp import Array, Labels
from fastrms.errors import FastrmsError

__all__ = ["DataError", "Dataset", "load_digits", "load_file", "split"]

TEST_SHARE = 0.2
# With fewer rows, a fifth is less than one.
MIN_ROWS = 5


class DataError(FastrmsError, ValueError):
    """A file cannot be read, or nothing can be trained on its arrays."""


@dataclass(frozen=True)
class Dataset:
    """Rows to train on and rows to test with; labels are classes counted from 0."""

    train_x: Array  # (rows, features)
    train_y: Labels  # (rows,)
    test_x: Array
    test_y: Labels
    classes: int


def load_digits() -> tuple[Array, Labels]:
    """Return the UCI handwritten digits of scikit-learn: 1797 rows of 64 features, and the digit of each."""
    from sklearn import datasets

    # Its types also allow arrays of pandas, which only other arguments return.
    x, y = cast("tuple[Array, Labels]", datasets.load_digits(return_X_y=True))
    return x, y.astype(np.intp)


def load_file(path: Path) -> tuple[Array, Labels]:
    """Read the arrays X and y of an .npz file, check them, and number the classes 0, 1, ... in sorted order.

    X has shape (rows, features), y shape (rows,). Raise DataError, which names the file, if it cannot be read or
    nothing can be trained on its arrays.
    """
    try:
        with path.open("rb") as stream:  # numpy.load leaves a damaged archive open
            arrays = _read(stream)
        return _check_x(arrays["X"]), _check_y(arrays["y"], len(arrays["X"]))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def split(x: Array, y: Labels, dtype: DTypeLike, seed: int, name: str) -> Dataset:
    """Keep a fifth of the rows for the test, and standardise all by mean and deviation of the training rows.

    A feature that is constant in the training rows becomes 0 in all rows. Raise DataError, which begins with `name`, if
    the deviation of a feature overflows or underflows, or a scaled row overflows.
    """
    from sklearn.model_selection import train_test_split

    parts = train_test_split(x, y, test_size=TEST_SHARE, random_state=seed)
    train_x, test_x, train_y, test_y = map(np.asarray, parts)
    # A comparison, because the mean of equal numbers can be one rounding off, and the deviation above 0.
    varies = train_x.min(axis=0) < train_x.max(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        mean, deviation = train_x.mean(axis=0), train_x.std(axis=0)
        if (wrong := varies & ~(np.isfinite(deviation) & (deviation > 0))).any():
            column = np.flatnonzero(wrong)[0]
            raise DataError(
                f"{name}: X: column {column}: expected numbers with a standard deviation that float64 can hold, "
                f"got values from {train_x[:, column].min():g} to {train_x[:, column].max():g}"
            )
        deviation[~varies] = 1
        scaled = [np.where(varies, (part - mean) / deviation, 0).astype(dtype) for part in (train_x, test_x)]
    if not np.isfinite(scaled[1]).all():
        raise DataError(
            f"{name}: X: expected rows that {np.dtype(dtype)} can hold after scaling, got a value out of range"
        )
    return Dataset(scaled[0], train_y, scaled[1], test_y, int(y.max()) + 1)


def _read(stream: BinaryIO) -> dict[str, NDArray[Any]]:
    """Return the arrays X and y of an .npz file; raise OSError or DataError."""
    expected = "expected an .npz file with the arrays X and y, as numpy.savez writes it"
    arrays: dict[str, NDArray[Any]] = {}
    failure = f"{expected}; got something else or a damaged file"
    try:
        file = np.load(stream, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise DataError(f"{expected}; got an .npy file with one array of shape {file.shape}")
        with file:
            for name in ("X", "y"):
                if name not in file.files:
                    found = ", ".join(file.files) or "nothing"
                    raise DataError(f"{expected}; there is no {name} in it, only: {found}")
                kind = "an array of numbers or strings, without pickled objects"
                failure = f"{name}: expected {kind}; cannot be read"
                arrays[name] = file[name]
                if not isinstance(arrays[name], np.ndarray):  # bytes, for a member that is no .npy file
                    raise DataError(f"{expected}; {name} is no array")
    except (OSError, DataError):
        raise
    except Exception as error:  # NumPy and zipfile raise many kinds for a damaged or hostile file
        text = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{failure} ({text})") from None
    return arrays


def _check_x(x: NDArray[Any]) -> Array:
    """Return the features as float64; raise DataError."""
    if x.ndim != 2:
        raise DataError(f"X: expected 2 dimensions (rows, features), got shape {x.shape}")
    if x.dtype.kind not in "biuf":
        raise DataError(f"X: expected real numbers, got dtype {x.dtype}")
    if len(x) < MIN_ROWS:
        raise DataError(f"X: expected at least {MIN_ROWS} rows, got shape {x.shape}")
    if x.shape[1] == 0:
        raise DataError(f"X: expected at least 1 feature, got shape {x.shape}")
    with np.errstate(over="ignore"):  # longdouble
        x = x.astype(np.float64)
    if not (finite := np.isfinite(x)).all():
        row, column = np.argwhere(~finite)[0]
        raise DataError(f"X: expected finite numbers, got {x[row, column]} in row {row}, column {column}")
    return x


def _check_y(y: NDArray[Any], rows: int) -> Labels:
    """Return the labels as the numbers of their classes; raise DataError."""
    if y.ndim != 1:
        hint = "; for one-hot rows store y.argmax(axis=1), for a column y.ravel()" if y.ndim == 2 else ""
        raise DataError(f"y: expected 1 dimension, a label for each row, got shape {y.shape}{hint}")
    if len(y) != rows:
        raise DataError(f"y: expected {rows} labels, one for each row of X, got {len(y)}")
    if y.dtype.kind not in "biufUS":
        raise DataError(f"y: expected labels (integers, strings or bools), got dtype {y.dtype}")
    # NaN differs from its rounding; inf does not.
    if y.dtype.kind == "f" and (wrong := (y != np.rint(y)) | np.isinf(y)).any():
        row = np.flatnonzero(wrong)[0]
        raise DataError(f"y: expected classes, as whole numbers or strings, got {y[row]} in row {row}")
    classes, numbers = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise DataError(f"y: expected at least 2 classes, got {classes[0].item()!r} in every row")
    if 2 * len(classes) > len(y):
        raise DataError(
            f"y: expected classes, with at least 2 rows each on average, got {len(classes)} different values "
            f"in {len(y)} rows"
        )
    return numbers.astype(np.intp)
