"""How a step comes to call a function, a signal handler comes to a step, and what they do there."""

import sys
from collections.abc import Mapping

from fastrms import RMSProp


class Array:
    """An array of another library, which does something when it is looked at."""

    def __init__(self, array, do):
        self._array, self._do = array, do

    def __array__(self, dtype=None, copy=None):
        self._do()
        return self._array


class Lazy(Mapping):
    """A mapping that does something when an item is taken, or when its length is asked for."""

    def __init__(self, items, do, where):
        self._items, self._do, self._where = items, do, where

    def __getitem__(self, key):
        if self._where == "__getitem__":
            self._do()
        return self._items[key]

    def __len__(self):
        if self._where == "__len__":
            self._do()
        return len(self._items)

    def __iter__(self):
        if self._where == "__iter__":
            self._do()
        return iter(self._items)

    def __contains__(self, key):
        if self._where == "__contains__":
            self._do()
        return key in self._items


# How a step comes to call a function; parameters are {"a": ..., "b": ...}.
def with_rate(opt, gradients, do):
    before = opt.lr

    def rate(step):
        opt.lr = before
        do()
        return before

    opt.lr = rate
    opt.step(gradients)


PLACES = {
    "lr": with_rate,
    "__array__": lambda opt, gradients, do: opt.step({**gradients, "b": Array(gradients["b"], do)}),
    **{
        f"Mapping.{where}": lambda opt, gradients, do, where=where: opt.step(Lazy(gradients, do, where))
        for where in ("__getitem__", "__len__", "__contains__")
    },
}


def make(rng, **options):
    tree = {"a": rng.standard_normal((4, 3)), "b": rng.standard_normal(5)}
    return RMSProp(tree, **options), {key: rng.standard_normal(array.shape) for key, array in tree.items()}


OPTIONS = {
    "lr": 0.5,
    "momentum": 0.9,
    "centered": True,
    "weight_decay": 0.1,
    "clip_norm": 0.01,
    "global_clip_norm": 0.01,
    "nonfinite": "raise",
}


def at_every_line(make, act, handler, names):
    """Let `handler` come to what `make` makes while `act` is under way, at each line of functions of these names.

    Yields the number of the line and what was made.
    """
    for number in range(10_000):
        made, seen = make(), 0

        def trace(frame, event, argument, number=number, made=made):
            if "fastrms" not in frame.f_code.co_filename or frame.f_code.co_name not in names:
                return None

            def at_line(frame, event, argument):
                nonlocal seen
                if event == "line":
                    seen += 1
                    if seen == number + 1:
                        sys.settrace(None)
                        handler(made)
                return at_line

            return at_line

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            act(made)
        finally:
            sys.settrace(before)
        if seen <= number:
            return
        yield number, made
