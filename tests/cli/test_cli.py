"""The program as a whole: its exit status and what it prints, run in this process and in others."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console

import fastrms
from fastrms.cli import common, demo, main, progress

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

    monkeypatch.setattr(demo.training, "train_both", interrupt)
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
    assert "The losses of all 3 steps and the final parameters have the same bits." in text
    assert (tmp_path / demo.PLOT_NAME).read_bytes().startswith(b"\x89PNG")


def test_table_is_aligned_in_plain_text(capsys, tmp_path):
    assert main(["demo", *TINY, "--output", str(tmp_path)]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    head = next(k for k, line in enumerate(lines) if line.endswith("middle half"))
    header, rows = lines[head], lines[head + 1 : head + 6]
    ends = [header.index(name) + len(name) for name in ("NumPy reference", "fastrms", "speed-up", "middle half")]
    names = ["final training loss", "test accuracy", "training step", "of which optimizer", "optimizer's share"]
    for row, name in zip(rows, names, strict=True):
        assert row.startswith(name + " ")
        # Two values, and a speed-up with its quartiles in the rows of times: each ends where its header does.
        cells = [(match.group(), match.end()) for match in re.finditer(r"\S+( \S+)*(?=\s|$)", row[len(name) :])]
        assert [end + len(name) for _, end in cells] == ends[: len(cells)]
        assert len(cells) == (4 if name in ("training step", "of which optimizer") else 2)


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


def test_a_narrow_terminal_loses_no_numbers(tmp_path):
    status, text = run_in_terminal(["path", "--steps", "1", "--panels", "values"], tmp_path, COLUMNS="20")
    assert status == 0, text
    for cell in ("steps", "first", "-1.07", "AdaGrad", "0.111"):
        assert cell in text


@pytest.mark.parametrize(("terminal", "quiet"), [(True, True), (False, False)])
def test_no_progress_bar(monkeypatch, terminal, quiet):
    monkeypatch.setattr("rich.progress.Progress", None)
    monkeypatch.setenv("TERM", "xterm")
    console = Console(force_terminal=terminal, quiet=quiet)
    with progress.show_progress(console, 1) as on_progress:
        on_progress(0.5, "half of it")


def test_text_that_the_output_cannot_encode(monkeypatch, tmp_path):
    path = tmp_path / "out.txt"
    with path.open("w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        common.say(common.make_console(), "Plot: /home/Zoë/[0]/" + "x" * 200)
    assert path.read_text() == "Plot: /home/Zo\\xeb/[0]/" + "x" * 200 + "\n"


# What a shell can do to it.

STEP = ["info", "--seconds", "0.01"]
posix = pytest.mark.skipif(os.name != "posix", reason="shells of Windows have no /dev")


def shell(command, cwd, **environment):
    """Run a command line, in which `fastrms` stands for this program, and return status, output and errors."""
    command = command.replace("fastrms", f"{sys.executable} -m fastrms")
    done = subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=os.environ | environment, capture_output=True, timeout=300, text=True
    )
    return done.returncode, done.stdout, done.stderr


@posix
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [" ".join(STEP), "--help", "path --steps 1 --panels values"])
def test_output_that_nobody_reads_ends_it_without_a_word(tmp_path, arguments, unbuffered):
    command = f"set -o pipefail; fastrms {arguments} | true"
    assert shell(command, tmp_path, PYTHONUNBUFFERED=unbuffered) == (141, "", "")


@posix
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [" ".join(STEP), "--help", "--version", "path --steps 1 --panels values"])
def test_a_full_disk_for_its_output(tmp_path, arguments, unbuffered):
    status, _, err = shell(f"fastrms {arguments} > /dev/full", tmp_path, PYTHONUNBUFFERED=unbuffered)
    name = "" if arguments.startswith("--") else f" {arguments.split()[0]}"
    assert (status, err) == (1, f"fastrms{name}: error: standard output: No space left on device\n")


@posix
def test_closed_streams(tmp_path):
    status, _, err = shell(f"fastrms {' '.join(STEP)} >&-", tmp_path)
    assert (status, err) == (1, "fastrms info: error: standard output: expected an open stream, got a closed one\n")
    assert shell("fastrms path --steps 1 --panels values --quiet <&- >&- 2>&-", tmp_path) == (0, "", "")
    assert (tmp_path / "fastrms-path.png").read_bytes().startswith(b"\x89PNG")
    # An error is not printed among the output.
    assert shell("fastrms path --function nowhere 2>&-", tmp_path) == (1, "", "")
    assert shell("fastrms path --nonsense 2>&-", tmp_path) == (2, "", "")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("NUMBA_NUM_THREADS", "0", ": error: Numba cannot be imported: Number of threads specified must be > 0"),
        ("NUMBA_NUM_THREADS", "many", ": error: Environment variable 'NUMBA_NUM_THREADS' is defined but its"),
        ("NUMBA_NUM_THREADS", "1000000", ": error: NUMBA_NUM_THREADS: expected a whole number from 1 to 4096, got 100"),
        ("NUMBA_OPT", "fast", ": error: Environment variable 'NUMBA_OPT' is defined but its associated value 'fast'"),
        ("NUMBA_CPU_FEATURES", "avx", ": error: NUMBA_CPU_FEATURES: expected names that begin with + or -, got 'avx'"),
        ("NUMBA_THREADING_LAYER", "rust", " info: error: Numba's threads cannot be started: The threading layer"),
        ("FASTRMS_ZERO_COPY", "off", ": error: FASTRMS_ZERO_COPY: expected 0 or 1, got 'off'"),
        ("FASTRMS_TUNE", "", ": error: FASTRMS_TUNE: expected 0 or 1, got ''"),
        ("MPLBACKEND", "paper", " path: error: matplotlib cannot be imported (MPLBACKEND=paper): "),
        ("MPLBACKEND", "paper", " demo: error: matplotlib cannot be imported (MPLBACKEND=paper): "),
    ],
)
def test_settings_of_the_environment_that_cannot_be_used(tmp_path, name, value, expected):
    # Without a word ahead of the error: a picture that cannot be drawn is noticed ahead of the work.
    arguments = {" path": ["path", "--steps", "1"], " demo": ["demo", *TINY]}.get(expected.split(":")[0], STEP)
    status, out, err = python("-m", "fastrms", *arguments, cwd=tmp_path, **{name: value})
    assert (status, out, err.count(b"\n")) == (1, b"", 1)
    assert err.decode().startswith(f"fastrms{expected}")


def test_output_that_ascii_cannot_hold(tmp_path):
    folder = "Zo\xeb"
    arguments = ["path", "--steps", "1", "--panels", "values", "--output", folder]
    status, out, err = python("-m", "fastrms", *arguments, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (status, err) == (0, b"")
    assert b"Picture: Zo\\xeb/fastrms-path.png" in out.replace(b"\\\\", b"/")


def test_without_docstrings(tmp_path):
    status, _, err = python("-OO", "-m", "fastrms", "path", "--steps", "1", "--panels", "values", cwd=tmp_path)
    assert (status, err) == (0, b"")


@pytest.mark.parametrize("command", [["demo", *TINY], ["path"], ["bench", "--quick"], ["bench", "--in-situ"]])
def test_a_folder_that_cannot_be_written_is_found_ahead_of_the_work(capsys, monkeypatch, tmp_path, command):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(common.tempfile, "TemporaryFile", refuse)  # to root no folder is read-only
    assert main([*command, "--output", str(tmp_path)]) == 1
    expected = f"fastrms {command[0]}: error: --output: {tmp_path}: no file can be written in it: Permission denied\n"
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize("kind", ["json", "csv", "png"])
def test_results_that_cannot_be_written_are_found_ahead_of_the_work(capsys, tmp_path, kind):
    (tmp_path / f"fastrms-bench.{kind}").mkdir()
    assert main(["bench", "--quick", "--output", str(tmp_path)]) == 1
    assert error_of(capsys).startswith(
        f"fastrms bench: error: --output: {tmp_path / f'fastrms-bench.{kind}'}: cannot be"
    )


@posix
@pytest.mark.parametrize("arguments", [STEP, ["bench", "--quick", "--sizes", "1000", "--kernels", "serial", "numexpr"]])
@pytest.mark.parametrize("delay", [0.2, 0.5, 1.0, 3.0])
def test_ctrl_c_of_a_terminal_is_one_line(tmp_path, arguments, delay):
    arguments = arguments if arguments is STEP else [*arguments, "--output", str(tmp_path)]
    program = [sys.executable, "-c", "print(flush=True); from fastrms.cli import main; raise SystemExit(main())"]
    if arguments is STEP:
        arguments = ["info", "--seconds", "60"]
    with subprocess.Popen(
        [*program, *arguments], env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "\n"
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(r"fastrms( \w+)?: interrupted.*\n", err), err
    # Whoever is left holds no work: the tracker of multiprocessing ends with its parent.
    deadline = time.monotonic() + 20
    while _running(process.pid):
        assert time.monotonic() < deadline, _running(process.pid)
        time.sleep(0.1)


SWALLOWS = """
import signal, time, weakref
from fastrms.cli import info, main

class Thing:
    pass

def run(args):
    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing
    time.sleep(60)
    return 0

info.run = run
raise SystemExit(main())
"""


def test_ctrl_c_that_python_ignores_in_a_callback_comes_again(tmp_path):
    began = time.monotonic()
    status, _, err = python("-c", SWALLOWS, "info", cwd=tmp_path)
    assert (status, err.decode().splitlines()) == (130, ["fastrms info: interrupted"])
    assert time.monotonic() - began < 55  # it did not come from the end of the command


def _running(group):
    """Processes of a group that have not ended."""
    lines = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True).stdout.splitlines()
    rows = [line.split(None, 2) for line in lines]
    return [row for row in rows if row[0] == str(group) and not row[1].startswith("Z")]
