"""The benchmark's measuring: turns, limits, checks of bits, peers in processes of their own, tables."""

import io
import math
import re

import numpy as np
import pytest
from helpers import JIT

from fastrms.bench import cases, implementations, in_situ, measure, problem, quiet, roofline, workers
from fastrms.bench.errors import BenchmarkError, PeerError
from fastrms.plots import plot_throughput

SERIAL, PARALLEL, DIVIDER, DIVIDER_PARALLEL = implementations.ROOFLINES
pytestmark = pytest.mark.skipif(not JIT, reason="times of interpreted kernels say nothing")


def test_all_have_the_same_number_of_turns_and_no_more_rounds_than_the_time_allows():
    def rounds(min_time, **limits):
        turns = [name for name, _ in measure.take_turns([0, 1, 2], min_time, **limits)]
        assert all(sorted(turns[k : k + 3]) == [0, 1, 2] for k in range(0, len(turns), 3))
        return len(turns) // 3

    assert rounds(1e-9, least=4, most=9) == 4
    assert rounds(1e9, least=4, most=9) == 9


def test_sixteen_bit_state_is_compared_with_its_own_oracle():
    given = problem.Problem(cases.Case(1, (1000,), "float32"), 1)
    ours = implementations.IMPLEMENTATIONS["parallel-bfloat16"]
    assert problem.check(ours.make(given), given, True, problem.bfloat16_state) == "same bits"
    with pytest.raises(BenchmarkError, match="expected the same bits"):
        problem.check(ours.make(given), given, True)
    runner = ours.make(given)
    runner.step()  # one too many
    with pytest.raises(BenchmarkError, match="expected the same bits"):
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
    with pytest.raises(BenchmarkError, match="expected the same bits as the reference"):
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


def test_traffic_and_names_of_cases():
    case = cases.Case(1000, (10, 10), "float32")
    assert (case.params, case.traffic, case.name) == (100_000, 2_000_000, "1,000 arrays of 10x10, float32")
    assert cases.Case(1, (1000,), "float64").traffic == 40_000
    assert math.prod(cases.MANY_ARRAYS[1]) * cases.MANY_ARRAYS[0] == 100_000
    params, grads = cases.make_arrays(cases.Case(2, (300,), "float32"))
    assert min(np.abs(grad).min() for grad in grads) >= 0.01
    again, _ = cases.make_arrays(cases.Case(2, (300,), "float32"))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(params, again, strict=True))


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
    assert roofline.divider_speedup(turns=1, size=1000) > 0
    calm = quiet.Quiet(0.1, 0.05, 1.9)
    assert calm.warnings() == []
    assert calm.document() == {"load": 0.1, "others_use": 0.05, "two_thread_speedup": 1.9, "warnings": []}
    (others,) = quiet.Quiet(3.0, 1.5, 1.9).warnings()
    assert "other programs use 1.5 processors" in others
    (shared,) = quiet.Quiet(None, None, 0.9).warnings()
    assert "two threads compute divisions only 0.90 times as fast as one" in shared
    assert quiet.Quiet(None, None, None).warnings() == []
