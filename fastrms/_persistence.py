"""Save, load, reopen and close an optimizer: states, checkpoints, and folders of mapped files."""

import atexit
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from fastrms._base import OptimizerBase
from fastrms._checks import AFTER_CRASH, check_one_of
from fastrms._types import AfterCrash, HostKernel, Kernel, LearningRate, Options
from fastrms.backends.folder import METADATA_FILE
from fastrms.backends.storage import Storage
from fastrms.buffers.pytree import P
from fastrms.checkpoints.formats import opened, reading
from fastrms.checkpoints.metadata import check_metadata, check_options, metadata_of, params_of, which_get_lr
from fastrms.checkpoints.state import load_file, load_state, restore, save_file, state_dict
from fastrms.errors import CheckpointError, StorageError, call_all

__all__ = ["Persistent"]

_T = TypeVar("_T")

# Optimizers with storage. They are closed when the program ends.
_open: "weakref.WeakSet[Persistent]" = weakref.WeakSet()


class Persistent(OptimizerBase[P]):
    """An optimizer that can be saved, loaded, reopened and closed. It cannot take a step."""

    def _close_at_exit(self) -> None:
        """Have the optimizer closed when the program ends, if it has storage."""
        if self._backend.storage is not None:
            _open.add(self)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of everything that determines the next steps, as arrays, numbers and strings.

        Returns
        -------
        state : dict
            Parameters and state under ``"arrays"``, as dense 1-D arrays, one for each dtype (``"cache/float32"``).
            Path, shape, dtype and group of each parameter under ``"parameters"``, in the order of the arrays. The
            options, ``"steps"``, and the version of the format under ``"version"``. A learning rate that is a function
            is None.
        """
        with self._turns.between_steps("state_dict", changes=False):
            return state_dict(self._backend)

    def load_state_dict(self, state: Options) -> None:
        """Copy a state into the buffers of this optimizer, and set its options. All views stay valid.

        Parameters
        ----------
        state : dict
            A result of `state_dict`, of this or an earlier version. A group whose learning rate is not in it keeps its
            present rate. The keys of dicts of parameters may be in another order.

        Raises
        ------
        CheckpointError
            Paths, shapes, dtypes or groups differ from those of this optimizer, an option is out of range, or `state`
            is not a result of `state_dict`. After an error, nothing has changed.
        StructureError
            An array that is updated in place is read-only, was moved, or has another shape or dtype. Nothing has
            changed.
        """
        with self._turns.between_steps("load_state_dict", within_pass=True):
            load_state(self._backend, state)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, completely or not at all.

        Parameters
        ----------
        path : str or path-like
            The suffix is .npz (`numpy.load` reads it) or .safetensors (needs the package safetensors). An existing file
            is replaced after the new one has reached the disk, and its mode and owner are kept. If the path is a link,
            its target is replaced.

        Raises
        ------
        CheckpointError
            The suffix is a different one. Or a dict of parameters has keys whose repr differs between processes, such
            as functions.
        OSError
            The file cannot be written, or is read-only. An existing file is unchanged.
        """
        with self._turns.between_steps("save", changes=False):
            save_file(self._backend, Path(path))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Load a file of `save` into this optimizer, as `load_state_dict` does. Untrusted files are safe to load.

        Parameters
        ----------
        path : str or path-like
            A file with the suffix .npz or .safetensors.

        Raises
        ------
        CheckpointError
            The file is damaged, larger than any file of this optimizer, not a checkpoint, or from another optimizer.
            After an error, nothing has changed.
        StructureError
            As from `load_state_dict`.
        OSError
            The file cannot be opened.
        """
        with self._turns.between_steps("load", within_pass=True):
            load_file(self._backend, Path(path))

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        *,
        lr: LearningRate | None = None,
        kernel: Kernel = "auto",
        num_threads: int | None = None,
        storage: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Make an optimizer from a file of `save`, with its parameters, their structure, state and options.

        Parameters
        ----------
        path : str or path-like
            A file with the suffix .npz or .safetensors.
        lr : float or callable, optional
            The rate of the groups whose saved rate was a function, because a file cannot contain a function. Required
            if there are such groups. If there are none, `lr` replaces the saved rates of all groups.
        kernel : {"auto", "numpy", "serial", "parallel", "cuda"}, default "auto"
            As for `RMSProp`. The kernel is not saved, because it changes no bit.
        num_threads : int or None, default None
            As for `RMSProp`. It is not saved either.
        storage : path of a new or empty folder, or None, default None
            As for `RMSProp`: the folder for parameters and state, instead of memory.

        Returns
        -------
        optimizer : RMSProp
            A new optimizer with its own buffers.

        Raises
        ------
        CheckpointError
            As for `load`. Or a dict of parameters has keys that a file cannot restore (other than None, str, int, float
            and bool). Or `lr` is required and missing.
        FastrmsError, OSError
            As for `RMSProp`, for the arguments `lr`, `kernel`, `num_threads` and `storage`.
        """
        with opened(Path(path), None) as source:
            metadata = source.metadata
            with reading():
                check_metadata(metadata)
                params = params_of(metadata, source.kinds)
            gets_lr = which_get_lr(metadata, lr, "from_checkpoint", CheckpointError)
            groups: list[dict[str, Any]] = [{"lr": lr} if gets else {} for gets in gets_lr]
            opt = _make(cls, params, metadata, groups, kernel=kernel, num_threads=num_threads, storage=storage)
            try:
                restore(opt._backend, source, gets_lr)  # all other options too
            except BaseException:
                opt._backend.discard()
                raise
        return opt

    @property
    def storage(self) -> Path | None:
        """The folder of the buffers, or None if the buffers are in memory."""
        folder = self._backend.storage
        return None if folder is None else folder.path

    @classmethod
    def reopen(
        cls,
        path: str | os.PathLike[str],
        *,
        lr: LearningRate | None = None,
        kernel: HostKernel = "auto",
        num_threads: int | None = None,
        after_crash: AfterCrash = "raise",
    ) -> Self:
        """Make an optimizer from a closed storage folder, with the same bits, options and steps.

        Parameters
        ----------
        path : str or path-like
            The folder that was passed as ``storage=path`` when the optimizer was made.
        lr : float or callable, optional
            The rate of the groups whose saved rate was a function, because a file cannot contain a function. Required
            if there are such groups. If there are none, `lr` replaces the saved rates of all groups.
        kernel : {"auto", "numpy", "serial", "parallel"}, default "auto"
            As for `RMSProp`. The kernel is not saved, because it changes no bit.
        num_threads : int or None, default None
            As for `RMSProp`. It is not saved either.
        after_crash : {"raise", "use"}, default "raise"
            The reaction if a process ended without closing the folder, so that parameters and state may be from
            different steps. "raise" raises StorageError, whose message tells what is known of them. "use" uses them
            anyway.

        Returns
        -------
        optimizer : RMSProp
            Its buffers are the mapped files, which are read at their first use.

        Raises
        ------
        StorageError
            The folder contains no optimizer, is damaged, is open elsewhere, or was not closed. Or `lr` is required and
            missing.
        OptionError, OptionTypeError
            An argument is out of range or of the wrong kind.
        """
        check_one_of("after_crash", after_crash, AFTER_CRASH)
        storage = Storage.open(Path(path), after_crash)
        try:
            metadata, file = storage.metadata, storage.path / METADATA_FILE
            try:
                params = params_of(metadata, None)
                check_options(metadata)
            except CheckpointError as error:
                raise StorageError(f"{file}: cannot be read: {error}") from None
            gets_lr = which_get_lr(metadata, lr, "reopen", StorageError)
            saved = metadata["param_groups"]
            groups = [group | {"lr": lr} if gets else group for group, gets in zip(saved, gets_lr, strict=True)]
            opt = _make(
                cls, params, metadata, groups, kernel=kernel, num_threads=num_threads, storage=storage,
                global_clip_norm=metadata["global_clip_norm"], nonfinite=metadata["nonfinite"],
            )  # fmt: skip
            if metadata_of(opt._state)["parameters"] != metadata["parameters"]:
                raise StorageError(f"{file}: structure and parameters do not fit together")
        except BaseException:
            storage.discard()
            raise
        return opt

    def flush(self) -> None:
        """Write parameters, state, counts and options to the storage, and return when they are on the disk.

        After a later crash, the files have these values or newer ones. Without storage, `flush` does nothing.

        Raises
        ------
        StorageError
            The optimizer was closed.
        OSError
            Writing to the disk failed.
        """
        folder = self._backend.storage
        if folder is not None:
            with self._turns.between_steps("flush", changes=False, within_pass=True):
                folder.flush()

    def close(self) -> None:
        """Flush and unlock the storage. Later steps raise StorageError. Without storage, `close` does nothing.

        Views of parameters and state become read-only. A second call does nothing. The storage is also closed at the
        end of ``with RMSProp(params, storage=path) as opt``, when the optimizer is deleted, and at a normal end of the
        program.

        Raises
        ------
        OSError
            Writing to the disk failed. The folder is unlocked nevertheless, and counts as not closed for `reopen`.
        """
        folder = self._backend.storage
        if folder is not None and folder.is_open:
            with self._turns.between_steps("close", within_pass=True):
                if folder.is_open:  # another thread may have closed it first
                    folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *about: object) -> None:
        self.close()

    def __del__(self) -> None:
        if "_backend" in vars(self):  # it was made without an error
            self.close()


def _make(cls: Callable[..., _T], params: Any, metadata: Options, groups: Sequence[Options], **options: Any) -> _T:
    """Return an optimizer with the parameters of `params_of`, the options of each group, and options of the whole."""
    if metadata["grouped"]:
        params = [{"params": part, **group} for part, group in zip(params, groups, strict=True)]
    else:
        options |= groups[0]
    return cls(params, cache_dtype=metadata["cache_dtype"], **options)


@atexit.register
def _close_all() -> None:
    call_all([optimizer.close for optimizer in _open])
