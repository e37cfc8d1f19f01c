"""A folder that saves each result at once, so that an interrupted run can resume."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import KVPolicyError
from ..core.files import atomic_replace

SETTINGS = "settings.json"


class Store:
    """Results by name, each a file of arrays.

    Args:
        folder: created if it does not exist.
        settings: everything that all results depend on, as JSON values.

    Raises:
        KVPolicyError: the folder holds results of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        settings = json.loads(json.dumps(settings))
        path = folder / SETTINGS
        if path.exists():
            try:
                known = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise KVPolicyError(f"{path} is damaged ({error}); remove {folder} and run the command again") from None
            different = _differences(known, settings)
            if different:
                raise KVPolicyError(
                    f"--out {folder} holds results of other settings; choose another folder or the same settings:\n  "
                    + "\n  ".join(different)
                )
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KVPolicyError(
                f"--out {folder}: the folder cannot be created ({error.strerror}); choose another path"
            ) from None
        with atomic_replace(path) as partial:
            partial.write_text(json.dumps(settings, indent=1) + "\n")

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def load(self, name: str) -> dict[str, np.ndarray]:
        """Read a result.

        Raises:
            KVPolicyError: the file is damaged.
        """
        path = self._path(name)
        try:
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise KVPolicyError(f"{path} cannot be read ({error}); remove it and run the command again") from None

    def save(self, name: str, arrays: dict[str, Any]) -> None:
        """Save a result; its file is written in one piece."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_replace(path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)

    def _path(self, name: str) -> Path:
        return self.folder / "results" / f"{name}.npz"


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the settings that differ, one line each."""
    names = sorted(old.keys() | new.keys())
    return [f"{name}: was {old.get(name)!r}, is {new.get(name)!r}" for name in names if old.get(name) != new.get(name)]
