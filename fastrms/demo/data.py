"""Data for the demo: the digits of scikit-learn or the user's own file, split, standardised and checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastrms.cli.common import CommandError, one_line

__all__ = ["Dataset", "load_digits", "load_file", "split"]

Array = NDArray[Any]

TEST_SHARE = 0.2
# With fewer, a fifth of the rows is less than one.
MIN_ROWS = 5


@dataclass(frozen=True)
class Dataset:
    """Rows to train on and rows to test with; labels are classes counted from 0."""

    train_x: Array  # (rows, features)
    train_y: NDArray[np.intp]  # (rows,)
    test_x: Array
    test_y: NDArray[np.intp]
    classes: int


def load_digits() -> tuple[Array, NDArray[np.intp]]:
    """The UCI handwritten digits: 1797 rows of 64 features, and the digit of each. Comes with scikit-learn."""
    from sklearn import datasets

    x, y = datasets.load_digits(return_X_y=True)
    return x, y.astype(np.intp)


def load_file(path: Path) -> tuple[Array, NDArray[np.intp]]:
    """Read the arrays X and y of an .npz file, check them, and number the classes.

    Returns
    -------
    x : ndarray of float64, shape (rows, features)
    y : ndarray of int, shape (rows,)
        Labels of any kind become 0, 1, ... in sorted order.

    Raises
    ------
    CommandError
        Not readable, no .npz file, or arrays that nothing can be trained on. Names the file.
    """
    arrays = _read(path)
    x = _check_x(path, arrays["X"])
    labels = _check_y(path, arrays["y"], len(x))
    classes, y = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise CommandError(f"{path}: y: expected at least 2 classes, got {classes[0].item()!r} in every row")
    if 2 * len(classes) > len(y):
        raise CommandError(
            f"{path}: y: expected classes, with at least 2 rows each on average, got {len(classes)} different values "
            f"in {len(y)} rows"
        )
    return x, y.astype(np.intp)


def split(x: Array, y: NDArray[np.intp], dtype: DTypeLike, seed: int, name: str) -> Dataset:
    """Keep a fifth of the rows for the test, and standardise by mean and deviation of the others.

    A feature that is the same in all rows to train on says nothing, and is 0 everywhere.

    Raises
    ------
    CommandError
        Features so large or small that float64 cannot hold their deviation; says that it is about `name`.
    """
    from sklearn.model_selection import train_test_split

    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=TEST_SHARE, random_state=seed)
    # By comparing, not by deviation: the mean of equal numbers can be one rounding off, and the deviation above 0.
    varies = train_x.min(axis=0) < train_x.max(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        mean, deviation = train_x.mean(axis=0), train_x.std(axis=0)
        if (wrong := varies & ~(np.isfinite(deviation) & (deviation > 0))).any():
            column = np.flatnonzero(wrong)[0]
            raise CommandError(
                f"{name}: X: column {column}: expected numbers with a standard deviation that float64 can hold, "
                f"got values from {train_x[:, column].min():g} to {train_x[:, column].max():g}"
            )
        deviation[~varies] = 1
        scaled = [np.where(varies, (part - mean) / deviation, 0).astype(dtype) for part in (train_x, test_x)]
    if not np.isfinite(scaled[1]).all():
        raise CommandError(
            f"{name}: X: expected rows that {np.dtype(dtype)} can hold after scaling, got one too far off"
        )
    return Dataset(scaled[0], train_y, scaled[1], test_y, int(y.max()) + 1)


def _read(path: Path) -> dict[str, Array]:
    try:
        # Opened here, because numpy.load leaves a damaged archive open.
        with path.open("rb") as stream:
            return _read_stream(path, stream)
    except OSError as error:
        raise CommandError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read_stream(path: Path, stream: BinaryIO) -> dict[str, Array]:
    expected = f"{path}: expected an .npz file with the arrays X and y, as numpy.savez writes it"
    try:
        file = np.load(stream, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:
        raise CommandError(f"{expected}; got something else or a damaged file ({one_line(error)})") from None
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise CommandError(f"{expected}; got an .npy file with one array of shape {file.shape}")
    arrays: dict[str, Array] = {}
    with file:
        for name in ("X", "y"):
            if name not in file.files:
                found = ", ".join(file.files) or "nothing"
                raise CommandError(f"{expected}; there is no {name} in it, only: {found}")
            try:
                arrays[name] = file[name]
            except OSError:
                raise
            except Exception as error:  # whatever NumPy and zipfile raise for a damaged or hostile file
                what = "an array of numbers or strings, without pickled objects"
                raise CommandError(f"{path}: {name}: expected {what}; cannot be read ({one_line(error)})") from None
            if not isinstance(arrays[name], np.ndarray):  # a file in the archive that is no .npy comes as bytes
                raise CommandError(f"{expected}; {name} is no array")
    return arrays


def _check_x(path: Path, x: Array) -> Array:
    if x.ndim != 2:
        raise CommandError(f"{path}: X: expected 2 dimensions (rows, features), got shape {x.shape}")
    if x.dtype.kind not in "biuf":
        raise CommandError(f"{path}: X: expected real numbers, got dtype {x.dtype}")
    if len(x) < MIN_ROWS:
        raise CommandError(f"{path}: X: expected at least {MIN_ROWS} rows, got shape {x.shape}")
    if x.shape[1] == 0:
        raise CommandError(f"{path}: X: expected at least 1 feature, got shape {x.shape}")
    with np.errstate(over="ignore"):  # longdouble
        x = x.astype(np.float64)
    if not (finite := np.isfinite(x)).all():
        row, column = np.argwhere(~finite)[0]
        raise CommandError(f"{path}: X: expected finite numbers, got {x[row, column]} in row {row}, column {column}")
    return x


def _check_y(path: Path, y: Array, rows: int) -> Array:
    if y.ndim != 1:
        hint = "; for one-hot rows store y.argmax(axis=1), for a column y.ravel()" if y.ndim == 2 else ""
        raise CommandError(f"{path}: y: expected 1 dimension, a label for each row, got shape {y.shape}{hint}")
    if len(y) != rows:
        raise CommandError(f"{path}: y: expected {rows} labels, one for each row of X, got {len(y)}")
    if y.dtype.kind not in "biufUS":
        raise CommandError(f"{path}: y: expected labels (integers, strings or bools), got dtype {y.dtype}")
    # `not equal` also where the label is NaN; inf is its own rounding, and no class either.
    if y.dtype.kind == "f" and (wrong := (y != np.rint(y)) | np.isinf(y)).any():
        row = np.flatnonzero(wrong)[0]
        raise CommandError(f"{path}: y: expected classes, as whole numbers or strings, got {y[row]} in row {row}")
    return y
