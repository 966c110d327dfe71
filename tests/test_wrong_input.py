"""Every row of the tables in docs/wrong-input.md: what it says is raised, and nothing has changed."""

import re
import warnings
from pathlib import Path

import pytest
from helpers import BLOCK, everything

import fastrms

TEXT = (Path(__file__).parent.parent / "docs" / "wrong-input.md").read_text(encoding="utf-8")
# what it is | `code` | `error`
ROW = re.compile(r"^\| (.+?) \| `(.+)` \| `(\w+): (.+)` \|$", re.MULTILINE)
ROWS = ROW.findall(TEXT)


@pytest.mark.parametrize(("what", "code", "error", "message"), ROWS, ids=[f"{row[0]}: {row[1]}" for row in ROWS])
def test_what_is_said_of(what, code, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(BLOCK.search(TEXT).group(1), names)
    optimizers = [names[name] for name in ("opt", "one", "groups", "guarded")]
    before = [everything(optimizer) for optimizer in optimizers], names["buffer"].block.tobytes()
    with pytest.raises(Exception) as caught, warnings.catch_warnings():  # noqa: PT011, PT012 - compared below
        warnings.simplefilter("ignore")  # of NumPy: a cast overflows, np.matrix is old
        exec(code, names)
    assert type(caught.value).__name__ == error
    pattern = ".*".join(re.escape(part) for part in message.split("…"))
    assert re.fullmatch(pattern, str(caught.value), re.DOTALL), str(caught.value)
    assert ([everything(optimizer) for optimizer in optimizers], names["buffer"].block.tobytes()) == before
    assert list(tmp_path.iterdir()) == []


def test_every_line_of_the_tables_is_a_row():
    lines = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| given")]
    assert len(lines) == len(ROWS) > 100
    promises = (Path(__file__).parent.parent / "docs" / "promises.md").read_text(encoding="utf-8")
    assert f"the {len(ROWS)} lines of [wrong-input.md]" in promises


def test_every_error_is_in_the_tables():
    raised = {row[2] for row in ROWS}
    errors = {name for name in fastrms.__all__ if name.endswith("Error")}
    # The base of all, and one that takes several ranks, which tests/mpi/on_ranks raises.
    assert errors - raised == {"FastrmsError", "RankError"}
