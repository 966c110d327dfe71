"""The scripts in benchmarks/: files of results, the tables and targets that follow from them, and two experiments."""
# ruff: noqa: RUF001 - a multiplication sign in a table is meant

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import JIT

from fastrms.bench import measure, workers
from fastrms.bench.cases import Case
from fastrms.cli import main

pytestmark = pytest.mark.skipif(not JIT, reason="times of interpreted kernels say nothing")

FOLDER = Path(__file__).parent
while not (FOLDER / "benchmarks").is_dir():
    FOLDER = FOLDER.parent
FOLDER /= "benchmarks"


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    # Only for steadier times.
    monkeypatch.setattr(measure, "PAUSE", 0)
    monkeypatch.setattr(workers, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(workers, "WARM_SECONDS", 0)


def script(name):
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


tables, targets, results = script("tables"), script("targets"), script("results")


def machine(processor="Some(R) Processor CPU @ 2 GHz", caches=(("L2", "1 MiB"),)):
    found = {"processor": processor, "microarchitecture": "znver4", "caches": dict(caches), "processors": 2}
    return found | {"system": "Linux", "numba_threads": 2, "threading_layer": "omp", "blas": ["a BLAS"],
                    "versions": {"NumPy": "2"}, "environment": {}}  # fmt: skip


def run(*, date="2026-11-26T10:00:00+00:00", about=None, **rows):
    settings = {"threads": 2, "min_time": 1.0, "quick": False}
    return results.Results(date, about or machine(), {"warnings": []}, settings, **rows)


def row(kernel, seconds, size=100_000, percent=50.0, dtype="float32", threads=2):
    times = {"seconds": seconds, "quarter": 0.9 * seconds, "three_quarters": 1.1 * seconds}
    case = {"dtype": dtype, "arrays": 1, "shape": str(size), "params": size}
    bound = {"percent_of_limit": percent, "bound": "divider"}
    return {"kernel": kernel, "label": f"the {kernel}", "threads": threads, **bound, **case, **times}


def way(kernel, gradients, faster, over, network="784-512-512-10", dtype="float32"):
    times = {"step_seconds": 1 / faster, "quarter": 1.0, "three_quarters": 1.0, "optimizer_seconds": 0.1}
    ratios = {"times_faster": faster, "over_no_optimizer": over}
    return {"kernel": kernel, "gradients": gradients, "network": network, "dtype": dtype, **times, **ratios}


def test_a_file_of_results_is_of_one_processor_and_date(tmp_path):
    one = run(steps=[row("auto", 1e-3)])
    path = results.save(one, tmp_path)
    assert path.name == "some-znver4-2026-11-26.json"
    assert results.read(path) == one
    again = run(steps=[row("auto", 2e-3)])
    assert results.save(again, tmp_path) == path  # of the same machine
    assert results.read(path) == again
    other = run(about=machine(caches=[("L2", "2 MiB")]), steps=[row("auto", 3e-3)])
    second = results.save(other, tmp_path)
    assert second.name == "some-znver4-2026-11-26-2.json"
    assert results.read(path) == again
    assert results.save(other, tmp_path) == second
    results.save(run(date="2026-11-20T10:00:00+00:00"), tmp_path)
    assert results.newest(tmp_path) == [again, other]  # the older one of the same machine is not shown
    path.write_text(json.dumps({"schema": 99}))
    with pytest.raises(SystemExit, match="expected schema 1"):
        results.read(path)


def test_files_in_the_repository_can_be_read_and_are_named_after_their_machine():
    for path in results.FOLDER.glob("*.json"):
        found = results.read(path)
        assert found.steps
        assert found.date[:10] in path.name
        assert not found.quick
        assert not {"processor", "versions", "caches"} - found.machine.keys()


def test_tables_are_written_from_all_files(tmp_path, capsys):
    common = ["--dtypes", "float32", "--min-time", "0.001", "--output"]
    ways = ["--kernels", "auto", "parallel", "naive", "reference"]
    assert main(["bench", "--sizes", "1000", "1e5", *ways, *common, str(tmp_path / "a")]) == 0
    assert main(["bench", "--arrays", "5", *ways, "auto-list", *common, str(tmp_path / "b")]) == 0
    assert main(["bench", "--in-situ", "--networks", "5-4-3", *common, str(tmp_path / "c")]) == 0
    flat, many, trained = (
        json.loads((tmp_path / name / f"fastrms-bench{kind}.json").read_text())
        for name, kind in (("a", ""), ("b", ""), ("c", "-in-situ"))
    )
    state = {"setting": "decay_rate=0.9", "cache": "bfloat16", "seeds": 3, "mean": [0.5, 0.6, 0.9]}
    measured = results.Results(
        flat["date"], flat["machine"], flat["quiet"], flat["settings"], steps=flat["results"] + many["results"],
        training=trained["results"], state=[state | {"deviation": [0.01, 0.02, 0.03]}],
    )  # fmt: skip
    results.save(measured, tmp_path / "kept")
    results.save(run(steps=[row("auto", 1.0)], about=machine("Other")), tmp_path / "kept")
    page = tmp_path / "page.md"
    names = tables.tables([measured])
    page.write_text("before\n" + "".join(f"<!-- table: {name} -->\nold {name}\n<!-- end -->\n" for name in names))
    capsys.readouterr()
    arguments = ["--write", "--results", str(tmp_path / "kept"), "--pages", str(page)]
    assert tables.main(arguments) == 0
    first = page.read_text()
    assert tables.main(arguments) == 0
    assert page.read_text() == first  # writing again changes nothing
    assert first.startswith("before\n<!-- table: machine -->\n\n- **")
    assert "old" not in first
    assert "| float32, a step | 1,000 | 100,000 |" in first
    assert re.search(r"^\| fastrms auto \| [\d.]+ .?s ± \d+ % \|", first, re.MULTILINE)
    assert re.search(r"^\| limit: divider, 1 thread \|", first, re.MULTILINE)
    assert re.search(r"^\| bound for all threads \| (memory|divider) \|", first, re.MULTILINE)
    assert "**Other (znver4)**\n\n| float32, a step | 100,000 |" in first  # both machines
    assert "def naive(params, grads, cache, lr, decay_rate, rest, epsilon):\n    for i in range" in first
    assert re.search(r"^\| 1,000 float32 \| [\d.]+× \|", first, re.MULTILINE) is None  # serial was not measured
    assert "|  | no optimizer | list |" in first
    assert "| decay_rate=0.9 | bfloat16 | 0.5000 ± 0.0100 | 0.6000 ± 0.0200 | 0.9000 ± 0.0300 |" in first
    assert first.count("@njit") == 3  # both loops, and the first one alone
    assert re.search(r"training steps are [\d.]+( to [\d.]+)? times as fast as with the NumPy code", first)
    assert re.search(r"^\| a training step \| the NumPy class \| [\d.]+( to [\d.]+)?× \| – \|$", first, re.MULTILINE)
    assert capsys.readouterr().out.count("reached") > 0

    page.write_text("<!-- table: nonsense -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="expected one of machine"):
        tables.main(arguments)
    page.write_text("<!-- table: limit -->\n")
    with pytest.raises(SystemExit, match="expected <!-- end -->"):
        tables.main(arguments)
    with pytest.raises(SystemExit, match="expected files of results, found none"):
        tables.main(["--write", "--results", str(tmp_path / "none")])


def test_what_it_is_worth():
    ways = [way("reference", "list", 1.0, 2.0), way("auto", "list", 1.5, 1.2), way("auto", "buffer", 3.0, 1.2),
            way("serial", "list", 2.0, 1.1), way("serial", "buffer", 4.0, 1.1), way("parallel", "list", 1.0, 1.1),
            way("parallel", "buffer", 3.0, 1.1), way("naive", "list", 1.2, 1.1)]  # fmt: skip
    for each in ways:
        each["optimizer_seconds"] = 0.5 if each["kernel"] == "reference" else 0.25 / each["times_faster"]
    steps = [row("serial", 2.0, size=1000), row("serial-list", 4.0, size=1000), row("naive", 3.0, size=1000),
             row("serial", 1.0, size=10**6), row("naive", 1.0, size=10**6)]  # fmt: skip
    assert tables.worth([run(steps=steps, training=ways)]).splitlines()[2:] == [
        "| a training step | the NumPy class | 1.50 to 3.00× |",
        "| the optimizer's part of it | the NumPy class | 3.00 to 6.00× |",
        "| a training step | the loop, called for each array | 1.25× |",
        "| a training step with `parallel` | the same with `serial` | 0.50 to 0.75× |",
        "| one flat array of 1,000 or 10,000 elements | the loop | 0.75 to 1.50× |",
        "| one flat array of 1,000,000 or more | the loop | 1.00× |",
        "| 1,000 arrays of 10×10 | the NumPy class | – |",
        "| 1,000 arrays of 10×10 | the loop, called for each array | – |",
    ]
    assert "1.5 to 3.0 times as fast as with the NumPy code." in tables.speedups([run(training=ways)])
    assert "alone is 3.0 to 6.0 times as fast." in tables.speedups([run(training=ways)])
    assert "| 1.50× |" not in tables.summary([run(training=ways)])
    assert "(1.50×) | 333 ms (3.00×) | 3.0× / 6.0× |" in tables.summary([run(training=ways)])


def test_readme_says_what_the_results_show():
    """What the prose around the tables says of the loop and of `parallel`, on the machines that are there."""
    runs = results.newest()
    for each in runs:
        assert each.machine["processors"] == 2
        assert max(tables.ratios(each, "parallel", "serial")) < tables.MARGIN
        assert min(tables.ratios(each, "auto", "reference")) > 1
    small, large = (
        [value for size in sizes for each in runs
         if (value := targets.faster(Case(1, (size,), "float32"), "serial-list", "naive")(each)) is not None]
        for sizes in ((1_000,), (1_000_000, 10_000_000, 50_000_000))
    )  # fmt: skip
    assert max(small) < 1
    assert 0.9 < min(large) <= max(large) < 1.1


def test_a_time_counts_as_lost_from_three_percent_on():
    rows = [row("auto", 1.0), row("auto-list", 1.2), row("serial", 0.98), row("parallel", 0.96), row("torch", 1.1),
            row("parallel-list", 1.0), row("limit", 0.5), row("parallel-bfloat16", 0.5),
            row("serial", 0.1, size=7)]  # fmt: skip
    lost = {each["kernel"]: [ours["kernel"] for ours in tables.beaten(each, rows)] for each in rows[:-1]}
    assert {kernel: ours for kernel, ours in lost.items() if ours} == {
        "parallel": ["auto"], "torch": ["auto-list"], "parallel-list": ["auto-list"],
    }  # fmt: skip
    ways = [way("reference", "list", 1.0, 2.0), way("auto", "list", 1.8, 1.2), way("naive", "list", 2.0, 1.1),
            way("naive", "buffer", 9.0, 1.1), way("none", "list", 9.0, 1.0)]  # fmt: skip
    text = tables.losses(run(steps=rows, training=ways))
    assert "| 1 × 100000, float32 | the parallel | the auto | 960 ms ± 10 % | 1.00 s ± 10 % | 1.04× |" in text
    assert "the serial |" not in text
    assert text.count("training step of") == 1
    assert "| naive loop | fastrms auto |" in text
    assert "**960 ms ± 10 %**" in tables.steps(run(steps=rows), "float32")
    assert tables.losses(run(steps=rows[:3])) == "None in this run."


def test_targets_from_given_times():
    steps = [row("serial", 1.0), row("serial-list", 1.1), row("naive", 1.0), row("parallel", 0.5, 50_000_000, 96.0),
             row("serial", 3.0e-6, 1000), row("serial-list", 3.0e-6, 1000), row("naive", 2.2e-6, 1000)]  # fmt: skip
    training = [way("auto", "list", 2.0, 1.14), way("auto", "buffer", 2.0, 1.09)]
    torch = [{"case": "training step of 64-32-10", "busy": True, "seconds": {}, "ratio": 0.9, "least": 1.0}]
    text = targets.table([run(steps=steps, training=training, torch=torch), run(about=machine("Other"))])
    lines = {cells[0]: cells[1:] for line in text.splitlines() for cells in [line.strip("| ").split(" | ")]}
    assert lines["target"][-2:] == ["Some (znver4)", "Other (znver4)"]
    assert lines["1e5 float32, serial `step()` against the naive loop"] == ["≥ 0.97", "1 reached", "–"]
    assert lines["1e5 float32, serial `step(list)` against the naive loop"] == ["≥ 0.97", "0.909 **missed**", "–"]
    assert lines["1e3 float32, serial `step()`: µs more than the naive loop"] == ["≤ 0.5", "0.8 **missed**", "–"]
    assert lines["1e3 float32, serial `step(list)`: µs more than the naive loop"] == ["≤ 1", "0.8 reached", "–"]
    assert lines["5e7 float32, parallel: fraction of the limit"] == ["≥ 0.95", "0.96 reached", "–"]
    network = "training step of 784-512-512-10, float32"
    assert lines[f"{network}, lists: times the step without an optimizer"] == ["≤ 1.13", "1.14 **missed**", "–"]
    assert lines[f"{network}, `opt.grads`: times the step without an optimizer"] == ["≤ 1.1", "1.09 reached", "–"]
    assert lines["torch adapter, training step of 64-32-10, busy machine"] == ["≥ 1", "0.9 **missed**", "–"]
    assert lines["torch adapter, training step of 64-32-10"] == ["≥ 1", "–", "–"]


def test_each_case_is_measured_once_with_all_ways_that_targets_need():
    plan = list(targets._plan(["serial", "lists"], quick=True))
    found = {case: ways for cases, ways in plan for case in cases}
    assert sum(len(cases) for cases, _ in plan) == len(found)
    assert found[Case(1, (100_000,), "float64")] == ("serial", "serial-list", "naive")
    assert set(found[Case(1, (1_000_000,), "float32")]) == {
        "serial",
        "serial-list",
        "naive",
        "parallel",
        "parallel-list",
    }
    assert max(case.params for case in found) == 1_000_000


def test_targets_are_measured_and_printed(monkeypatch, tmp_path, capsys):
    case = Case(1, (1000,), "float32")
    small = targets.Group(
        [targets.Target("it", 0.1, targets.faster(case, "serial", "naive"))], (case,), ("serial", "naive")
    )
    monkeypatch.setitem(targets.GROUPS, "small", small)
    assert targets.main(["--only", "small", "--min-time", "0.001"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^\| it \| ≥ 0\.1 \| [\d.]+ reached \|$", out, re.MULTILINE)
    assert "measured: one array of 1,000, float32" in err
    path = results.save(run(steps=[row("serial", 2.0, 1000), row("naive", 0.1, 1000)]), tmp_path)
    assert targets.main(["--only", "small", "--from", str(path)]) == 0
    assert "| it | ≥ 0.1 | 0.05 **missed** |" in capsys.readouterr().out


def test_arrays_begin_where_they_are_placed(rng):
    placement = script("placement")
    values = rng.standard_normal(1000).astype(np.float32)
    memory = placement.memory_for(values)
    for offset in (0, 16, 4080):
        placed = placement.place(memory, offset, values)
        assert placed.ctypes.data % 4096 == offset
        assert placed.tobytes() == values.tobytes()


@pytest.mark.parametrize("name", ["placement", "prefetch"])
def test_experiments_run(name, capsys):
    assert script(name).main(["--sizes", "5e4", "--seconds", "0.001"]) == 0
    out = capsys.readouterr().out
    assert "| 50,000 float32 |" in out
    assert out.count("(1.00×)") >= 1


def test_prefetching_changes_no_bit(rng):
    prefetch = script("prefetch")
    arrays = rng.standard_normal((2, 70_001)).astype(np.float32)
    numbers = [np.float32(number) for number in (1e-3, 0.9, 0.1, 1e-8)]
    found = []
    for function, more in [(prefetch.naive, ()), (prefetch.ahead, (0,)), (prefetch.ahead, (48,)),
                           (prefetch.ahead_parallel, (24,))]:  # fmt: skip
        p, g, c = arrays[0].copy(), arrays[1], np.zeros_like(arrays[0])
        function(p, g, c, *numbers, *more)
        found.append(p.tobytes() + c.tobytes())
    assert len(set(found)) == 1
