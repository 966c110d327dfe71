"""Methods for a part of the parameters: one parameter at a time, some of its rows, and new groups."""

from collections.abc import Hashable
from contextlib import nullcontext
from typing import Any

from fastrms._persistence import Persistent
from fastrms._types import Array
from fastrms.backends.host import HostBackend
from fastrms.backends.making import add_group
from fastrms.buffers.pytree import P
from fastrms.errors import OptionError
from fastrms.kernels import threads
from fastrms.options import Group

__all__ = ["InParts"]


class InParts(Persistent[P]):
    """An optimizer that can update parameters one at a time. It cannot take a whole step."""

    def step_parameter(self, key: Hashable, gradient: Any) -> Array:
        """Update one parameter as soon as its gradient exists. All gradients then need not exist together.

        The updates of all parameters are one step, with the bits of ``step(gradients)``: the step is counted after the
        last update. Functions given as lr are called at the first one. Until the step is counted, `step` and every call
        that saves or copies the optimizer raise StepInProgressError.

        Parameters
        ----------
        key : int, str or other key, or tuple of these
            The index of the parameter in `params`: a number in a list, a key in a dict. For nestings and groups a tuple
            of indices, outermost first: ``(0, "W")`` for ``opt.params[0]["W"]``. ``()`` if `params` is a single array.
        gradient : array or None
            As an item of `gradients` in `step`. None if the parameter has no gradient in this step.

        Returns
        -------
        param : ndarray
            The updated parameter, an item of `params`.

        Raises
        ------
        StructureError
            `key` is unknown; the shape is wrong; the parameter was updated already in this step; or an item of `params`
            was replaced.
        DtypeError
            As from `step`.
        OptionError
            `global_clip_norm` is set, or `nonfinite` is not "propagate": they need all gradients together. Or the
            optimizer is on a GPU or on several ranks.

        Examples
        --------
        >>> import numpy as np
        >>> from fastrms import RMSProp
        >>> opt = RMSProp({"W": np.ones(2), "b": np.zeros(1)}, lr=0.1)
        >>> opt.step_parameter("b", np.array([0.5]))
        array([-0.31622776])
        >>> opt.step_parameter("W", np.array([0.5, -0.5]))
        array([0.68377224, 1.31622776])
        >>> opt.steps
        1
        """
        return self._update("step_parameter", key, gradient, None)

    def step_rows(self, key: Hashable, rows: Any, gradient: Any) -> Array:
        """Update some rows of one parameter, such as the rows of an embedding table that a batch used.

        Otherwise it does the same as `step_parameter`. Rows that are not named keep their values and their state: v of
        a named row becomes ``decay_rate * v + (1 - decay_rate) * g**2`` with its gradient g, and v of other rows does
        not decay. Weight decay and momentum, too, act on named rows only. (With a dense gradient that is 0 in all other
        rows, `step` decays their v and moves them along their momentum.) The time depends on the number of rows.

        Parameters
        ----------
        key : int, str or other key, or tuple of these
            As for `step_parameter`.
        rows : array-like of int, shape (k,)
            Indices along the first axis of the parameter, from -n to n - 1 for n rows. Gradients of equal rows add up.
        gradient : array, shape (k, ...)
            The gradient of each row in `rows`.

        Returns
        -------
        param : ndarray
            The parameter, an item of `params`.

        Raises
        ------
        StructureError
            As from `step_parameter`; or a row does not exist.
        DtypeError
            As from `step`; or `rows` are not integers.
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
        return self._update("step_rows", key, gradient, rows)

    def finish_step(self) -> None:
        """End a step of `step_parameter` in which some parameters have no gradient.

        They keep their values and state, as with None in `step`. Without such a step in progress, nothing happens.
        """
        with self._turns.part_of_step("finish_step"):
            if isinstance(self._backend, HostBackend) and self._backend.one_by_one is not None:
                self._backend.one_by_one.finish(self._backend)

    def _update(self, name: str, key: Hashable, gradient: Any, rows: Any) -> Array:
        """Update one parameter, and return it."""
        number, backend = self._state.layout.number_of(key), self._backend
        if not isinstance(backend, HostBackend) or backend.one_by_one is None:
            raise OptionError(
                f"{name}: expected an optimizer of one process on the host, got one on a GPU or on several ranks. With "
                "ranks, hand each gradient over with ready(key, grad), and then call step()"
            )
        limit = backend.thread_limit
        with self._turns.part_of_step(name), nullcontext() if limit is None else threads.limit_threads(limit):
            backend.one_by_one.update(backend, number, gradient, rows)
        param: Array = self._state.buffers["params"].leaves[number]
        return param

    def add_param_group(self, group: Group) -> None:
        """Add a parameter group, with buffers of its own. All earlier views stay valid.

        `params`, `grads` and so on become lists with the structure of each group; so do the gradients of `step`. If
        there were no groups, the parameters so far are group 0.

        Parameters
        ----------
        group : dict
            Parameters under ``"params"``, in any structure, and options that override those of the constructor. The
            new parameters have taken no step: bias correction begins at 1 for them.

        Raises
        ------
        FastrmsError
            As from the constructor; or the optimizer has storage, is on a GPU, or on several ranks. Nothing is changed
            then.

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
            self._bind_groups()
