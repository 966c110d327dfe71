"""Views stay true: what is put in their place is noticed at the next step, and `check` says what else happened."""

import copy
import pickle
import threading
from collections import namedtuple

import numpy as np
import pytest
from helpers import everything

from fastrms import RMSProp, StructureError

Pair = namedtuple("Pair", "W b")


def trees():
    return {
        "list": [np.ones(3), np.ones((2, 2)), np.ones(())],
        "dict": {"W": np.ones((2, 3)), "b": np.zeros(0)},
        "ones": [np.ones(3), np.full((1, 1), 0.5), np.ones(()), np.ones(1)],
        "one": {"W": np.ones(3), "b": np.ones(1)},
        "nested": [{"W": np.ones(2), "more": [np.ones(1)]}, (np.ones(4),)],
    }


# How something may be put into `params`, by structure, and the path that the message has to name.
REPLACED = {
    "array": ("list", lambda views: views.__setitem__(1, views[1] - 1.0), r"\[1\]: expected the original"),
    "0-d": ("list", lambda views: views.__setitem__(2, views[2] - 1.0), r"\[2\]: expected the original"),
    "equal": ("ones", lambda views: views.__setitem__(1, np.clip(views[1], 0.1, 1.0)), r"\[1\]: expected the original"),
    "equal 0-d": ("ones", lambda views: views.__setitem__(2, views[2] + 0.0), r"\[2\]: expected the original"),
    "equal, in a dict": ("one", lambda views: views.update(b=views["b"].copy()), r"\['b'\]: expected the original"),
    "swapped": ("list", lambda views: views.reverse(), r"\[0\]: expected the original"),
    "number": ("list", lambda views: views.__setitem__(0, 3), r"\[0\]: .* got int object in its place"),
    "none": ("list", lambda views: views.__setitem__(0, None), r"\[0\]: .* got None in its place"),
    "appended": ("list", lambda views: views.append(np.ones(2)), "expected 3 items, got 4"),
    "cleared": ("list", lambda views: views.clear(), "expected 3 items, got 0"),
    "key": ("dict", lambda views: views.update(W=np.zeros((2, 3))), r"\['W'\]: expected the original"),
    "empty": ("dict", lambda views: views.update(b=np.zeros(0)), r"\['b'\]: expected the original"),
    "new key": ("dict", lambda views: views.update(c=np.zeros(2)), "unknown 'c'"),
    "deep, equal": ("nested", lambda views: views[0]["more"].__setitem__(0, np.ones(1)), r"\[0\]\['more'\]\[0\]: exp"),
    "deep": ("nested", lambda views: views[0]["more"].__setitem__(0, np.full(1, 5.0)), r"\[0\]\['more'\]\[0\]: exp"),
    "branch": ("nested", lambda views: views.__setitem__(0, {"W": np.ones(2), "more": []}), r"expected 1 items, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", REPLACED)
def test_what_is_put_in_the_place_of_a_parameter_is_noticed_at_the_next_step(name, grouped):
    which, replace, message = REPLACED[name]
    tree = trees()[which]
    opt = RMSProp([{"params": tree}] if grouped else tree)
    opt.step()
    gradients = copy.deepcopy(opt.params)
    before = everything(opt)
    replace(opt.params[0] if grouped else opt.params)
    for arguments in ((gradients,), ()):
        with pytest.raises(StructureError, match=rf"^params.*{message}"):
            opt.step(*arguments)
    assert everything(opt) == before
    assert opt.check()[0].startswith("params")


@pytest.mark.parametrize("name", REPLACED)
def test_and_so_is_what_is_put_in_the_place_of_a_gradient_that_a_step_would_use(name):
    which, replace, message = REPLACED[name]
    opt = RMSProp(trees()[which])
    opt.step()
    gradients = copy.deepcopy(opt.params)
    before = everything(opt)
    replace(opt.grads)
    with pytest.raises(StructureError, match=rf"^grads.*{message}"):
        opt.step()
    with pytest.raises(StructureError, match=rf"^grads.*{message}"):
        opt.step(opt.grads)
    assert everything(opt) == before
    opt.step(gradients)  # uses no view of them
    assert opt.steps == 2


def test_writing_into_views_is_no_replacement():
    opt = RMSProp(trees()["list"])
    for k in range(3):
        opt.params[k] -= 0.5
        opt.grads[k] *= 2
        opt.cache[k] += 1
    opt.step()
    assert opt.check() == []


@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")  # of NumPy 2.5
def test_check_finds_what_no_step_looks_at():
    opt = RMSProp(trees()["list"], momentum=0.9)
    assert opt.check() == []
    opt.cache[0] = np.ones(3)
    opt.params[1].shape = (4,)
    opt.momentum_buffer.pop()
    assert opt.check() == [
        "params[1]: expected a view of shape (2, 2) of its part of the buffer, got one that was changed to shape (4,), "
        "strides (8,), float64",
        "cache[0]: expected the original view, got an array of shape (3,) in its place; write into the view instead: "
        "cache[0][...] = value",
        "momentum_buffer: expected 3 items, got 2",
    ]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
@pytest.mark.parametrize("tree", [*trees().values(), Pair(np.ones(2), np.ones(1))], ids=str)
def test_copies_have_views_of_their_own(copied, tree):
    opt = RMSProp(tree, centered=True)
    other = copied(opt)
    assert other.check() == []
    other.step()
    assert (opt.steps, other.steps) == (0, 1)


class Model:
    """A user's class that holds views beside the optimizer, as docs/flattening.md shows it."""

    def __init__(self):
        self.opt = RMSProp([np.ones((2, 3)), np.zeros(1)])
        self.W, self.b = self.opt.params


class Connected(Model):
    def __setstate__(self, state):
        self.__dict__.update(state)
        self.W, self.b = self.opt.params


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda thing: pickle.loads(pickle.dumps(thing))}


@pytest.mark.parametrize("how", COPIES)
def test_check_sees_views_that_a_copy_has_cut_off(how):
    model = Model()
    assert model.opt.check(W=model.W, b=model.b, all=[model.W, {"b": model.b}], row=model.W[1]) == []
    other = COPIES[how](model)
    assert other.opt.check() == []
    assert [line.split(":")[0] for line in other.opt.check(W=other.W, b=[other.b, other.opt.params[1]], n=3)] == [
        "W", "b[0]", "n",
    ]  # fmt: skip
    model.W = model.W * 2
    assert model.opt.check(W=model.W) == [
        "W: expected a view of the parameters, got an array in other memory; take the view from params again"
    ]


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_an_object_that_takes_its_views_anew_are_whole(how):
    other = COPIES[how](Connected())
    assert other.opt.check(W=other.W, b=other.b) == []
    other.opt.step([np.ones((2, 3)), np.ones(1)])
    assert (other.W < 1).all()


@pytest.mark.parametrize("kernel", ["numpy", "serial"])
def test_a_copy_made_while_another_thread_steps_is_of_one_step(kernel):
    opt = RMSProp([np.zeros(100), np.zeros(100, np.float32)], lr=1.0, decay_rate=0.0, epsilon=1e-30, kernel=kernel)
    stop = threading.Event()

    def train():
        while not stop.is_set():
            opt.step([np.ones(100), np.ones(100, np.float32)])

    thread = threading.Thread(target=train)
    thread.start()
    try:
        copies = [copy.deepcopy(opt) for _ in range(200)]
    finally:
        stop.set()
        thread.join()
    for other in copies:  # each step goes down by 1
        assert [set(np.asarray(view).tolist()) for view in other.params] == [{-float(other.steps)}] * 2
