"""The counts of an optimizer in the files of its folder, up to date after each step."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastrms._state import Counts
from fastrms.backends.mapped import MappedFile
from fastrms.checkpoints.metadata import MOST_STEPS, check_absent
from fastrms.errors import CheckpointError, StorageError

__all__ = ["COUNTS_FILE", "LOAD", "NOTHING", "STEP", "StoredCounts"]

COUNTS_FILE = "counts.bin"

# What is in progress.
NOTHING, STEP, LOAD = range(3)
_WHAT = {NOTHING: "nothing was under way", STEP: "a step was under way", LOAD: "a load was under way"}

# The places of the numbers in `counts.bin`. Those of `Counts.absent` begin at the last one.
_UNDER_WAY, _STEPS, _SKIPPED_STEPS, _ABSENT = range(4)


class StoredCounts:
    """Counts in ``counts.bin``. The file of an added group, as ``counts-1.bin``, has `Counts.absent` of the group.

    `first` is the number of parameters that the folder was made with. `added` has the numbers of added groups, and
    how many parameters each has.
    """

    def __init__(self, path: Path, first: int, added: Mapping[int, int], new: bool) -> None:
        self._path = path
        self._files: dict[int, MappedFile] = {}  # by the number of the added group; 0 for the first
        self.array = self._map(0, COUNTS_FILE, _ABSENT + first, new)
        self._absent = {0: self.array[_ABSENT:]}
        for number, size in added.items():
            self._absent[number] = self._map(number, f"counts-{number}.bin", size, new)

    def _map(self, number: int, name: str, size: int, new: bool) -> NDArray[np.int64]:
        """Make or map a file of numbers."""
        file = self._files[number] = MappedFile(self._path / name, 8 * size, new)
        return file.memory[: 8 * size].view(np.int64)

    def add(self, number: int, size: int) -> None:
        """Make the file of a new group, whose parameters have taken no step."""
        self._absent[number] = self._map(number, f"counts-{number}.bin", size, True)
        self._absent[number][...] = self.array[_STEPS]
        self._files[number].map.flush()

    def take_out(self, number: int) -> list[Path]:
        """Return the path of the file of a group that was not added, if there is one, and no longer use the file."""
        self._absent.pop(number, None)
        return [self._files.pop(number).path] if number in self._files else []

    def flush(self) -> None:
        """Write the counts to the disk."""
        for file in self._files.values():
            file.map.flush()

    def begin(self, what: int) -> None:
        """Record what is in progress."""
        self.array[_UNDER_WAY] = what

    def skipped(self, counts: Counts) -> None:
        """Record the number of skipped steps."""
        self.array[_SKIPPED_STEPS] = counts.skipped_steps

    def record(self, counts: Counts) -> None:
        """Record all counts, and that nothing is in progress."""
        start = 0
        for absent in self._absent.values():
            # Fewer numbers if Ctrl-C came just before the state took in the last group.
            own = counts.absent[start : start + len(absent)]
            absent[: len(own)] = own
            start += len(absent)
        self.array[_SKIPPED_STEPS] = counts.skipped_steps
        self.array[_STEPS] = counts.steps
        self.array[_UNDER_WAY] = NOTHING

    def read(self, counts: Counts) -> None:
        """Copy the recorded counts to `counts`. Each `absent` is at most the number of steps, also after a crash."""
        counts.steps, counts.skipped_steps = int(self.array[_STEPS]), int(self.array[_SKIPPED_STEPS])
        counts.absent[...] = np.minimum(self.absent, counts.steps)

    @property
    def absent(self) -> NDArray[np.int64]:
        """A copy of the recorded `Counts.absent` of all parameters."""
        return np.concatenate([*self._absent.values()])

    def crash(self) -> str:
        """Return what was in progress when the process ended, and the number of steps, for an error message."""
        what = _WHAT.get(int(self.array[_UNDER_WAY]), "it is damaged")
        return f"{what}, {self.array[_STEPS]} steps were finished"

    def check(self, after_crash: bool) -> None:
        """Raise StorageError for impossible counts. After a crash some may have reached the disk without others."""
        where = self._path / COUNTS_FILE
        steps = self.array[_STEPS]
        for name, count in (("steps", steps), ("skipped_steps", self.array[_SKIPPED_STEPS])):
            if not 0 <= count <= MOST_STEPS:
                raise StorageError(
                    f"{where}: {name}: expected a number of steps, got {count}, which is not from 0 to 2**53: the file "
                    "is damaged"
                )
        try:
            check_absent(np.minimum(self.absent, steps) if after_crash else self.absent, int(steps))
        except CheckpointError as error:
            raise StorageError(f"{where}: {error}: the file is damaged") from None
