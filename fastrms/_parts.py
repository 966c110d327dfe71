"""Methods that update one parameter or some of its rows, and a method that adds a group."""

from collections.abc import Hashable
from typing import Any

from fastrms._persistence import Persistent
from fastrms._types import Array
from fastrms.backends.making import add_group
from fastrms.buffers.pytree import P
from fastrms.errors import DtypeError, OptionError
from fastrms.kernels import threads
from fastrms.options import Group

__all__ = ["InParts"]


class InParts(Persistent[P]):
    """An optimizer that can update one parameter at a time, but has no method for a whole step."""

    def step_parameter(self, key: Hashable, gradient: Any) -> Array:
        """Update one parameter as soon as its gradient exists, so that not all gradients need to exist at once.

        The updates of all parameters together are one step, with the same bits as ``step(gradients)``. The step is
        counted after the last update. A function given as lr is called at the first update. Until the step is counted,
        `step` and every call that saves or copies the optimizer raise StepInProgressError.

        Parameters
        ----------
        key : int, str or other key, or tuple of these
            The index of the parameter in `params`: a number in a list, a key in a dict. In nestings and groups, a tuple
            of indices, outermost first: ``(0, "W")`` for ``opt.params[0]["W"]``. For a single array, ``()``.
        gradient : array or None
            The gradient, in any form that `step` accepts. None if the parameter has no gradient in this step.

        Returns
        -------
        param : ndarray
            The updated parameter, an item of `params`.

        Raises
        ------
        StructureError
            `key` is unknown; the gradient has a wrong shape; the parameter was already updated in this step; or an item
            of `params` was replaced.
        DtypeError
            As from `step`.
        OptionError
            `global_clip_norm` is set, or `nonfinite` is not "propagate": these options need all gradients together. Or
            the optimizer is on several ranks.

        Examples
        --------
        >>> import numpy as np
        >>> from fastrms import RMSProp
        >>> opt = RMSProp({"W": np.ones(2), "b": np.zeros(1)}, lr=0.1)
        >>> opt.step_parameter("b", np.array([0.5]))
        array([-0.31622775])
        >>> opt.step_parameter("W", np.array([0.5, -0.5]))
        array([0.68377225, 1.31622775])
        >>> opt.steps
        1
        """
        return self._update("step_parameter", key, gradient, None)

    def step_rows(self, key: Hashable, rows: Any, gradient: Any) -> Array:
        """Update some rows of one parameter, such as the rows of an embedding table that a batch uses.

        This is a lazy update: all other rows keep their values and their state. Their v does not decay, and weight
        decay and momentum do not change them. In contrast, `step` with a dense gradient that is 0 in these rows decays
        their v and moves them along their momentum. In all other respects, `step_rows` is like `step_parameter`. Its
        time depends only on the number of rows in `rows`.

        Parameters
        ----------
        key : int, str or other key, or tuple of these
            As for `step_parameter`.
        rows : array-like of int, shape (k,)
            Indices along the first axis of the parameter, from -n to n - 1 for n rows. If a row occurs several times,
            its gradients are added up. Indices on a GPU are copied to the host, which waits for them.
        gradient : array, shape (k, ...)
            The gradient of each row in `rows`.

        Returns
        -------
        param : ndarray
            The parameter, an item of `params`.

        Raises
        ------
        StructureError
            As from `step_parameter`. Or a row does not exist.
        DtypeError
            As from `step`. Or `rows` is not an array of integers.
        OptionError
            As from `step_parameter`.

        Examples
        --------
        >>> import numpy as np
        >>> from fastrms import RMSProp
        >>> opt = RMSProp([np.zeros((4, 2))], lr=0.1)
        >>> opt.step_rows(0, [3, 1, 3], np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
        array([[ 0.        ,  0.        ],
               [ 0.        , -0.31622776],
               [ 0.        ,  0.        ],
               [-0.31622776,  0.        ]])
        """
        if rows is None:
            raise DtypeError("rows: expected a 1-D array of integers, got None; step_parameter updates all rows")
        return self._update("step_rows", key, gradient, rows)

    def finish_step(self) -> None:
        """End a step of `step_parameter` or `step_rows` in which some parameters have no gradient.

        These parameters keep their values and their state, as with None in `step`. If no such step is in progress,
        nothing happens.
        """
        with self._turns.part_of_step("finish_step"):
            if self._backend.one_by_one is not None:
                self._backend.one_by_one.finish(self._backend)

    def _update(self, name: str, key: Hashable, gradient: Any, rows: Any) -> Array:
        """Update one parameter, and return it."""
        backend = self._backend
        if backend.one_by_one is None:
            raise OptionError(
                f"{name}: expected an optimizer of one process, got one on several ranks; call ready(key, grad) for "
                "each gradient, and then step()"
            )
        turns, state = self._turns, self._state
        with turns.lock:  # as in `Turns.part_of_step`, which takes 2 us longer
            if turns.in_progress.locked():
                turns.admit(name, changes=True)
            with turns.in_progress:
                state.counts.admit(0)
                backend.settle_parameters()  # it may replace `one_by_one`
                number = state.layout.number_of(key)
                if backend.thread_limit is None:
                    backend.one_by_one.update(backend, number, gradient, rows)
                else:
                    with threads.limit_threads(backend.thread_limit):
                        backend.one_by_one.update(backend, number, gradient, rows)
                param: Array = state.buffers["params"].leaves[number]
        return param

    def add_param_group(self, group: Group) -> None:
        """Add a parameter group, with its own buffers, or its own files in the storage. All existing views stay valid.

        From then on, `params`, `grads`, the views of the state and the gradients for `step` are lists with one item for
        each group. If the optimizer had no groups before, its parameters become group 0. With `in_place`, the given
        arrays of the new group are updated in place, too.

        Parameters
        ----------
        group : dict
            Parameters under the key ``"params"``, in any structure, and options that override those of the constructor.
            (Options of the constructor are not saved: after `reopen` or `from_checkpoint`, give all options here.) For
            bias correction, the next step is the first step of the new parameters.

        Raises
        ------
        FastrmsError
            As from the constructor. After an error, nothing has changed.
        OSError
            The storage has no room for the files of the group. Nothing has changed.

        Examples
        --------
        >>> import numpy as np
        >>> from fastrms import RMSProp
        >>> opt = RMSProp([np.ones(2)], lr=0.1)
        >>> opt.add_param_group({"params": [np.zeros(1)], "lr": 0.01})
        >>> opt.params
        [[array([1., 1.])], [array([0.])]]
        """
        with self._turns.between_steps("add_param_group"):
            add_group(self._backend, group)
