"""`fastrms.mpi` under a real mpiexec, on 1, 2, 3 and 5 ranks, which run the programs in `on_ranks`."""

import functools
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import backends
import numpy as np
import pytest
from helpers import JIT, assert_same_bits, assert_same_state, leaves

from fastrms import RMSProp

HERE = Path(__file__).parent
CASES = [
    "updates.all_options_and_layouts",
    "updates.parameter_groups",
    "updates.none_on_all_ranks_is_skipped_and_on_some_is_zeros",
    "updates.gradients_whose_sum_is_rounded",
    "updates.norms_whose_squares_overflow_or_underflow",
    "updates.mean_is_the_default_reduction",
    "updates.nonfinite_gradients_raise_or_skip_on_all_ranks",
    "updates.nonfinite_sum_of_finite_gradients",
    "gradients.handed_over_in_any_order",
    "gradients.refused_when_handed_over_or_in_the_step",
    "gradients.longer_than_one_message",
    "gradients.aliases_of_the_gradient_buffer",
    "checkpoints.files_of_both_classes",
    "checkpoints.learning_rates_that_are_functions",
    "checkpoints.refused_checkpoints_change_nothing",
    "in_place.arrays_that_the_program_changes_between_steps",
    "in_place.all_ranks_start_from_the_values_of_rank_0",
    "in_place.arrays_that_cannot_be_written_on_one_rank_raise_on_all",
    "in_place.checkpoints_are_loaded_into_the_arrays",
    "in_place.arrays_in_every_form_and_order",
    "groups.have_the_bits_of_one_process",
    "groups.have_shards_of_their_own",
    "groups.have_state_in_16_bits",
    "groups.start_from_the_values_of_rank_0_or_must_be_equal",
    "groups.errors_on_one_rank_raise_on_all_and_nothing_is_half_made",
    "groups.an_interrupt_takes_the_group_out",
    "groups.are_refused_after_ready_and_the_gradients_are_kept",
    "groups.checkpoints_fit_optimizers_that_were_made_with_all_groups",
    "errors.parameters_and_options_are_compared_when_the_optimizer_is_made",
    "errors.errors_in_steps_raise_on_all_ranks",
    "errors.different_calls_raise_on_all_ranks",
    "errors.different_options_or_kinds_of_state_are_found_by_checkpoints",
    "errors.an_error_of_one_rank_ends_all_after_one_that_all_raised",
    "errors.timeout_values_and_late_ranks",
    "interruptions.users_code_that_raises_or_calls_the_optimizer",
    "interruptions.users_code_that_sets_options",
    "interruptions.a_schedule_that_shrinks_a_gradient",
    "interruptions.an_option_without_memory_for_its_state",
    "interruptions.signal_handlers_during_a_step",
    "interruptions.threads_that_set_an_option_wait_for_the_step",
    "resources.unknown_attributes_and_arguments_are_refused",
    "resources.each_of_p_ranks_has_1_p_of_the_state",
    "resources.threads_are_the_cores_of_a_rank_divided_by_the_ranks_that_share_them",
    "resources.some_ranks_among_themselves_and_messages_of_the_user",
    "resources.more_optimizers_than_mpi_has_communicators",
]
# A hang is a failure, whose message has all that was printed.
SECONDS = 300
RANKS = [1, 2, 3, 5] if JIT else [1, 3]  # one; shards of one size or not; more ranks than some shards

needs_mpi = pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed")


def mpiexec(ranks, *command, folder="."):
    """Run a command on so many ranks, and return its exit status and all that it prints."""
    launcher = backends.mpiexec(ranks)
    if launcher is None:
        pytest.skip("there is no mpiexec")
    environment = os.environ | {
        "MPI_TEST_FOLDER": str(folder),
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
        "PYTHONWARNINGS": "error",
    }
    try:
        run = subprocess.run(
            [*launcher, *map(str, command)], env=environment, cwd=folder, text=True, timeout=SECONDS,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"no end after {SECONDS} s, with\n{(error.stdout or b'').decode()}") from None
    return run.returncode, run.stdout


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Return a function that runs all cases on so many ranks, once, and returns the exit status and the output."""

    @functools.cache
    def run(ranks):
        return mpiexec(
            ranks, sys.executable, "-m", "on_ranks", *CASES, folder=tmp_path_factory.mktemp(f"ranks-{ranks}")
        )

    return run


@needs_mpi
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_on_ranks(case, ranks, outcome):
    _, printed = outcome(ranks)
    assert f"ok {case}\n" in printed, printed


@needs_mpi
def test_all_cases_end_without_an_error(outcome):
    for ranks in RANKS:
        status, printed = outcome(ranks)
        assert (status, printed.split()[1::2]) == (0, CASES), printed


@needs_mpi
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, monkeypatch):
    status, printed = mpiexec(3, sys.executable, "-m", "on_ranks", "checkpoints.save", folder=tmp_path)
    assert (status, printed) == (0, "ok checkpoints.save\n")
    for ranks in (1, 2):
        status, printed = mpiexec(ranks, sys.executable, "-m", "on_ranks", "checkpoints.resume", folder=tmp_path)
        assert (status, printed) == (0, "ok checkpoints.resume\n")
    # Without MPI, from the same numbers.
    monkeypatch.syspath_prepend(HERE)
    from on_ranks import shared

    layout = shared.LAYOUTS["odd"]
    never_stopped = RMSProp(shared.params_of(layout), momentum=0.9, centered=True, bias_correction=True)
    resumed = RMSProp.from_checkpoint(tmp_path / "across.npz")
    for step in range(6):
        never_stopped.step(shared.gradients_of_all(layout, step))
        if step >= 3:
            resumed.step(shared.gradients_of_all(layout, step))
    others = [RMSProp.from_checkpoint(tmp_path / f"resumed-{ranks}.npz") for ranks in (1, 2)]
    for opt in (resumed, *others):
        for name, array in never_stopped.state_dict()["arrays"].items():
            assert_same_bits(opt.state_dict()["arrays"][name], array, name)
        assert leaves(opt.params)[0].shape == leaves(never_stopped.params)[0].shape


@needs_mpi
def test_a_run_with_an_added_group_goes_on_with_another_number_of_ranks(tmp_path, monkeypatch):
    for ranks, case in ((3, "groups.save"), (1, "groups.resume"), (2, "groups.resume")):
        status, printed = mpiexec(ranks, sys.executable, "-m", "on_ranks", case, folder=tmp_path)
        assert (status, printed) == (0, f"ok {case}\n")
    monkeypatch.syspath_prepend(HERE)
    from on_ranks import shared

    layouts = shared.LAYOUTS["odd"], shared.LAYOUTS["one"]
    body, head = map(shared.params_of, layouts)
    never_stopped = RMSProp([{"params": body}, {"params": head, "centered": True}], momentum=0.9)
    for step in range(6):
        never_stopped.step([shared.gradients_of_all(layout, step) for layout in layouts])
    for ranks, name in itertools.product((1, 2), ("made", "added")):
        assert_same_state(RMSProp.from_checkpoint(tmp_path / f"resumed-{ranks}-{name}.npz"), never_stopped, name)


@needs_mpi
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("outside", "rank 2 of 3 ends with ValueError: no data on this rank; it also ends the other ranks"),
        ("inside", r"StructureError: gradients\[0\]: expected shape \(50,\), got \(51,\)"),
    ],
)
def test_an_exception_on_one_rank_ends_all(case, message, tmp_path):
    status, printed = mpiexec(3, sys.executable, "-m", "on_ranks.ending", case, folder=tmp_path)
    assert status != 0
    assert re.search(message, printed), printed
    assert "Traceback (most recent call last)" in printed
    assert ("the hook that was there" in printed) == (case == "outside")
    assert "unreachable" not in printed
    assert f"ok {case}" not in printed


STEP = r"step\(\) \(steps taken: {}\)"
WAITS = r"RankError: rank {} of 3 waited \d+\.\d s in {} for {}, which did not join"


def waits(where, ranks, missing):
    """Return the messages of ranks that wait in a call for others."""
    named = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
    others = {rank: [other for other in ranks if other != rank] for rank in ranks}
    return [
        WAITS.format(rank, where, named)
        + (f"; rank {', '.join(map(str, others[rank]))} waits in {where}" if others[rank] else "")
        for rank in ranks
    ]


DIFFERENT = r"RankError: expected the same call on all ranks, got {} on rank 0, {} on ranks 1, 2; nothing was changed"


# Messages that on_ranks/ending.py prints.
ENDS = {
    "saves_alone": waits(r"save\(\) \(steps taken: 1\)", [0], [1, 2]),
    "saves_alone_while_others_step": [DIFFERENT.format(r"save\(\)", r"step\(\)")],
    "fewer_steps": waits(STEP.format(2), [0, 1], [2]),
    "fewer_steps_and_busy": waits(STEP.format(2), [0, 1], [2]),
    "raised_and_caught": waits(STEP.format(2), [0, 1], [2]),
    "handed_over": waits(STEP.format(0), [0, 1], [2]),
    "made_alone": waits(r"ShardedRMSProp\(\)", [0], [1, 2]),
    "loaded_alone": [DIFFERENT.format(r"ShardedRMSProp\(\)", r"ShardedRMSProp\.from_checkpoint\(\)")],
    "crossed": [*waits(STEP.format(0), [0, 1], [2]), *waits(STEP.format(0), [2], [0, 1])],
    "interrupted": [
        "TimeoutError: this rank is late\nfastrms: rank 0 of 3 ends in the middle of a call and also ends "
    ],
    "killed": [],
}


@needs_mpi
@pytest.mark.parametrize("case", ENDS)
def test_ranks_that_wait_for_ever_say_for_whom_and_end(case, tmp_path):
    status, printed = mpiexec(3, sys.executable, "-m", "on_ranks.ending", case, folder=tmp_path)
    assert status != 0
    for message in ENDS[case]:
        assert re.search(message, printed), printed
    # The traceback has the line of the user's program.
    assert case == "killed" or f"in {case}\n" in printed


@needs_mpi
def test_under_the_runner_of_mpi4py_an_exit_of_one_rank_ends_all(tmp_path):
    status, printed = mpiexec(3, sys.executable, "-m", "mpi4py", "-m", "on_ranks.ending", "with_exit", folder=tmp_path)
    assert status == 1
    assert "no data on this rank" in printed
    assert "unreachable" not in printed


@needs_mpi
def test_an_interactive_session_goes_on(tmp_path):
    code = """if True:
        import sys
        import numpy as np
        from fastrms.mpi import ShardedRMSProp
        sys.ps1 = ">>> "
        opt = ShardedRMSProp([np.ones(3)], kernel="numpy")
        sys.excepthook(ValueError, ValueError("a slip"), None)
        opt.step([np.ones(3)])
        print("went on")
    """
    status, printed = mpiexec(2, sys.executable, "-c", code, folder=tmp_path)
    assert (status, printed.count("went on"), printed.count("a slip")) == (0, 2, 2), printed


@needs_mpi
def test_an_interactive_session_goes_on_without_the_optimizer_whose_ranks_did_not_come(tmp_path):
    code = """if True:
        import sys
        import time
        import numpy as np
        from mpi4py import MPI
        from fastrms import RankError
        from fastrms.mpi import ShardedRMSProp
        sys.ps1 = ">>> "
        opt = ShardedRMSProp([np.ones(3)], kernel="numpy", timeout=0.3)
        if MPI.COMM_WORLD.rank == 0:
            for text in ("which did not join", "this optimizer lost the other ranks"):
                try:
                    opt.step([np.ones(3)])
                except RankError as error:
                    assert text in str(error), str(error)
                else:
                    raise AssertionError("unreachable")
        else:
            time.sleep(2)
        print("went on")
    """
    status, printed = mpiexec(2, sys.executable, "-c", code, folder=tmp_path)
    assert (status, printed.count("went on")) == (0, 2), printed


def test_without_mpi4py_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    for name in [name for name in sys.modules if name.split(".")[:2] == ["fastrms", "mpi"]]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"mpi4py is not installed.*fastrms\[mpi\]"):
        importlib.import_module("fastrms.mpi")


@needs_mpi
def test_without_a_library_of_mpi_it_is_said_what_to_install(tmp_path):
    environment = os.environ | {"MPI4PY_LIBMPI": str(tmp_path / "libmpi.so")}
    run = subprocess.run(
        [sys.executable, "-m", "fastrms", "demo", "--mpi"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1
    message = r"fastrms demo: error: mpi4py finds no MPI \(.*\); install with: .*\"fastrms\[mpi-bundled\]\".*\n"
    assert re.fullmatch(message, run.stderr), run.stderr


TINY = ["--hidden", "5", "--epochs", "2", "--batch-size", "179"]  # the last batch has 5 rows


def demo(ranks, folder, *arguments):
    return mpiexec(ranks, sys.executable, "-m", "fastrms", "demo", "--mpi", *TINY, *arguments, folder=folder)


@needs_mpi
@pytest.mark.skipif(not JIT, reason="a training, for which the interpreter takes minutes")
@pytest.mark.parametrize(("ranks", "gradients", "dtype"), [(2, "list", "float32"), (3, "buffer", "float64")])
def test_the_demo_has_the_losses_of_one_process(ranks, gradients, dtype, tmp_path):
    status, printed = demo(ranks, tmp_path, "--gradients", gradients, "--dtype", dtype)
    assert status == 0, printed
    assert printed.count("Result: ") == 1  # of one rank
    assert re.search(rf"one process +{ranks} ranks +speed-up", printed)
    differences = r"at most (\S+) of the loss in the first 10 steps, and by at most (\S+) in all 18 steps"
    first, every = map(float, re.search(differences, printed).groups())
    assert max(first, every) < (1e-5 if dtype == "float32" else 1e-13)
    losses = re.search(r"final training loss +(\S+) +(\S+)", printed).groups()
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-4)
    assert (tmp_path / "fastrms-demo.png").stat().st_size > 10_000
    # A shard is a multiple of 16 elements; a rank sends 2 (P - 1)/P of the parameters.
    own, whole, sent = map(_bytes, re.search(r"\(here (.*?) of (.*?) on .* sends (.*?) a step", printed).groups())
    assert 385 * np.dtype(dtype).itemsize <= whole < 1.1 * 385 * np.dtype(dtype).itemsize
    assert own == pytest.approx(whole / ranks, abs=16 * np.dtype(dtype).itemsize)
    assert sent == pytest.approx(2 * (ranks - 1) / ranks * whole, rel=0.01)


def _bytes(text):
    number, unit = text.split()
    return float(number) * {"B": 1, "kB": 1000}[unit]


@needs_mpi
@pytest.mark.skipif(not JIT, reason="a training, for which the interpreter takes minutes")
def test_the_demo_on_one_rank_and_with_more_ranks_than_rows(tmp_path):
    assert re.search(r"one process +1 rank +speed-up", demo(1, tmp_path)[1])
    np.savez(tmp_path / "few.npz", X=np.arange(60.0).reshape(20, 3) % 7, y=np.arange(20) % 2)
    status, printed = demo(3, tmp_path, "--batch-size", "2", "--epochs", "1", "--data", "few.npz", "--quiet")
    assert (status, printed) == (0, "")


@needs_mpi
@pytest.mark.skipif(not JIT, reason="a training, for which the interpreter takes minutes")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "none.npz"], "fastrms demo: error: none.npz: cannot be read: No such file or directory\n"),
        (["--lr", "1e38", "--epochs", "50"], "fastrms demo: error: the training diverged: the loss is "),
    ],
)
def test_an_error_of_the_demo_ends_all_ranks_with_one_message(arguments, message, tmp_path):
    status, printed = demo(2, tmp_path, *arguments)
    assert status != 0
    assert printed.count("fastrms demo: error: ") == 1
    assert message in printed


@needs_mpi
@pytest.mark.skipif(not JIT, reason="a training, for which the interpreter takes minutes")
def test_the_demo_fails_where_the_losses_are_not_those_of_one_process(tmp_path):
    # Ranks see other rows than one process does.
    code = """if True:
        import sys
        from fastrms.cli import main
        from fastrms.demo import data_parallel
        whole = data_parallel.loss_and_gradients
        data_parallel.loss_and_gradients = lambda params, x, y, out: whole(params, 1.01 * x, y, out)
        sys.exit(main(sys.argv[1:]))
    """
    status, printed = mpiexec(2, sys.executable, "-c", code, "demo", "--mpi", *TINY, folder=tmp_path)
    assert status != 0
    assert "expected at most 3.5e-04 of the loss in the first 10 steps" in printed


BENCHMARK = HERE.parent.parent / "benchmarks" / "mpi.py"


@needs_mpi
@pytest.mark.skipif(not JIT, reason="measures compiled code")
def test_the_benchmark_counts_the_bytes_that_the_formula_says():
    arguments = ["--seconds", "0", "--sizes", "10000", "100000", "--ranks", "1", "2"]
    run = subprocess.run([sys.executable, str(BENCHMARK), *arguments], capture_output=True, text=True, timeout=SECONDS)
    assert run.returncode == 0, run.stdout + run.stderr
    (row,) = re.findall(r"^\| 100,000 \| 2 \|.*$", run.stdout, re.MULTILINE)
    sent, formula = (int(cell.replace(",", "")) for cell in row.strip("| ").split(" | ")[-2:])
    assert formula == 400_000
    # Headers, barriers and the small message of a step besides; and whatever else uses the device meanwhile.
    assert 400_000 <= sent < 600_000
    for name in ("mpi-inputs", "mpi-here", "mpi-network"):
        assert name in run.stdout


def test_the_model_of_the_benchmark(tmp_path):
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("benchmark_mpi", BENCHMARK)
    model = sys.modules["benchmark_mpi"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(model)
    true = model.Machine(latency=3e-6, bandwidth=4e9, rate=2e9, overhead=2e-5, alone=5e-6, flops=5e10)
    assert model.bytes_of_rank(100, 4) == 600
    assert true.communication(10**6, 8) == pytest.approx(9 * 3e-6 + 7e6 / 4e9)
    assert true.update(10**6, 1) == pytest.approx(5e-6 + 1e6 / 2e9)
    times = {ranks: {size: (true.step(size, ranks), true.communication(size, ranks)) for size in (10**3, 10**5, 10**7)}
             for ranks in (1, 2, 4, 8)}  # fmt: skip
    for ranks in times[8]:
        times[8][ranks] = (1.0, 0.5)  # for more ranks than cores, which are not fitted
    found = model.fit(times, 5e10, cores=4)
    for name in ("latency", "bandwidth", "rate", "overhead", "alone", "flops"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-6)
    over = true.takes_over(10**8)
    assert true.communication(10**8, over) > true.update(10**8, over) + true.gradients(10**8, over)
    assert true.communication(10**8, over // 2) <= true.update(10**8, over // 2) + true.gradients(10**8, over // 2)
    model.plot(times, found, true).savefig(tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 10_000
    del sys.modules["benchmark_mpi"]
