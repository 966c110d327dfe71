"""`fastrms bench`: its results, its plot, kernels of the user's own, and wrong arguments."""

import csv
import json
import os
import re
import subprocess
import sys

import pytest
from helpers import JIT

from fastrms.bench import in_situ, quiet, workers
from fastrms.cli import main

pytestmark = pytest.mark.skipif(not JIT, reason="times of interpreted kernels say nothing")

FEW = ["--kernels", "serial", "numpy-in-place", "reference", "--dtypes", "float32", "--min-time", "0.001"]


def results(folder, stem="fastrms-bench"):
    return json.loads((folder / f"{stem}.json").read_text())


def test_writes_results_and_plot(tmp_path, capsys):
    assert main(["bench", "--sizes", "1e3", "70000", *FEW, "--output", str(tmp_path / "a")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert out.isascii()
    assert "one array of 70,000, float32" in out
    written = results(tmp_path / "a")
    assert written["complete"]
    assert {"date", "machine", "settings", "left_out"} <= written.keys()
    assert {"processor", "versions", "threading_layer", "blas"} <= written["machine"].keys()
    rows = written["results"]
    assert {row["params"] for row in rows} == {1000, 70_000}
    names = {"limit", "serial", "numpy-in-place", "reference"}
    assert all({row["kernel"] for row in rows if row["params"] == size} == names for size in (1000, 70_000))
    with (tmp_path / "a" / "fastrms-bench.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [row["kernel"] for row in table] == [row["kernel"] for row in rows]
    assert list(table[0]) == list(rows[0])
    assert (tmp_path / "a" / "fastrms-bench.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_of_a_row_follow_from_its_time(tmp_path):
    assert main(["bench", "--sizes", "5000", *FEW, "--output", str(tmp_path)]) == 0
    rows = results(tmp_path)["results"]
    limits = {}
    for row in rows:
        if row["kernel"] == "limit":
            limits.setdefault(row["threads"], {})[row["bound"]] = row["seconds"]
    assert limits[1].keys() == {"memory", "divider"}
    for row in rows:
        assert row["quarter"] <= row["seconds"] <= row["three_quarters"]
        assert row["gparam_per_s"] == pytest.approx(5000 / row["seconds"] / 1e9)
        assert row["gbyte_per_s"] == pytest.approx(100_000 / row["seconds"] / 1e9)
        best = min(max(bounds.values()) for threads, bounds in limits.items() if threads <= row["threads"])
        assert row["percent_of_limit"] == pytest.approx(100 * best / row["seconds"])
        if row["kernel"] != "limit":
            assert row["check"] == "same bits"
            assert best in (bounds[row["bound"]] for bounds in limits.values())


def test_sixteen_bit_state_is_for_float32_and_moves_fewer_bytes(tmp_path, capsys):
    names = ["--kernels", "parallel-bfloat16", "parallel", "--min-time", "0.001", "--sizes", "5000"]
    assert main(["bench", *names, "--output", str(tmp_path)]) == 0
    rows = [row for row in results(tmp_path)["results"] if row["kernel"] != "limit"]
    assert [(row["kernel"], row["dtype"]) for row in rows] == [
        ("parallel", "float32"), ("parallel-bfloat16", "float32"), ("parallel", "float64")
    ]  # fmt: skip
    for row, size in zip(rows, (20, 16, 40), strict=True):
        assert row["gbyte_per_s"] == pytest.approx(5000 * size / row["seconds"] / 1e9)
        assert row["check"] == "same bits"
    capsys.readouterr()
    assert main(["bench", *names, "--dtypes", "float64", "--output", str(tmp_path)]) == 1
    assert "parallel-bfloat16: expected float32 among --dtypes, got float64" in capsys.readouterr().err


def test_many_arrays(tmp_path, capsys):
    arguments = ["--arrays", "7", "--shape", "3", "2", "--dtypes", "float64", "--min-time", "0.001"]
    names = ["auto", "auto-list", "serial", "serial-list", "parallel", "parallel-list", "numpy", "naive",
             "naive-parallel", "numpy-in-place", "reference"]  # fmt: skip
    assert main(["bench", *arguments, "--kernels", *names, "--threads", "1", "--output", str(tmp_path)]) == 0
    rows = results(tmp_path)["results"]
    assert [row["kernel"] for row in rows] == ["limit", "limit", *names]
    assert {(row["arrays"], row["shape"], row["params"], row["threads"]) for row in rows} == {(7, "3x2", 42, 1)}
    assert {row["check"] for row in rows[2:]} == {"same bits"}
    assert "7 arrays of 3x2, float64" in capsys.readouterr().out


@pytest.mark.parametrize(("function", "verdict"), [("update", "same bits"), ("rounded", r"\d\.\d eps")])
def test_a_kernel_of_the_users_own(tmp_path, module, function, verdict):
    assert main(["bench", "--sizes", "1e4", *FEW, "--kernel", f"{module}:{function}", "--output", "."]) == 0
    (row,) = [row for row in results(tmp_path)["results"] if row["kernel"] == f"{module}:{function}"]
    assert re.fullmatch(verdict, row["check"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_kernels:eps_inside", "expected the reference's numbers within 16 eps after 3 steps, got an error of"),
        ("my_kernels:broken", "it raised ValueError: on purpose"),
        ("my_kernels:nothing", "expected a function of this name in my_kernels, found none"),
        ("my_kernels:number", "expected a function, got int"),
        ("no_such_module_here:f", "the module cannot be imported"),
        ("my_kernels", "expected module:function, got 'my_kernels'"),
    ],
)
def test_a_kernel_that_is_refused(module, capsys, name, message):
    assert main(["bench", "--sizes", "1000", *FEW, "--kernel", name, "--output", "."]) == 1
    out, err = capsys.readouterr()
    assert message in err
    assert name in err
    assert name not in out  # not timed


@pytest.mark.parametrize("stop", ["in the second case", "in the third round"])
def test_ctrl_c_leaves_what_was_measured(tmp_path, monkeypatch, capsys, stop):
    time_step, rounds = workers.LocalWorker.time, 0

    def interrupt(self, name, calls):
        nonlocal rounds
        if name == "reference":
            rounds += 1
            second = self._problem.case.params == 2000
            if second if stop == "in the second case" else rounds == 5:  # 2 calls are for calibration
                raise KeyboardInterrupt
        return time_step(self, name, calls)

    monkeypatch.setattr(workers.LocalWorker, "time", interrupt)
    assert main(["bench", "--sizes", "1000", "2000", *FEW, "--output", str(tmp_path)]) == 130
    out, err = capsys.readouterr()
    assert "one array of 1,000" in out
    assert f"interrupted in case {2 if stop == 'in the second case' else 1} of 2" in err
    written = results(tmp_path)
    assert not written["complete"]
    kept = [row for row in written["results"] if row["params"] == 1000]
    assert {row["kernel"] for row in kept} == {"limit", "serial", "numpy-in-place", "reference"}
    assert (tmp_path / "fastrms-bench.csv").read_text().count("\n") == len(written["results"]) + 1


def test_in_situ(tmp_path, capsys):
    arguments = ["--in-situ", "--networks", "5-4-3", "--min-time", "0.001", "--output", str(tmp_path)]
    assert main(["bench", *arguments]) == 0
    rows = results(tmp_path, "fastrms-bench-in-situ")["results"]
    ways = [("reference", "list")] + [(k, g) for g in ("list", "buffer") for k in ("none", *in_situ.WAYS)]
    assert [(row["kernel"], row["gradients"]) for row in rows] == 2 * ways
    assert [row["dtype"] for row in rows] == ["float32"] * 15 + ["float64"] * 15
    for row in rows:
        base = rows[0] if row["dtype"] == "float32" else rows[15]
        assert row["times_faster"] == pytest.approx(base["step_seconds"] / row["step_seconds"])
        assert 0 < row["optimizer_seconds"] < row["step_seconds"]
        limit = next(r for r in rows if r["kernel"] == "none" and all(r[k] == row[k] for k in ("dtype", "gradients")))
        assert row["over_no_optimizer"] == pytest.approx(row["step_seconds"] / limit["step_seconds"])
        assert row["check"] == ("not compared" if row["kernel"] == "none" else "same bits")
        assert row["steps"] % (in_situ.TURN - in_situ.DROPPED) == 0
        assert row["params"] == 5 * 4 + 4 + 4 * 3 + 3
    out = capsys.readouterr().out
    assert "5-4-3, float64" in out
    assert "\x1b" not in out
    assert (tmp_path / "fastrms-bench-in-situ.csv").is_file()


def test_in_situ_finds_a_way_that_trains_otherwise(tmp_path, monkeypatch, capsys):
    class Other(in_situ.RMSProp):
        def step(self, gradients=None):
            super().step(gradients)
            self.params[0][0, 0] += 0.001
            return self.params

    monkeypatch.setattr(in_situ, "RMSProp", Other)
    assert main(["bench", "--in-situ", "--networks", "5-4-3", "--output", str(tmp_path)]) == 1
    assert "expected the losses of the reference, got a different loss at step 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--in-situ", "--sizes", "10"], "--sizes: cannot be combined with --in-situ"),
        (["--in-situ", "--arrays", "10"], "--arrays: cannot be combined with --in-situ"),
        (["--in-situ", "--kernels", "numpy"], "--kernels: with --in-situ, expected names out of"),
        (["--in-situ", "--networks", "10"], "--networks: expected widths of at least 1 joined by '-'"),
        (["--in-situ", "--networks", "3-0-2"], "got '3-0-2'"),
        (["--networks", "3-2"], "--networks: needs --in-situ"),
        (["--shape", "3"], "--shape: needs --arrays"),
        (["--arrays", "3", "--sizes", "5"], "--sizes: cannot be combined with --arrays"),
        (["--threads", "100000"], "--threads: expected at most"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, capsys, arguments, message):
    assert main(["bench", *arguments, "--output", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "1.5"], "argument --sizes: expected a whole number from 1 to 1e12"),
        (["--sizes", "0"], "got '0'"),
        (["--sizes", "nan"], "got 'nan'"),
        (["--dtypes", "float16"], "argument --dtypes: invalid choice: 'float16'"),
        (["--kernels", "cuda"], "argument --kernels: invalid choice: 'cuda'"),
        (["--min-time", "0"], "argument --min-time: expected a finite number above 0"),
    ],
)
def test_bad_usage(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_output_that_is_no_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["bench", "--output", str(tmp_path / "file")]) == 1
    assert "expected a folder to write to" in capsys.readouterr().err


def test_bench_needs_its_extra_and_help_does_not(tmp_path):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['rich', 'matplotlib', 'torch', 'jax', 'numexpr'])); "
        "from fastrms.cli import main; sys.exit(main(sys.argv[1:]))"
    )

    def python(*arguments):
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ, check=False)

    done = python("bench", "--help")
    assert done.returncode == 0, done.stderr
    assert "--in-situ" in done.stdout


def test_the_header_names_the_machine_and_warns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quiet, "look", lambda threads: quiet.Quiet(2.5, 1.25, 1.0))
    assert main(["bench", "--sizes", "1000", *FEW, "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    about = results(tmp_path)["machine"]
    assert lines[0].startswith(f"{about['processor']} ({about['microarchitecture']})")
    assert "NumPy" in lines[1]
    assert "load over the last minute: 2.50" in lines[2]
    assert [line[:8] for line in lines[3:5]] == ["warning:", "warning:"]
    assert results(tmp_path)["quiet"]["others_use"] == 1.25
