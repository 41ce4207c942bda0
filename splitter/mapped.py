"""A model file mapped into memory: opened, parsed and given back the same way for every format."""

from __future__ import annotations

import contextlib
import mmap
from abc import ABC, abstractmethod
from pathlib import Path

from isthmus.protocol.errors import ModelFileError


class MappedFile(ABC):
    """`path` mapped read-only and parsed at once. Raises `ModelFileError` for a file that is empty or can't
    be opened, and whatever `_parse` raises (the mapping is given back then)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # mmap of an empty file
            raise ModelFileError(f"{path.name}: file is empty", hint="pull the model again") from error
        except OSError as error:
            raise ModelFileError(f"cannot open {path}: {error.strerror}") from error
        try:
            self._parse()
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _parse(self) -> None:
        """Read and validate what describes the tensors; their contents stay untouched."""

    def close(self) -> None:
        """Gives the mapping back; views still held keep it alive until they go."""
        with contextlib.suppress(BufferError):  # someone holds a view: the mapping goes with the last one
            self._map.close()
