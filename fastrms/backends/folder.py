"""The folder of an optimizer with storage: its path, its metadata, and checks of its content."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from fastrms.backends.mapped import open_own
from fastrms.buffers import Layout
from fastrms.checkpoints.metadata import check_metadata, encode
from fastrms.errors import FastrmsError, StorageError, StructureError

__all__ = [
    "BUFFERS", "METADATA_FILE", "added_groups", "check_keys", "make_folder", "own_metadata", "read_metadata",
    "real_path",
]  # fmt: skip

# The version of the folder. Its metadata also has the version of checkpoints. A folder with added groups has version 2,
# which has `added`, the number of these groups. Every other folder has version 1, which older programs can open.
_VERSIONS = (1, 2)

METADATA_FILE = "head.json"
BUFFERS = ("params", "grads", "cache", "momentum_buffer", "grad_avg")  # the first three always exist


def real_path(path: Path) -> Path:
    """Return the absolute path without links. It stays valid after os.chdir() and changes of links."""
    return Path(os.path.realpath(path))


def make_folder(path: Path) -> bool:
    """Make a folder, or accept an empty one, and return whether it was made."""
    try:
        path.mkdir()
        return True
    except FileNotFoundError:
        raise FileNotFoundError(
            errno.ENOENT, "storage: expected a folder in which to make the new one, got none", str(path.parent)
        ) from None
    except FileExistsError:
        if not path.is_dir():
            raise StorageError(f"storage: expected the path of a folder, got that of a file: {path}") from None
        found = sorted(item.name for item in path.iterdir())
        if METADATA_FILE in found:
            raise StorageError(
                f"storage: expected a new folder, got one with an optimizer in it: {path}; RMSProp.reopen(path) "
                "opens that one"
            ) from None
        if found:
            raise StorageError(
                f"storage: expected a new or empty folder, got one with {found[0]!r} in it: {path}; choose another path"
            ) from None
        return False


def check_keys(layout: Layout) -> None:
    """Raise StructureError if a dict of parameters has a key that the metadata cannot give back."""
    try:
        encode(layout.structure(range(len(layout.leaves))))
    except StructureError as error:
        raise StructureError(f"storage: {error} in params, which a file cannot restore") from None


def own_metadata(clean: bool, buffers: list[str], added: int) -> dict[str, Any]:
    """Return the part of the metadata that a checkpoint lacks.

    `clean` tells whether the files on the disk are complete and belong together. `added` is the number of groups that
    were added, and have files of their own.
    """
    if added:
        return {"version": 2, "clean": clean, "buffers": buffers, "added": added}
    return {"version": 1, "clean": clean, "buffers": buffers}


def added_groups(metadata: Any) -> dict[int, int]:
    """Return the numbers of the groups that were added, and how many parameters each has."""
    groups = [parameter.get("group") for parameter in metadata["parameters"]]
    count = len(metadata["param_groups"])
    return {number: groups.count(number) for number in range(count - metadata["storage"].get("added", 0), count)}


def read_metadata(path: Path) -> Any:
    """Return the metadata of a folder, after all checks that do not need the buffers."""
    try:
        with open(open_own(path, os.O_RDONLY), encoding="utf-8") as stream:
            metadata = json.loads(stream.read())
        check_metadata(metadata)
        own = metadata.get("storage")
        if not isinstance(own, dict) or type(own.get("clean")) is not bool or not isinstance(own.get("buffers"), list):
            raise StorageError("storage: expected a dict with 'clean' and 'buffers'")
        version, added = own.get("version"), own.get("added")
        if version not in _VERSIONS:
            raise StorageError(f"storage: expected version 1 or 2, got {version!r}; it needs a newer fastrms")
        most = len(metadata["param_groups"]) - 1 if metadata["grouped"] else 0
        if version == 1 and added is not None:
            raise StorageError(f"storage: expected no 'added' in version 1, got {added!r}")
        if version == 2 and (type(added) is not int or not 1 <= added <= most):
            raise StorageError(f"storage: expected 'added' to be a number of groups, got {added!r}")
        if not set(BUFFERS[:3]) <= set(own["buffers"]) <= set(BUFFERS):
            raise StorageError(f"storage: expected the buffers of an optimizer, got {own['buffers']}")
    except (FastrmsError, ValueError, TypeError, RecursionError) as error:
        raise StorageError(f"{path}: cannot be read: {error}") from None
    return metadata
