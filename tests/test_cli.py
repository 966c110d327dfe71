"""The program as a whole: its exit status and what it prints, run in this process and in others."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

import fastrms
from fastrms.cli import common, demo, main

TINY = ["--hidden", "4", "--epochs", "1", "--batch-size", "512"]
# What tells rich to do other than what the output is.
STEERING = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES", "TERM")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in STEERING:
        monkeypatch.delenv(name, raising=False)


def python(*arguments, cwd, **environment):
    process = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, timeout=120
    )
    return process.returncode, process.stdout, process.stderr


def error_of(capsys):
    """Standard error, which has to be one line, of a command that printed no table."""
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "speed-up" not in out
    return err.strip()


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"fastrms {fastrms.__version__}\n"


def test_version_and_help_need_no_extra(tmp_path):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['rich', 'matplotlib', 'sklearn', 'scipy'])); "
        "from fastrms.cli import main; main(sys.argv[1:])"
    )
    for arguments, expected in ((["--version"], b"fastrms "), (["demo", "--help"], b"--hidden")):
        status, out, err = python("-c", code, *arguments, cwd=tmp_path)
        assert status == 0, err
        assert expected in out


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        (["rich"], "rich is not installed"),
        (["sklearn", "matplotlib"], "matplotlib and scikit-learn are not installed"),
        (["sklearn", "matplotlib", "rich"], "matplotlib, rich and scikit-learn are not installed"),
    ],
)
def test_missing_extra(monkeypatch, capsys, tmp_path, missing, expected):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["demo", *TINY, "--output", str(tmp_path / "new")]) == 1
    assert error_of(capsys) == (f'fastrms demo: error: {expected}; install with: python -m pip install "fastrms[demo]"')
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "required: COMMAND"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["demo", "--hidden"], "argument --hidden: expected at least one argument"),
        (["demo", "--hidden", "32", "0"], "argument --hidden: expected a whole number from 1 to 1000000, got '0'"),
        (["demo", "--hidden", "1000001"], "argument --hidden: expected a whole number from 1 to 1000000"),
        (["demo", "--epochs", "1.5"], "argument --epochs: expected a whole number of at least 1, got '1.5'"),
        (["demo", "--batch-size", "-1"], "argument --batch-size: expected a whole number of at least 1, got '-1'"),
        (["demo", "--seed", "4294967296"], "argument --seed: expected a whole number from 0 to 4294967295"),
        (["demo", "--lr", "0"], "argument --lr: expected a finite number above 0, got '0'"),
        (["demo", "--lr", "nan"], "argument --lr: expected a finite number above 0, got 'nan'"),
        (["demo", "--lr", "inf"], "argument --lr: expected a finite number above 0, got 'inf'"),
        (["demo", "--lr", "fast"], "argument --lr: expected a finite number above 0, got 'fast'"),
        (["demo", "--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["demo", "--kernel", "cuda"], "argument --kernel: invalid choice: 'cuda'"),
        (["demo", "--gradients", "both"], "argument --gradients: invalid choice: 'both'"),
    ],
)
def test_bad_usage(capsys, arguments, expected):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert expected in capsys.readouterr().err


def test_ctrl_c(monkeypatch, capsys, tmp_path):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train_both", interrupt)
    assert main(["demo", *TINY, "--output", str(tmp_path)]) == 130
    assert error_of(capsys) == "fastrms demo: interrupted"


def test_not_enough_memory(monkeypatch, capsys, tmp_path):
    # The real thing may take the machine down instead of raising.
    def exhaust(*args, **kwargs):
        raise np._core._exceptions._ArrayMemoryError((10**6, 10**6), np.dtype(np.float64))

    monkeypatch.setattr(demo.mlp, "init_params", exhaust)
    assert main(["demo", *TINY, "--output", str(tmp_path)]) == 1
    assert "not enough memory: Unable to allocate 7.28 TiB" in error_of(capsys)


def test_option_that_only_the_optimizer_can_judge(capsys, tmp_path):
    assert main(["demo", *TINY, "--output", str(tmp_path), "--lr", "1e39"]) == 1
    assert error_of(capsys).startswith("fastrms demo: error: lr: 1e+39 is too large for float32")


def test_output_that_is_no_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert main(["demo", *TINY, "--output", str(tmp_path / "file")]) == 1
    assert error_of(capsys).startswith(f"fastrms demo: error: --output: {tmp_path / 'file'}: expected a folder")


def test_plot_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / demo.PLOT_NAME).mkdir()
    assert main(["demo", *TINY, "--output", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert f"--output: {tmp_path / demo.PLOT_NAME}: cannot be written" in err
    assert out == ""  # found ahead of the training


def test_module_prints_plain_text_into_a_pipe(tmp_path):
    status, out, err = python("-m", "fastrms", "demo", *TINY, cwd=tmp_path, COLUMNS="20")
    assert (status, err) == (0, b"")
    text = out.decode("ascii")
    assert "\x1b" not in text
    assert "\r" not in text.replace("\r\n", "\n")
    assert not re.search("[│┃━─+|]", text)
    assert re.search(r"^of which optimizer .*\dx$", text, re.MULTILINE)  # not folded, however narrow the terminal is
    assert "Losses of all 3 steps: the same bits" in text
    assert (tmp_path / demo.PLOT_NAME).read_bytes().startswith(b"\x89PNG")


def test_table_is_aligned_in_plain_text(capsys, tmp_path):
    assert main(["demo", *TINY, "--output", str(tmp_path)]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    head = next(k for k, line in enumerate(lines) if line.endswith("speed-up"))
    header, rows = lines[head], lines[head + 1 : head + 6]
    ends = [header.index(name) + len(name) for name in ("NumPy reference", "fastrms", "speed-up")]
    names = ["final training loss", "test accuracy", "training step", "of which optimizer", "optimizer's share"]
    for row, name in zip(rows, names, strict=True):
        assert row.startswith(name + " ")
        # Two values, and a speed-up in the rows of times: each ends where its header does.
        cells = [(match.group(), match.end()) for match in re.finditer(r"\S+( [mu]?s)?(?=\s|$)", row[len(name) :])]
        assert [end + len(name) for _, end in cells] == ends[: len(cells)]
        assert len(cells) == (3 if name in ("training step", "of which optimizer") else 2)


def test_quiet_prints_nothing(capsys, tmp_path):
    assert main(["demo", *TINY, "--quiet", "--output", str(tmp_path / "a" / "b")]) == 0
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "a" / "b" / demo.PLOT_NAME).stat().st_size > 10_000


def run_in_terminal(arguments, cwd, **environment):
    pty = pytest.importorskip("pty")
    environment = {"TERM": "xterm-256color", "PYTHONUTF8": "1", "COLUMNS": "100"} | environment
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "fastrms", *arguments],
        cwd=cwd,
        env=os.environ | environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        out = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux: the other end is closed
                break
            if not part:
                break
            out += part
    os.close(ours)
    return process.returncode, out.decode()


def test_terminal_gets_progress_and_colour(tmp_path):
    status, text = run_in_terminal(["demo", *TINY], tmp_path)
    assert status == 0, text
    assert "epoch 1 of 1" in text
    assert "\x1b[?25l" in text  # hides the cursor while the bar moves,
    assert text.index("\x1b[?25h") > text.index("\x1b[?25l")  # and shows it again
    assert "\x1b[32m" in text
    assert "speed-up" in text


def test_terminal_without_colour(tmp_path):
    status, text = run_in_terminal(["demo", *TINY], tmp_path, NO_COLOR="1")
    assert status == 0, text
    assert "epoch 1 of 1" in text
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", text)


@pytest.mark.parametrize(("terminal", "quiet"), [(True, True), (False, False)])
def test_no_progress_bar(monkeypatch, terminal, quiet):
    monkeypatch.setattr("rich.progress.Progress", None)
    monkeypatch.setenv("TERM", "xterm")
    console = Console(force_terminal=terminal)
    with demo._progress(console, quiet, 1, 1) as on_step:
        on_step(None)


def test_text_that_the_output_cannot_encode(monkeypatch, tmp_path):
    path = tmp_path / "out.txt"
    with path.open("w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        common.say(common.make_console(), "Plot: /home/Zoë/[0]/" + "x" * 200)
    assert path.read_text() == "Plot: /home/Zo\\xeb/[0]/" + "x" * 200 + "\n"
