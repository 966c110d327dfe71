"""Options that are set: with all that they need or not at all, together, and under names that something reads."""

import copy
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import JIT

from fastrms import OptionError, RMSProp, StructureError
from fastrms._checks import GROUP_DEFAULTS

# Options that need a buffer: turning one on may find that there is no memory for it.
NO_MEMORY = """if True:
    import resource, sys
    from contextlib import suppress
    import numpy as np
    from fastrms import RMSProp
    start, gradients = [np.linspace(-1, 1, 4_000_000)], [np.linspace(1, 2, 4_000_000)]
    opt, other = RMSProp(start), RMSProp(start)
    opt.step(gradients), other.step(gradients)
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), limits[1]))
    held = []
    with suppress(MemoryError):  # what was freed before has no place for the buffer any more
        held.extend(np.empty(1_000_000) for _ in range(1000))
    try:
        exec(sys.argv[1])
    except MemoryError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    opt.step(gradients), other.step(gradients)
    print(opt.params[0].tobytes() == other.params[0].tobytes(), opt.param_groups, sorted(opt.buffers), opt.check())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.skipif(not JIT, reason="millions of elements, which the interpreter takes a minute for")
@pytest.mark.parametrize(
    "code",
    [
        "opt.param_groups[0]['momentum'] = 0.9", "opt.momentum = 0.9", "opt.centered = True",
        "opt.param_groups[0].update(lr=0.5, momentum=0.9, nesterov=True)", "opt.param_groups[0] |= {'centered': True}",
    ],
)  # fmt: skip
def test_an_option_whose_buffer_cannot_be_made_is_not_set(code):
    done = subprocess.run([sys.executable, "-c", NO_MEMORY, code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "expected arrays that fit into memory, got 32,000,000 bytes, which every buffer needs",
        "True [ParamGroup(lr=0.001)] ['cache', 'grads', 'params'] []",
    ], done.stderr


@pytest.mark.parametrize(
    ("name", "value"), [("global_clip_norm", 1.0), ("nonfinite", "skip"), ("kernel", "numpy"), ("num_threads", 1)]
)
def test_an_option_of_the_whole_whose_change_fails_stays_as_it_was(name, value, monkeypatch):
    opt = RMSProp([np.ones(2)], kernel="serial")
    before = getattr(opt, name)

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(opt.backend, "options_changed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        setattr(opt, name, value)
    assert getattr(opt, name) == before


def test_options_of_all_groups_are_attributes_and_set_whole():
    opt = RMSProp([{"params": [np.ones(2)]}, {"params": [np.ones(3)], "nesterov": True, "momentum": 0.5}])
    for name, value in {"momentum": 0.9, "weight_decay": 0.1, "centered": True, "clip_norm": 1.0}.items():
        setattr(opt, name, value)
        assert [group[name] for group in opt.param_groups] == [value, value]
    with pytest.raises(OptionError, match="nesterov"):
        opt.momentum = 0.0  # which the second group cannot have
    assert opt.momentum == 0.9
    assert set(GROUP_DEFAULTS) <= set(dir(RMSProp))


# What nobody would read, and what the error has to say.
UNREAD = {
    "learning_rate": "expected 'lr', which keras, ",
    "alpha": "expected 'decay_rate', which torch, ",
    "rho": "expected 'decay_rate', which keras",
    "eps": "expected 'epsilon', which torch",
    "clipnorm": "expected 'clip_norm', which keras calls 'clipnorm'; fastrms.dialect('keras', clipnorm=...) accepts",
    "weight_decy": "did you mean 'weight_decay'?",
    "nestrov": "did you mean 'nesterov'?",
    "anything": "the options are ",
}


@pytest.mark.parametrize("name", UNREAD)
def test_an_attribute_that_nothing_reads_cannot_be_set(name):
    opt = RMSProp([np.ones(2)])
    message = re.escape(UNREAD[name])
    with pytest.raises(AttributeError, match=f"^{name}: .*{message}"):
        setattr(opt, name, 0.5)
    if name != "anything":
        with pytest.raises(TypeError, match=f"^{name}: RMSProp has no such argument; .*{message}"):
            RMSProp([np.ones(2)], **{name: 0.5})
    with pytest.raises(OptionError, match=f"{name!r} is not an option of a parameter group; .*{message}"):
        opt.param_groups[0][name] = 0.5


def test_what_holds_an_optimizer_together_cannot_be_replaced():
    opt = RMSProp([np.ones(2)])
    for thing, name in ((opt, "param_groups"), (opt, "buffers"), (opt.buffers["params"], "views"),
                        (opt.buffers["params"], "block")):  # fmt: skip
        with pytest.raises(AttributeError, match=name):
            setattr(thing, name, [])
    with pytest.raises(AttributeError, match=r"^lr: a parameter group has no such attribute; write group\['lr'\]"):
        opt.param_groups[0].lr = 0.5
    with pytest.raises(AttributeError, match=r"^size_: FlatBuffer has no such attribute; did you mean 'size'\?"):
        opt.buffers["params"].size_ = 3
    for change in (
        lambda groups: groups.append({"params": [np.ones(2)]}),
        lambda groups: groups.__setitem__(0, {"lr": 0.5}),
        lambda groups: groups.clear(),
        lambda groups: groups.extend([]),
        lambda groups: groups.__delitem__(0),
        lambda groups: groups.sort(),
        lambda groups: groups.__iadd__([]),
    ):
        with pytest.raises(StructureError, match="param_groups: expected the groups that the optimizer was made with"):
            change(opt.param_groups)
    with pytest.raises(TypeError, match="does not support item assignment"):
        opt.buffers["cache"] = opt.buffers["params"]
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert repr(other.param_groups) == "[ParamGroup(lr=0.001)]"


def test_an_unknown_attribute_is_compared_with_options_only():
    opt = RMSProp([np.ones(2)])
    with pytest.raises(AttributeError, match=r"^anything: .*; the options are bias_correction, buffers, cache, "):
        opt.anything = 0.5


def test_the_stream_of_an_optimizer_on_the_host_is_none():
    opt = RMSProp([np.ones(2)], stream=None)
    opt.stream = None
    with pytest.raises(OptionError, match=r'^stream: expected an optimizer with kernel="cuda", got a stream .*: 1$'):
        opt.stream = 1
    assert opt.stream is None
    opt.synchronize()


def test_a_class_of_somebody_elses_may_have_attributes_of_its_own():
    class Logged(RMSProp):
        def __init__(self, params, **options):
            super().__init__(params, **options)
            self.history = []

        def step(self, gradients=None):
            self.history.append(self.steps)
            return super().step(gradients)

    opt = Logged([np.ones(2)])
    opt.step()
    assert opt.history == [0]
    opt.backends = ["nccl"]  # similar to a name that is not an option
    with pytest.raises(AttributeError, match="expected 'lr'"):
        opt.learning_rate = 0.5


@pytest.mark.parametrize("options", [{"nesterov": True, "momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_options_that_go_together_are_set_together_in_any_order(options):
    for change in (
        lambda groups: groups[0].update(**options),
        lambda groups: groups[0].update(options),
        lambda groups: groups[0].update(list(options.items())),
        lambda groups: groups[0].__ior__(options),
        lambda groups: groups.__setitem__(0, groups[0].__ior__(options)),  # groups[0] |= options
    ):
        opt = RMSProp([np.ones(2)])
        change(opt.param_groups)
        assert opt.param_groups[0]["nesterov"]
        other = RMSProp([np.ones(2)], **options)
        for optimizer in (opt, other):
            optimizer.step([np.full(2, 0.5)])
        assert opt.params[0].tobytes() == other.params[0].tobytes()
    group = RMSProp([np.ones(2)]).param_groups[0]
    with pytest.raises(OptionError, match="decay_rate"):
        group.update(lr=0.5, decay_rate=2)
    assert group["lr"] == 1e-3


def calls_of(function):
    """How many Python functions a function calls, itself included."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    "what",
    [
        lambda groups: RMSProp(groups),
        lambda groups, opt: setattr(opt, "lr", 0.5),
        lambda groups, opt: [group.update(lr=0.5) for group in opt.param_groups],
        lambda groups, opt: opt.step(),
    ],
    ids=["made", "all", "one by one", "step"],
)
def test_work_grows_with_the_number_of_groups_and_not_faster(what):
    counts = []
    for many in (100, 200):
        groups = [{"params": [np.ones(2)]} for _ in range(many)]
        arguments = (groups, RMSProp(groups))[: what.__code__.co_argcount]
        counts.append(calls_of(lambda arguments=arguments: what(*arguments)))
    assert counts[1] < 2.2 * counts[0]
