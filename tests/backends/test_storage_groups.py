"""Groups that are added to a folder: bits, files of their own, checkpoints, pages and memory."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from cases import OPTION_SETS, OPTIONS
from checkpoint_files import KINDS, transfer
from helpers import JIT, PEAK, assert_same_bits, assert_same_state, contents, items

from fastrms import DtypeError, RMSProp, StructureError
from fastrms._checks import GROUP_DEFAULTS
from fastrms.backends.pages import Pages
from fastrms.buffers.flat import lies_in

BODY = {"W": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3), "b": np.linspace(-1, 1, 5)}
HEAD = [np.linspace(-2, 1, 7, dtype=np.float32), np.linspace(0, 1, 3)]
LATER = np.linspace(-1, 2, 9001)


def grown(storage=None, options=None, **later):
    """An optimizer with a group from the start and one that was added after a step."""
    opt = RMSProp(BODY, storage=storage, **(options or {}))
    opt.step(BODY)
    opt.add_param_group({"params": HEAD, **later})
    return opt


def made_whole(options=None, **later):
    """The same with both groups from the start, in memory."""
    opt = RMSProp([{"params": BODY}, {"params": HEAD, **later}], kernel="numpy", **(options or {}))
    opt.step([BODY, [None, None]])
    return opt


@pytest.mark.parametrize("options", [OPTIONS, OPTION_SETS["skipping"], {}], ids=["all", "skipping", "defaults"])
def test_a_run_that_is_reopened_between_groups_has_the_bits_of_memory(options, path, small_parts):
    later = {"lr": 0.5, "momentum": 0.5, "centered": True, "initial_scale": 0.25}
    opt, inside = grown(path, options, **later), made_whole(options, **later)
    gradients = [BODY, HEAD]
    for t in range(4):
        for each in (opt, inside):
            each.step(gradients)
        assert_same_state(opt, inside, f"step {t}")
        opt.close()
        opt = RMSProp.reopen(path)
        assert_same_state(opt, inside, f"reopened {t}")
        if t == 1:
            for each in (opt, inside):
                # The options of the constructor, which a folder does not have.
                each.add_param_group({"params": LATER} | {k: v for k, v in options.items() if k in GROUP_DEFAULTS})
            gradients = [BODY, [None, HEAD[1]], LATER]
        if t == 2:
            for each in (opt, inside):
                for group in each.param_groups:
                    group.update(momentum=0.25, centered=True)
    opt.close()


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_fit_folders_with_and_without_groups_that_were_added(kind, path, tmp_path, small_parts):
    options = {"momentum": 0.9, "bias_correction": True}
    added, inside = grown(path, options), made_whole(options)
    other_order = [{"params": {name: BODY[name] for name in ("b", "W")}}, {"params": HEAD}]
    stored = RMSProp(other_order, storage=tmp_path / "stored", lr=0.5)
    for source, target in ((added, stored), (stored, added), (inside, added)):
        for opt in (added, inside):
            opt.step([BODY, HEAD])
        stored.step([BODY, [None, None]])
        transfer(source, target, kind, tmp_path)
        assert_same_values(source, target)
    for opt in (added, inside):
        opt.step([BODY, HEAD])
    assert_same_state(added, inside)
    if kind == "dict":
        return
    added.save(tmp_path / f"last.{kind}")
    for storage in (None, tmp_path / "again"):
        assert_same_state(RMSProp.from_checkpoint(tmp_path / f"last.{kind}", storage=storage), inside)
    assert version_of(tmp_path / "again") == 1


def assert_same_values(ours, theirs):
    for name in ("params", "cache", "momentum_buffer"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        for key in BODY:
            assert_same_bits(mine[0][key], other[0][key], name)
        for one, two in zip(mine[1], other[1], strict=True):
            assert_same_bits(one, two, name)
    assert ours.steps == theirs.steps


def test_one_parameter_at_a_time(path, small_parts):
    opt, inside = grown(path, {"momentum": 0.5}), made_whole({"momentum": 0.5})
    for key, gradient in (((1, 1), HEAD[1]), ((0, "W"), BODY["W"]), ((1, 0), HEAD[0])):
        opt.step_parameter(key, gradient)
    opt.step_rows((0, "b"), np.arange(5), BODY["b"])
    inside.step([BODY, HEAD])
    assert_same_state(opt, inside)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_only_the_pages_of_the_parameter_are_touched(path, monkeypatch):
    touched, advise = [], Pages._advise

    def note(pages, array, advice):
        touched.append(array)
        advise(pages, array, advice)

    opt = RMSProp([np.ones(3000)], momentum=0.9, storage=path)
    opt.add_param_group({"params": [np.ones(5000), np.ones(4000)]})
    gradient = np.ones(5000)
    with monkeypatch.context() as patch:
        patch.setattr(Pages, "_advise", note)
        opt.step_parameter((1, 0), gradient)
    own = [buffer.leaves[1] for buffer in opt.buffers.values()]
    inside = [array for array in touched if not np.may_share_memory(array, gradient)]
    assert inside
    assert all(any(lies_in(array, leaf) for leaf in own) for array in inside)


def test_the_files_of_a_group(path):
    opt = RMSProp([{"params": BODY}, {"params": HEAD}], storage=path)
    names = {"params", "grads", "cache", "counts"}
    before = {"head.json", "lock", *(f"{name}.bin" for name in names)}
    assert (set(contents(path)), version_of(path)) == (before, 1)
    opt.add_param_group({"params": LATER})
    added = {f"{name}-2.bin" for name in names}
    assert (set(contents(path)), version_of(path)) == (before | added, 2)
    opt.momentum = 0.5
    assert set(contents(path)) - before - added == {"momentum_buffer.bin", "momentum_buffer-2.bin"}
    opt.close()
    for view in items([opt.params, opt.momentum_buffer]):
        assert not view.flags.writeable
    RMSProp.reopen(path).close()


def version_of(path):
    return json.loads((path / "head.json").read_text())["storage"]["version"]


def test_views_stay_and_those_of_the_new_group_are_in_its_files(path):
    opt = RMSProp(BODY, storage=path)
    view, container = opt.params["W"], opt.params
    opt.add_param_group({"params": HEAD})
    assert opt.params[0] is container
    assert opt.params[0]["W"] is view
    opt.params[1][0][...] = 5
    opt.buffers["grads"].gather([BODY, HEAD])
    assert_same_bits(opt.grads[1][1], HEAD[1])
    assert opt.check() == opt.check(head=opt.params[1]) == []
    opt.flush()
    assert np.fromfile(path / "params-1.bin", np.float32)[:7].tolist() == [5] * 7
    head = json.loads((path / "head.json").read_text())
    assert head["storage"] == {"version": 2, "clean": True, "buffers": ["params", "grads", "cache"], "added": 1}


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"params": [np.ones(2, int)]}, DtypeError, r"params\[1\]\[0\]: expected float32 or float64"),
        ({"params": {(1, 2): np.ones(2)}}, StructureError, "storage: expected dicts whose keys are None, str"),
    ],
)
def test_a_group_that_is_refused_leaves_no_file(group, error, message, path):
    opt = RMSProp([np.ones(2)], storage=path)
    opt.flush()
    before = contents(path)
    with pytest.raises(error, match=message):
        opt.add_param_group(group)
    with pytest.raises(StructureError, match="shares memory with a parameter of another group"):
        opt.add_param_group({"params": [opt.params[0]]})
    assert contents(path) == before


# Memory.

MEMORY = f"""
    import sys
    import numpy as np
    from fastrms import RMSProp

    {PEAK}

    kernel, half = sys.argv[2], 2_500_000
    one = np.float32(1)
    warm = RMSProp([np.ones(70_000, "f")], kernel=kernel, clip_norm=1.0, momentum=0.5)
    warm.add_param_group({{"params": [np.ones(70_000, "f")]}})
    warm.step()
    warm.step([[np.ones(70_000, "f")]] * 2)
    warm.save(sys.argv[1] + "/warm.npz")
    warm.load(sys.argv[1] + "/warm.npz")
    peak()
    before = peak()
    opt = RMSProp(
        [np.broadcast_to(one, (4, half))], storage=sys.argv[1] + "/run", kernel=kernel, clip_norm=1.0,
        momentum=0.5, initial_scale=0.5,
    )
    peak()
    opt.add_param_group({{"params": [np.broadcast_to(one, (4, half)), np.ones(5, "f")]}})
    print("adding", peak() - before)
    for _ in range(2):
        opt.step()
    print("step", peak() - before)
    opt.step([[np.broadcast_to(0.5, (4, half))], [np.broadcast_to(0.5, (4, half)), np.ones(5)]])
    print("casting", peak() - before)
    opt.save(sys.argv[1] + "/a.npz")
    print("save", peak() - before)
    opt.load(sys.argv[1] + "/a.npz")
    print("load", peak() - before)
    opt.close()
    print("close", peak() - before)
    with RMSProp.reopen(sys.argv[1] + "/run", kernel=kernel) as opt:
        opt.step()
        print("reopened", peak() - before)
        assert opt.params[1][0][0, 0] == opt.params[0][0][-1, -1] < 1
"""


@pytest.mark.skipif(not JIT or sys.platform != "linux", reason="pages are given back on Linux; the JIT for its speed")
@pytest.mark.parametrize("kernel", ["serial", "numpy"])
def test_what_is_in_memory_at_once_is_bounded(kernel, tmp_path):
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(MEMORY), tmp_path, kernel]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    words = done.stdout.split()
    found = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    # 40 MB for each of two groups and four buffers, 320 MB in all.
    assert {what: nbytes for what, nbytes in found.items() if nbytes > 25 << 20} == {}
    assert len(found) == 7
