"""What compiled code reads of dicts and of attributes."""

import sys
from collections import OrderedDict, defaultdict

import pytest
from helpers import JIT

from fastrms.kernels import pointers
from fastrms.kernels.objects import Record, attributes


@pytest.fixture(params=["compiled", "python"])
def compiled(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(pointers, "available", lambda: False)
    elif not (JIT and pointers.available()):
        pytest.skip("no compiled code")


class Unequal:
    """An object that must not be compared."""

    __hash__ = object.__hash__

    def __eq__(self, other):
        raise AssertionError


A, B, X, Y = (Unequal() for _ in range(4))


def example():
    return {A: {"x": X, "y": Y}, B: {}, "number": 1000.5}


CHANGES = {
    "value": lambda state: state[A].update(x=Y),
    "values swapped": lambda state: state[A].update(x=Y, y=X),
    "around the methods": lambda state: dict.__setitem__(state[A], "x", Y),
    "key": lambda state: state[A].update(z=state[A].pop("y")),
    "order": lambda state: state[A].update(x=state[A].pop("x")),
    "added": lambda state: state[A].update(z=X),
    "added to the empty one": lambda state: state[B].update(z=X),
    "added at the end": lambda state: state.update(z=X),
    "added as an empty dict": lambda state: state.update(z={}),
    "taken out": lambda state: state[A].popitem(),
    "taken out at the end": lambda state: state.popitem(),
    "emptied": lambda state: state[A].clear(),
    "all taken out": lambda state: state.clear(),
    "another dict": lambda state: state.update({A: dict(state[A])}),
    "another class": lambda state: state.update({A: OrderedDict(state[A])}),
    "dicts swapped": lambda state: state.update({A: state[B], B: state[A]}),
    "another number": lambda state: state.update(number=float("1000.5")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_record_is_of_a_dict_until_any_of_its_objects_changes(change, compiled):
    state = example()
    record = Record(state)
    assert record.is_of(state)
    assert record.is_of(defaultdict(dict, state))
    CHANGES[change](state)
    assert not record.is_of(state)
    assert Record(state).is_of(state)


def test_an_item_that_goes_from_an_inner_dict_to_the_outer_one(compiled):
    inner = {"x": X}
    state = {A: inner}
    record = Record(state)
    inner.clear()
    state["x"] = X
    assert not record.is_of(state)


def test_an_object_that_is_gone_is_not_taken_for_a_new_one(compiled):
    state = {"x": object()}
    record = Record(state)
    for _ in range(10):
        del state["x"]
        state["x"] = object()
        assert not record.is_of(state)


def test_a_subclass_of_dict_counts_as_one_object(compiled):
    state = {A: OrderedDict(x=X)}
    record = Record(state)
    state[A]["x"] = Y
    assert record.is_of(state)


def test_attributes_are_read_without_a_lost_reference(compiled):
    class Thing:
        def __init__(self, value):
            self.value = value

    things = tuple(Thing(Unequal()) for _ in range(5))
    before = [sys.getrefcount(thing.value) for thing in things]
    values = attributes(things, "value")
    assert all(value is thing.value for value, thing in zip(values, things, strict=True))
    assert [sys.getrefcount(thing.value) for thing in things] == [count + 1 for count in before]
    del values
    assert [sys.getrefcount(thing.value) for thing in things] == before
    del things[3].value
    with pytest.raises(AttributeError, match="'Thing' object has no attribute 'value'"):
        attributes(things, "value")
    assert [sys.getrefcount(thing.value) for thing in things[:3]] == before[:3]
    assert attributes((), "value") == ()
