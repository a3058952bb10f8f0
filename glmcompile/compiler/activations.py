"""Values between layers, on disk: one .npy file for each call and value, mapped when read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray


class _Plain:
    def __init__(self, file: BinaryIO) -> None:
        self.write = file.write


class Activations:
    """What a component's calls hand from layer to layer. Reading maps, so that memory is lent."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory

    def write(self, call: str, name: str, array: NDArray[Any]) -> None:
        """Raises OSError, of a full disk with its number."""
        with self._file(call, name).open("wb") as file:
            # Not the file itself: NumPy would write to it in a way that loses the error's number.
            np.lib.format.write_array(_Plain(file), array)

    def read(self, call: str, name: str) -> NDArray[Any]:
        """The array as it was written, mapped read-only. Raises FileNotFoundError."""
        return np.load(self._file(call, name), mmap_mode="r")

    def drop(self, names: Iterable[str]) -> None:
        """Remove these values of every call; those that are not there are no error."""
        for name in names:
            for file in self._directory.glob(f"*@{quote(name, safe='')}.npy"):
                file.unlink()

    def _file(self, call: str, name: str) -> Path:
        return self._directory / f"{call}@{quote(name, safe='')}.npy"
