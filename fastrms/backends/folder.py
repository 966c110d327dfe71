"""The folder of an optimizer with storage: its path, its metadata, and checks of its content."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from fastrms.backends.mapped import open_own
from fastrms.checkpoints.metadata import check_metadata
from fastrms.errors import FastrmsError, StorageError

__all__ = ["BUFFERS", "METADATA_FILE", "VERSION", "make_folder", "read_metadata", "real_path"]

# The version of the folder. Its metadata also has the version of checkpoints.
VERSION = 1

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
            errno.ENOENT, "storage: expected a folder to make another one in, got none", str(path.parent)
        ) from None
    except FileExistsError:
        if not path.is_dir():
            raise StorageError(f"storage: expected the path of a folder, got that of a file: {path}") from None
        found = sorted(item.name for item in path.iterdir())
        if METADATA_FILE in found:
            raise StorageError(
                f"storage: expected a new folder, got one with an optimizer in it: {path}; RMSProp.reopen(path) goes "
                "on with that one"
            ) from None
        if found:
            raise StorageError(
                f"storage: expected a new or empty folder, got one with {found[0]!r} in it: {path}; give another path"
            ) from None
        return False


def read_metadata(path: Path) -> Any:
    """Return the metadata of a folder, after all checks that do not need the buffers."""
    try:
        with open(open_own(path, os.O_RDONLY), encoding="utf-8") as stream:
            metadata = json.loads(stream.read())
        check_metadata(metadata)
        own = metadata.get("storage")
        if not isinstance(own, dict) or type(own.get("clean")) is not bool or not isinstance(own.get("buffers"), list):
            raise StorageError("storage: expected a dict with 'clean' and 'buffers'")
        if own.get("version") != VERSION:
            raise StorageError(f"storage: expected version {VERSION}, got {own.get('version')!r}")
        if not set(BUFFERS[:3]) <= set(own["buffers"]) <= set(BUFFERS):
            raise StorageError(f"storage: expected the buffers of an optimizer, got {own['buffers']}")
    except (FastrmsError, ValueError, TypeError, RecursionError) as error:
        raise StorageError(f"{path}: cannot be read: {error}") from None
    return metadata
