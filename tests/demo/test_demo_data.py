"""The data of the demo: the split, files that can be used, and files that cannot."""

import io
import zipfile

import numpy as np
import pytest
from helpers import bits
from sklearn.model_selection import train_test_split

from fastrms.cli import main
from fastrms.demo import data

TINY = ["--hidden", "4", "--epochs", "1", "--batch-size", "512"]


def run(tmp_path, *arguments):
    return main(["demo", *TINY, "--output", str(tmp_path), *arguments])


def test_split_and_scale(rng):
    x = rng.normal(3, 5, (50, 4))
    x[:, 1] = 0.1  # whose mean over 40 rows is not exactly 0.1
    y = np.arange(50) % 3
    parts = data.split(x, y, "float32", 0, "data")
    assert parts.train_x.shape == (40, 4)
    assert parts.test_x.shape == (10, 4)
    assert parts.classes == 3
    assert parts.train_x.dtype == parts.test_x.dtype == np.float32
    assert np.abs(parts.train_x.mean(axis=0)).max() < 1e-6
    np.testing.assert_allclose(parts.train_x.std(axis=0), [1, 0, 1, 1], rtol=1e-6)
    assert not parts.train_x[:, 1].any()
    assert not parts.test_x[:, 1].any()
    # The test rows are scaled by what the others have, not by their own mean and deviation.
    assert np.abs(parts.test_x.mean(axis=0)[[0, 2, 3]]).min() > 1e-3
    again = data.split(x, y, "float32", 0, "data")
    other = data.split(x, y, "float32", 1, "data")
    assert bits(again.train_x) == bits(parts.train_x) != bits(other.train_x)


@pytest.fixture
def good(rng):
    """A file's arrays that can be trained on: two well separated classes."""
    y = np.arange(40) % 2
    return {"X": rng.normal(size=(40, 3)) + 6 * y[:, None], "y": y}


@pytest.mark.parametrize(
    "labels", [("cat", "dog"), (b"a", b"b"), (False, True), (7, 3), (-1.0, 1.0), (np.uint8(0), np.uint8(255))]
)
def test_labels_of_any_kind(tmp_path, good, labels):
    y = np.array(labels)[good["y"]]
    np.savez(tmp_path / "own.npz", X=good["X"], y=y)
    x, numbers = data.load_file(tmp_path / "own.npz")
    assert x.dtype == np.float64
    assert (numbers == (y == max(labels))).all()


def test_two_rows_for_each_class_are_enough(tmp_path, rng):
    np.savez(tmp_path / "own.npz", X=rng.normal(size=(6, 3)), y=np.array([5, 3, 4, 3, 4, 5]))
    _, numbers = data.load_file(tmp_path / "own.npz")
    assert numbers.tolist() == [2, 0, 1, 0, 1, 2]


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint64", "float16", "float32", "longdouble", ">f8"])
def test_features_of_any_real_dtype(capsys, tmp_path, good, dtype):
    np.savez_compressed(tmp_path / "own.npz", X=good["X"].clip(0).astype(dtype), y=good["y"])
    arguments = ["--data", str(tmp_path / "own.npz"), "--batch-size", "7"]
    assert run(tmp_path, *arguments) == 0
    out = capsys.readouterr().out
    assert "own.npz; 32 rows to train, 8 to test, 2 classes" in out
    assert "Network: 3-4-2, 26 parameters" in out
    assert "1 epoch of 5 steps, 7 rows a batch" in out


def changed(good, **arrays):
    return {name: array for name, array in (good | arrays).items() if array is not None}


def with_value(array, value):
    array = array.astype(float)
    array[3, 1] = value
    return array


BAD_ARRAYS = {
    "no X": (lambda g: changed(g, X=None), "there is no X in it, only: y"),
    "no y": (lambda g: changed(g, y=None, labels=g["y"]), "there is no y in it, only: X, labels"),
    "nothing": (lambda g: {}, "there is no X in it, only: nothing"),
    "pickled X": (lambda g: changed(g, X=g["X"].astype(object)), "X: expected an array of numbers or strings"),
    "pickled y": (lambda g: changed(g, y=g["y"].astype(object)), "y: expected an array of numbers or strings"),
    "flat X": (lambda g: changed(g, X=g["X"][:, 0]), "X: expected 2 dimensions (rows, features), got shape (40,)"),
    "images": (lambda g: changed(g, X=g["X"][..., None]), "X: expected 2 dimensions"),
    "complex X": (lambda g: changed(g, X=g["X"] + 1j), "X: expected real numbers, got dtype complex128"),
    "text X": (lambda g: changed(g, X=g["X"].astype(str)), "X: expected real numbers, got dtype <U"),
    "NaN": (lambda g: changed(g, X=with_value(g["X"], np.nan)), "X: expected finite numbers, got nan in row 3, column"),
    "inf": (lambda g: changed(g, X=with_value(g["X"], -np.inf)), "X: expected finite numbers, got -inf in row 3"),
    "huge": (lambda g: changed(g, X=g["X"] * 1e300), "X: column 0: expected numbers with a standard deviation"),
    "minute": (lambda g: changed(g, X=g["X"] * 1e-300), "X: column 0: expected numbers with a standard deviation"),
    "empty": (lambda g: {"X": np.zeros((0, 3)), "y": np.zeros(0, int)}, "X: expected at least 5 rows, got shape (0,"),
    "few rows": (lambda g: {"X": g["X"][:4], "y": g["y"][:4]}, "X: expected at least 5 rows, got shape (4, 3)"),
    "no feature": (lambda g: changed(g, X=g["X"][:, :0]), "X: expected at least 1 feature, got shape (40, 0)"),
    "short y": (lambda g: changed(g, y=g["y"][1:]), "y: expected 40 labels, one for each row of X, got 39"),
    "column y": (lambda g: changed(g, y=g["y"][:, None]), "got shape (40, 1); for one-hot rows store y.argmax(axis=1)"),
    "scalar y": (lambda g: changed(g, y=np.array(3)), "y: expected 1 dimension, a label for each row, got shape ()"),
    "real y": (lambda g: changed(g, y=g["y"] + 0.5), "y: expected classes, as whole numbers or strings, got 0.5"),
    "NaN in y": (lambda g: changed(g, y=np.where(g["y"], 1, np.nan)), "y: expected classes, as whole numbers"),
    "inf in y": (lambda g: changed(g, y=np.where(g["y"], 1, np.inf)), "y: expected classes, as whole numbers"),
    "complex y": (lambda g: changed(g, y=g["y"] * 1j), "y: expected labels (integers, strings or bools), got"),
    "dates": (lambda g: changed(g, y=g["y"].astype("M8[D]")), "y: expected labels"),
    "one class": (lambda g: changed(g, y=g["y"] * 0 + 7), "y: expected at least 2 classes, got 7 in every row"),
    "many classes": (lambda g: changed(g, y=np.arange(40)), "got 40 different values in 40 rows"),
}  # fmt: skip


def refuse(capsys, tmp_path, path):
    assert run(tmp_path / "new", "--data", str(path)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"fastrms demo: error: {path}: ")
    assert not (tmp_path / "new").exists()
    return err


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_nothing_can_be_trained_on(capsys, tmp_path, good, case):
    make, expected = BAD_ARRAYS[case]
    np.savez(tmp_path / "bad.npz", **make(good))
    assert expected in refuse(capsys, tmp_path, tmp_path / "bad.npz")


def test_a_test_row_that_float32_cannot_hold(capsys, tmp_path, good):
    _, test_rows = train_test_split(np.arange(40), test_size=0.2, random_state=0)
    x = good["X"] * 1e-30
    x[test_rows[0], 0] = 1e30
    np.savez(tmp_path / "bad.npz", X=x, y=good["y"])
    assert "X: expected rows that float32 can hold" in refuse(capsys, tmp_path, tmp_path / "bad.npz")


def zipped(name, content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def claiming(shape):
    """The bytes of an array that says that it has this shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(64)


WHOLE = npz(X=np.ones((9, 2)), y=np.arange(9))
BAD_FILES = {
    "empty": (b"", "expected an .npz file with the arrays X and y"),
    "text": (b"1,2,3\n4,5,6\n", "expected an .npz file with the arrays X and y"),
    "npy": (npy(np.ones((3, 2))), "got an .npy file with one array of shape (3, 2)"),
    "pickled npy": (npy(np.array([{}]), allow_pickle=True), "expected an .npz file with the arrays X and y"),
    "cut short": (WHOLE[:200], "expected an .npz file with the arrays X and y"),
    "flipped bits": (WHOLE.replace(np.ones(2).tobytes(), np.full(2, 2.0).tobytes(), 1), "X: expected an array"),
    "no array": (zipped("X", b"text"), "X is no array"),
    "more rows than there are numbers": (zipped("X.npy", claiming((10**25, 2))), "X: expected an array of numbers"),
    "more rows than fit into memory": (zipped("X.npy", claiming((10**12, 1000))), "X: expected an array of numbers"),
    "rows below 0": (zipped("X.npy", claiming((-5, 2))), "X: expected an array of numbers"),
    "damaged array": (zipped("X.npy", b"\x93NUMPY\x01\x00text"), "X: expected an array of numbers"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_of_another_kind(capsys, tmp_path, case):
    content, expected = BAD_FILES[case]
    (tmp_path / "bad.npz").write_bytes(content)
    assert expected in refuse(capsys, tmp_path, tmp_path / "bad.npz")


def test_files_that_cannot_be_read(capsys, tmp_path):
    assert "cannot be read: No such file" in refuse(capsys, tmp_path, tmp_path / "none.npz")
    assert "cannot be read: " in refuse(capsys, tmp_path, tmp_path)
