"""Write files in one piece, and check early that they can be written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import KVPolicyError


@contextlib.contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; after the block its file replaces `path`.

    A reader sees the old file or the whole new one. If the block fails, the old file stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_writable(flag: str, path: Path) -> None:
    """Raise `KVPolicyError` unless a file can be written to the path that `flag` names.

    Commands call it before hours of work whose result goes there.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise KVPolicyError(f"{flag} {path}: its folder does not exist; create it, or choose another path")
    if path.is_dir():
        raise KVPolicyError(f"{flag} {path}: is a folder; name a file in it")
    if not (os.access(folder, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))):
        raise KVPolicyError(f"{flag} {path}: cannot be written; change its permissions, or choose another path")
