"""`fastrms bench`: what it writes, checks and refuses. No test looks at how long something took."""

import csv
import io
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import JIT

from fastrms.bench import cases, implementations, in_situ, measure, problem, quiet, roofline, workers
from fastrms.bench.errors import BenchmarkError, PeerError
from fastrms.cli import main
from fastrms.plots import plot_throughput

pytestmark = pytest.mark.skipif(not JIT, reason="times of interpreted kernels say nothing")

SERIAL, PARALLEL, DIVIDER, DIVIDER_PARALLEL = implementations.ROOFLINES
FEW = ["--kernels", "serial", "numpy-in-place", "reference", "--dtypes", "float32", "--min-time", "0.001"]

GOOD = """
import numpy as np
def update(params, grads, cache, lr, decay_rate, epsilon):
    cache[...] = decay_rate * cache + (1 - decay_rate) * grads**2
    params -= lr * grads / (np.sqrt(cache) + epsilon)
def rounded(params, grads, cache, lr, decay_rate, epsilon):
    cache += (1 - decay_rate) * (grads * grads - cache)
    params -= lr * grads / (np.sqrt(cache) + epsilon)
def eps_inside(params, grads, cache, lr, decay_rate, epsilon):
    cache[...] = decay_rate * cache + (1 - decay_rate) * grads**2
    params -= lr * grads / np.sqrt(cache + 1e-3)
def broken(params, grads, cache, lr, decay_rate, epsilon):
    raise ValueError("on purpose")
number = 3
"""


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    # What only makes times steadier.
    monkeypatch.setattr(measure, "PAUSE", 0)
    monkeypatch.setattr(workers, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(workers, "WARM_SECONDS", 0)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_kernels.py").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    yield "my_kernels"
    sys.modules.pop("my_kernels", None)


def test_all_have_the_same_number_of_turns_and_no_more_rounds_than_the_time_allows():
    def rounds(min_time, **limits):
        turns = [name for name, _ in measure.take_turns([0, 1, 2], min_time, **limits)]
        assert all(sorted(turns[k : k + 3]) == [0, 1, 2] for k in range(0, len(turns), 3))
        return len(turns) // 3

    assert rounds(1e-9, least=4, most=9) == 4
    assert rounds(1e9, least=4, most=9) == 9


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


def test_sixteen_bit_state_is_compared_with_its_own_oracle():
    given = problem.Problem(cases.Case(1, (1000,), "float32"), 1)
    ours = implementations.IMPLEMENTATIONS["parallel-bfloat16"]
    assert problem.check(ours.make(given), given, True, problem.bfloat16_state) == "same bits"
    with pytest.raises(BenchmarkError, match="expected the bits"):
        problem.check(ours.make(given), given, True)
    runner = ours.make(given)
    runner.step()  # one too many
    with pytest.raises(BenchmarkError, match="expected the bits"):
        problem.check(runner, given, True, problem.bfloat16_state)


class Scripted:
    """In place of a worker: each implementation takes the seconds that are written here."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.closed = False

    def open(self, name, case):
        return "same bits"

    def time(self, name, calls):
        return self.seconds[name]

    def close(self):
        self.closed = True


def test_percent_of_limit_from_given_times():
    worker = Scripted({SERIAL: 0.04, PARALLEL: 0.02, DIVIDER: 0.03, DIVIDER_PARALLEL: 0.022, "a": 0.05, "b": 0.025})
    rooflines = {
        SERIAL: measure.Entry("limit", 1, worker, bound="memory"),
        PARALLEL: measure.Entry("limit", 2, worker, bound="memory"),
        DIVIDER: measure.Entry("limit", 1, worker, bound="divider"),
        DIVIDER_PARALLEL: measure.Entry("limit", 2, worker, bound="divider"),
    }
    entries = {"a": measure.Entry("a", 1, worker), "b": measure.Entry("b", 2, worker)}
    rows = []
    measure.measure(cases.Case(1, (10**7,), "float64"), entries, rooflines, 1e-9, rows=rows)
    assert worker.closed
    assert [row["kernel"] for row in rows] == ["limit"] * 4 + ["a", "b"]
    percents = [round(row["percent_of_limit"], 6) for row in rows]
    assert percents == [100, 110, round(400 / 3, 6), 100, 80, 88]
    assert [row["bound"] for row in rows] == ["memory", "memory", "divider", "divider", "memory", "divider"]
    assert rows[4]["gparam_per_s"] == pytest.approx(0.2)
    assert rows[4]["gbyte_per_s"] == pytest.approx(8)  # 40 bytes a parameter


def test_the_limit_is_the_slower_bound_of_the_fastest_number_of_threads():
    memory, both = {1: {"memory": 1.0}, 2: {"memory": 1.5}}, {1: {"memory": 1.0, "divider": 3.0}, 2: {"memory": 2.0}}
    # Threads are no help to small arrays, and whoever may use them may also leave it.
    assert measure.limit_of(2, memory) == (1.0, "memory")
    assert measure.limit_of(1, both) == (3.0, "divider")
    assert measure.limit_of(2, both) == (2.0, "memory")
    seconds, bound = measure.limit_of(1, {2: {"memory": 0.5}})
    assert math.isnan(seconds)
    assert bound == ""


def test_the_divider_divides_every_element_and_stays_bounded(rng):
    for divide, rows in ((roofline.divide_serial, 1), (roofline.divide_parallel, 2)):
        values, grads = np.abs(rng.standard_normal((2, rows, roofline.CHUNK))) + 0.01
        before, root = values.copy(), lambda v: np.sqrt(v) + 1e-8
        divide(values, grads, 1e-8, rows * 100 - 1)  # less than a row each, and the last one has one less
        expected = before.copy()
        expected[:, :100] = grads[:, :100] / root(before[:, :100])
        expected[-1, 99] = before[-1, 99]
        np.testing.assert_array_equal(values, expected)
        divide(values, grads, 1e-8, rows * 60 * roofline.CHUNK)
        np.testing.assert_allclose(values, grads ** (2 / 3), rtol=1e-6)


def test_two_threads_are_compared_with_one(monkeypatch):
    assert roofline.divider_speedup(repeats=2, size=1000) > 0
    calm = quiet.Quiet(0.1, 0.05, 1.9)
    assert calm.warnings() == []
    assert calm.document() == {"load": 0.1, "others_use": 0.05, "two_thread_speedup": 1.9, "warnings": []}
    (others,) = quiet.Quiet(3.0, 1.5, 1.9).warnings()
    assert "other programs use 1.5 processors" in others
    (shared,) = quiet.Quiet(None, None, 0.9).warnings()
    assert "two threads divide only 0.90 times as fast as one" in shared
    assert quiet.Quiet(None, None, None).warnings() == []


def test_the_header_names_the_machine_and_warns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quiet, "look", lambda threads: quiet.Quiet(2.5, 1.25, 1.0))
    assert main(["bench", "--sizes", "1000", *FEW, "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    about = results(tmp_path)["machine"]
    assert lines[0].startswith(f"{about['processor']} ({about['microarchitecture']})")
    assert "NumPy" in lines[1]
    assert "load over the last minute 2.50" in lines[2]
    assert [line[:8] for line in lines[3:5]] == ["warning:", "warning:"]
    assert results(tmp_path)["quiet"]["others_use"] == 1.25


@pytest.mark.parametrize("fetch", roofline.FETCHES)
def test_the_limit_touches_every_element_and_stays_bounded(fetch, rng):
    for touch in (roofline.touch_serial, roofline.touch_parallel):
        p, g, c = rng.standard_normal((3, 10_001)).astype(np.float32)
        before = p.copy(), c.copy()
        touch(p, g, c, np.float32(0.5), *fetch)
        np.testing.assert_allclose(c, (before[1] + g) / 2, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(p, (before[0] + c) / 2, rtol=1e-6, atol=1e-7)
        for _ in range(200):
            touch(p, g, c, np.float32(0.5), *fetch)
        np.testing.assert_allclose(p, g, rtol=1e-5)


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
        ("my_kernels:nothing", "expected a function of that name in my_kernels, found none"),
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
    assert "expected the losses of the reference, got another one at step 2" in capsys.readouterr().err


def test_settling_leaves_training_where_it_was(rng):
    rows = []
    # From 65,536 parameters on "auto" is given time to choose.
    in_situ.measure_training(cases.Network("n", (300, 220, 3), "float32"), ["auto"], None, 1e-9, rows=rows)
    assert [row["kernel"] for row in rows] == ["reference", "none", "auto", "none", "auto"]
    trainer = in_situ._Trainer(
        in_situ.Training(in_situ.RMSProp([np.ones((4, 3)), np.zeros(3)])), (np.ones((64, 4)), np.zeros(64, np.intp))
    )
    trainer.steps(3)
    before = trainer.training.optimizer.params[0].copy()
    trainer.settle()
    assert len(trainer.training.losses) > 3
    np.testing.assert_array_equal(trainer.training.optimizer.params[0], before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--in-situ", "--sizes", "10"], "--sizes: not with --in-situ"),
        (["--in-situ", "--arrays", "10"], "--arrays: not with --in-situ"),
        (["--in-situ", "--kernels", "numpy"], "--kernels: with --in-situ expected some of"),
        (["--in-situ", "--networks", "10"], "--networks: expected widths of at least 1 joined by '-'"),
        (["--in-situ", "--networks", "3-0-2"], "got '3-0-2'"),
        (["--networks", "3-2"], "--networks: only with --in-situ"),
        (["--shape", "3"], "--shape: only with --arrays"),
        (["--arrays", "3", "--sizes", "5"], "--sizes: not with --arrays"),
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


@pytest.mark.parametrize(
    "names", [["numexpr"], pytest.param(["torch", "torch-foreach", "torch-adagrad"], marks=pytest.mark.torch)]
)
def test_peers_in_their_own_process(names):
    remote = workers.RemoteWorker(names[0], 1, 60)
    try:
        for dtype in cases.DTYPES:
            for name in names:
                assert re.fullmatch(r"same bits|\d\.\d eps", remote.open(name, cases.Case(3, (5, 4), dtype)))
                assert remote.time(name, 2) > 0
        remote.close()
        with pytest.raises(PeerError, match="no such implementation"):
            remote.open("no such implementation", cases.Case(1, (5,), "float32"))
    finally:
        remote.end()
    with pytest.raises(PeerError, match="has ended"):
        remote.time(names[0], 1)


def test_a_peer_that_fails_is_left_out():
    class Failing(Scripted):
        def open(self, name, case):
            raise PeerError("no compiler")

    class Dying(Scripted):
        turns = 0

        def time(self, name, calls):
            self.turns += 1
            if self.turns > 4:
                raise PeerError("has ended")
            return 1.0

    here = Scripted({SERIAL: 0.5, "serial": 1.0})
    rooflines = {SERIAL: measure.Entry("limit", 1, here, bound="memory")}
    entries = {
        "serial": measure.Entry("serial", 1, here),
        "torch": measure.Entry("torch", 1, Failing({})),
        "optax": measure.Entry("optax", 1, Dying({})),
    }
    skipped, rows = {}, []
    case = cases.Case(1, (8,), "float32")
    measure.measure(case, entries, rooflines, 1e-9, rows=rows, on_skip=lambda *given: skipped.update({given[0]: given}))
    assert skipped.keys() == {"torch", "optax"}
    assert skipped["torch"] == ("torch", case, "no compiler")
    assert [row["kernel"] for row in rows] == ["limit", "serial", "optax"]
    assert rows[1]["rounds"] >= measure.MIN_ROUNDS > rows[2]["rounds"]


def test_check_tells_bits_from_errors():
    case = cases.Case(2, (50,), "float32")
    given = problem.Problem(case, 1)
    params, cache = ([array.copy() for array in arrays] for arrays in problem.rmsprop(given))
    runner = problem.Runner(lambda: None, lambda: (params, cache))
    assert problem.check(runner, given, exact=True) == "same bits"
    params[1][7] = np.nextafter(params[1][7], np.float32(np.inf))
    assert re.fullmatch(r"[01]\.\d eps", problem.check(runner, given, exact=False))
    with pytest.raises(BenchmarkError, match="expected the bits of the reference"):
        problem.check(runner, given, exact=True)
    params[1][7] = np.nan
    with pytest.raises(BenchmarkError, match="error of inf"):
        problem.check(runner, given, exact=False)
    params[1] = params[1][:3]
    with pytest.raises(BenchmarkError, match=r"expected float32 of shape \(50,\)"):
        problem.check(runner, given, exact=False)


def test_plot_of_throughput():
    def record(kernel, label, params, value, dtype="float32", threads=1):
        where = {"dtype": dtype, "threads": threads}
        return {"kernel": kernel, "label": label, "params": params, "gparam_per_s": value} | where

    records = [
        # One thread and two, with two bounds each.
        record("limit", "limit", 1000, 2.0),
        record("limit", "limit", 1000, 3.0, threads=2),
        record("limit", "limit", 1000, 9.0, threads=2),
        record("limit", "limit", 100_000, 5.0),
        record("auto", "fastrms auto", 100_000, 4.0),
        record("auto", "fastrms auto", 1000, 1.0),
        record("m:f", "m:f", 1000, 0.5),
        record("reference", "reference class", 1000, 0.1, "float64"),
    ]
    figure, panels = plot_throughput(records)
    figure.savefig(io.BytesIO())
    assert len(panels) == 2
    assert (panels[0].get_xscale(), panels[0].get_yscale()) == ("log", "log")
    roof, auto, own = panels[0].get_lines()
    np.testing.assert_array_equal(roof.get_xydata(), [[1000, 3], [100_000, 5]])
    np.testing.assert_array_equal(auto.get_xydata(), [[1000, 1], [100_000, 4]])
    assert roof.get_linewidth() > 2 * auto.get_linewidth()
    assert own.get_ydata() == [0.5]
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["limit of this machine", "fastrms auto", "m:f", "reference class"]


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


def test_traffic_and_names_of_cases():
    case = cases.Case(1000, (10, 10), "float32")
    assert (case.params, case.traffic, case.name) == (100_000, 2_000_000, "1,000 arrays of 10x10, float32")
    assert cases.Case(1, (1000,), "float64").traffic == 40_000
    assert math.prod(cases.MANY_ARRAYS[1]) * cases.MANY_ARRAYS[0] == 100_000
    params, grads = cases.make_arrays(cases.Case(2, (300,), "float32"))
    assert min(np.abs(grad).min() for grad in grads) >= 0.01
    again, _ = cases.make_arrays(cases.Case(2, (300,), "float32"))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(params, again, strict=True))
