"""Checkpoints: keys of dicts come back as they were, in any order, or are refused."""

from collections import namedtuple
from dataclasses import dataclass, field

import numpy as np
import pytest
from cases import KEYS, OTHER_KEYS
from checkpoint_files import KINDS, transfer
from helpers import assert_same_bits, everything, leaves

from fastrms import CheckpointError, RMSProp


def test_what_a_file_cannot_hold_is_said(tmp_path):
    path = tmp_path / "state.npz"
    RMSProp([np.ones(2)], lr=lambda step: 0.1).save(path)
    with pytest.raises(
        CheckpointError, match=r"lr: expected a learning rate for the groups whose learning rate was a function"
    ):
        RMSProp.from_checkpoint(path)
    schedule = lambda step: 0.5  # noqa: E731
    assert RMSProp.from_checkpoint(path, lr=schedule).lr is schedule
    RMSProp({(1, 2): np.ones(2)}).save(path)
    with pytest.raises(CheckpointError, match=r"structure: cannot be rebuilt; make an RMSProp and use load"):
        RMSProp.from_checkpoint(path)
    RMSProp({(1, 2): np.zeros(2)}).load(path)
    point = namedtuple("point", "x y")
    RMSProp(point(np.ones(2), np.ones(1))).save(path)
    assert type(RMSProp.from_checkpoint(path).params) is tuple


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("key", KEYS, ids=repr)
def test_keys_that_come_back(key, kind, tmp_path):
    if kind == "safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"state.{kind}"
    RMSProp({key: [np.ones(2)], "b": {key: np.ones(1)}}).save(path)
    params = RMSProp.from_checkpoint(path).params
    for found in (next(iter(params)), next(iter(params["b"]))):
        assert (type(found), repr(found)) == (type(key), repr(key))


@pytest.mark.parametrize("key", OTHER_KEYS, ids=repr)
def test_keys_that_a_file_cannot_give_back(key, tmp_path):
    path = tmp_path / "state.npz"
    opt = RMSProp([{key: np.ones(2)}])
    opt.step([{key: np.ones(2)}])
    opt.save(path)
    with pytest.raises(CheckpointError, match="structure: cannot be rebuilt; make an RMSProp and use load"):
        RMSProp.from_checkpoint(path)
    again = RMSProp([{key: np.zeros(2)}])
    again.load(path)
    assert everything(again) == everything(opt)


def test_keys_that_no_other_process_can_find(tmp_path):
    for key in (np.ones, object(), (1, object())):
        with pytest.raises(
            CheckpointError, match=r"params: expected keys with the same repr in all processes, .*; got .* at 0x"
        ):
            RMSProp([np.ones(1), {key: np.ones(2)}]).save(tmp_path / "state.npz")
    assert list(tmp_path.iterdir()) == []


# As an optimizer has them, and as another has them whose dicts came in another order.
ORDERS = {
    "dict": ({"a": (3,), "b": (2, 2), "c": (), "d": (3,)}, {"d": (3,), "b": (2, 2), "a": (3,), "c": ()}),
    "neighbours": ({"a": (3,), "b": (4,), "c": (5,)}, {"c": (5,), "a": (3,), "b": (4,)}),
    "deep": ([{"x": {"a": (3,), "b": (0,)}, "y": (3,)}, (2,)], [{"y": (3,), "x": {"b": (0,), "a": (3,)}}, (2,)]),
    "groups": (
        [{"params": {"a": (3,), "b": (3,)}}, {"params": {"c": (2,), "d": (1,)}, "momentum": 0.5}],
        [{"params": {"b": (3,), "a": (3,)}}, {"params": {"d": (1,), "c": (2,)}, "momentum": 0.5}],
    ),
}  # fmt: skip


def filled(tree, rng, dtypes):
    """Arrays for shapes, with a dtype that depends on the key or place of each."""
    if isinstance(tree, dict):
        return {
            key: item if key == "momentum" else filled(item, rng, dtypes[::-1] if key in ("b", "y") else dtypes)
            for key, item in tree.items()
        }
    if isinstance(tree, list):
        return [filled(item, rng, dtypes) for item in tree]
    return np.asarray(rng.standard_normal(tree)).astype(dtypes[0])


def reordered(tree, like):
    """`tree` with the keys of dicts in the order of `like`."""
    if isinstance(like, dict):
        return {key: reordered(tree[key], item) for key, item in like.items()}
    if isinstance(like, list):
        return [reordered(*pair) for pair in zip(tree, like, strict=True)]
    return tree


@pytest.mark.parametrize("storage", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", ["ff", "fd", "bfloat16"])
@pytest.mark.parametrize("name", ORDERS)
def test_keys_in_another_order_are_matched_by_path(name, dtypes, kind, storage, rng, tmp_path, monkeypatch):
    monkeypatch.setattr("fastrms.backends.pages.PART_BYTES", 8)
    shapes, others = ORDERS[name]
    options = {"momentum": 0.5, "centered": True, "bias_correction": True}
    if dtypes == "bfloat16":
        dtypes, options["cache_dtype"] = "ff", "bfloat16"
    start = filled(shapes, rng, dtypes)
    first = RMSProp(start, **options)
    grads = [group["params"] for group in start] if name == "groups" else start
    order = [group["params"] for group in others] if name == "groups" else others
    first.step(grads)
    first.step(first.buffers["grads"].layout.structure([None, *leaves(grads)[1:]]))  # sat out
    second = RMSProp(reordered(start, others), **options, **({"storage": tmp_path / "run"} if storage else {}))
    views = second.params
    transfer(first, second, kind, tmp_path)
    assert second.params is views
    for step in range(3):
        if step:
            first.step(grads)
            second.step(reordered(grads, order))
        for buffer in ("params", "cache", "momentum_buffer", "grad_avg"):
            ours, theirs = first.buffers[buffer].views, second.buffers[buffer].views
            for one, other in zip(leaves(reordered(ours, order)), leaves(theirs), strict=True):
                assert_same_bits(one, other, buffer)
    assert second.steps == first.steps == 4


class SameText:
    """A key whose repr other keys have too; `state_dict` takes it, as nothing is looked up in another process."""

    def __repr__(self):
        return "key"


def test_keys_of_the_same_text_are_matched_in_their_order():
    first = RMSProp({SameText(): np.ones(2), SameText(): np.full(3, 2.0), "b": np.full(1, 3.0)})
    second = RMSProp({"b": np.zeros(1), SameText(): np.zeros(2), SameText(): np.zeros(3)})
    second.load_state_dict(first.state_dict())
    assert [view.tolist() for view in second.params.values()] == [[3], [1, 1], [2, 2, 2]]


def test_other_keys_are_still_an_error():
    state = RMSProp({"a": np.ones(2), "b": np.ones(2)}).state_dict()
    opt = RMSProp({"b": np.zeros(2), "c": np.zeros(2)})
    with pytest.raises(CheckpointError, match=r"params\['c'\]: expected path \"\['c'\]\", got \"\['a'\]\""):
        opt.load_state_dict(state)
    opt = RMSProp({"b": np.zeros(2), "a": np.zeros(3)})
    with pytest.raises(CheckpointError, match=r"params\['a'\]: expected shape \[3\], got \[2\]"):
        opt.load_state_dict(state)
    assert (opt.params["b"] == 0).all()


@dataclass(frozen=True)
class Named:
    kind: str
    name: str = field(repr=False)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            (Named("w", "first"), Named("w", "second")),
            r"expected keys with different reprs, .*; got two with",
        ),
        ((frozenset({"a", "b"}), 1), "the same repr in all processes, .*; got frozenset"),
        ((("w", frozenset({"a", "b"})), 1), r"the same repr in all processes, .*; got \('w', frozenset"),
    ],
    ids=["alike", "set", "set in a tuple"],
)
def test_keys_whose_text_is_no_name_are_refused(keys, message, tmp_path):
    opt = RMSProp(dict.fromkeys(keys, np.ones(2)) | {keys[1]: np.zeros(2)})
    with pytest.raises(CheckpointError, match=message):
        opt.save(tmp_path / "state.npz")
    assert list(tmp_path.iterdir()) == []
