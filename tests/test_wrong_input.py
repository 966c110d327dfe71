"""Every row of the tables in docs/wrong-input.md and docs/errors.md: the error it names, and nothing changes."""

import re
import warnings
from pathlib import Path

import pytest
from helpers import BLOCK, everything

import fastrms

DOCS = Path(__file__).parent.parent / "docs"
TEXT, COMMON = ((DOCS / name).read_text(encoding="utf-8") for name in ("wrong-input.md", "errors.md"))
# wrong-input.md: what it is | `code` | `error`
ROW = re.compile(r"^\| (.+?) \| `(.+)` \| `(\w+): (.+)` \|$", re.MULTILINE)
ROWS = ROW.findall(TEXT)
# errors.md: `code`<br>`error` | what to do
COMMON_ROW = re.compile(r"^\| `([^`]+)`<br>`(\w+): ([^`]+)` \| .+ \|$", re.MULTILINE)
COMMON_ROWS = COMMON_ROW.findall(COMMON)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def check(page, code, error, message):
    """Run a row's code after the first block of its page, and compare the error, all state and the files."""
    names = {}
    exec(BLOCK.search(page).group(1), names)
    optimizers = [each for each in names.values() if isinstance(each, fastrms.RMSProp)]
    buffers = [each for each in names.values() if isinstance(each, fastrms.FlatBuffer)]

    def state():
        files = {path.name: path.read_bytes() for path in Path.cwd().iterdir()}
        return [everything(each) for each in optimizers], [each.block.tobytes() for each in buffers], files

    before = state()
    with pytest.raises(Exception) as caught, warnings.catch_warnings():  # noqa: PT011, PT012 - compared below
        warnings.simplefilter("ignore")  # of NumPy: a cast overflows, np.matrix is old
        exec(code, names)
    assert type(caught.value).__name__ == error
    pattern = ".*".join(re.escape(part) for part in message.split("…"))
    assert re.fullmatch(pattern, str(caught.value), re.DOTALL), str(caught.value)
    assert state() == before


@pytest.mark.parametrize(("what", "code", "error", "message"), ROWS, ids=[f"{row[0]}: {row[1]}" for row in ROWS])
def test_what_is_said_of(what, code, error, message):
    check(TEXT, code, error, message)


@pytest.mark.parametrize(("code", "error", "message"), COMMON_ROWS, ids=[row[0] for row in COMMON_ROWS])
def test_a_common_error(code, error, message):
    check(COMMON, code, error, message)


def lines(page, header):
    return [line for line in page.splitlines() if line.startswith("| ") and not line.startswith(f"| {header}")]


def test_every_line_of_the_tables_is_a_row():
    assert len(lines(TEXT, "given")) == len(ROWS) > 100
    promises = (DOCS / "promises.md").read_text(encoding="utf-8")
    assert f"the {len(ROWS)} lines of [wrong-input.md]" in promises
    assert len(lines(COMMON, "the line")) == len(COMMON_ROWS) == 10


def test_every_error_is_in_the_tables():
    raised = {row[2] for row in ROWS}
    errors = {name for name in fastrms.__all__ if name.endswith("Error")}
    # The base of all, and one that takes several ranks, which tests/mpi/on_ranks raises.
    assert errors - raised == {"FastrmsError", "RankError"}
