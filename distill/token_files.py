"""The files of one tokenised part: written as a stream, sealed with their hashes, mapped.

Invariants (tests/distill/test_tokens.py):
    1. Files that do not match their hashes, or belong to another identity, are not opened.
    2. Nothing is ever written to the maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import xxhash

from schemas.digest import DocumentError, read_document, write_document

_NAMES = ("ids.npy", "offsets.npy", "firsts.npy")
_SEAL = "tokens.json"
_CHUNK_BYTES = 1 << 22


class TokenFilesError(Exception):
    """Files that cannot be used; they are made again."""


@dataclass(frozen=True, slots=True)
class TokenFiles:
    """Mapped tokens of one part; R rows, T tokens.

    Attributes:
        ids: int32[T].
        offsets: int64[R + 1].
        firsts: int32[R], tokens of the first segment.
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    firsts: npt.NDArray[np.int32]

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.firsts)

    @classmethod
    def open(cls, directory: Path, identity: Mapping[str, Any]) -> TokenFiles:
        """Maps sealed files.

        Raises:
            TokenFilesError: They are missing, damaged, or of another identity.
        """
        try:
            seal = read_document(directory / _SEAL)
            if seal.get("identity") != dict(identity):
                raise TokenFilesError(f"{directory} holds other tokens")
            for name in _NAMES:
                if _hash(directory / name) != seal["xxh3"][name]:
                    raise TokenFilesError(f"{directory / name} does not match its hash")
            ids, offsets, firsts = (np.load(directory / name, mmap_mode="r") for name in _NAMES)
        except (OSError, DocumentError, KeyError, ValueError) as error:
            raise TokenFilesError(f"{directory}: {error}") from error
        # Plain arrays over the maps: indexing np.memmap objects is slow.
        return cls(ids.view(np.ndarray), offsets.view(np.ndarray), firsts.view(np.ndarray))

    @staticmethod
    def seal(directory: Path, identity: Mapping[str, Any]) -> None:
        """Writes the hashes of finished files beside them."""
        hashes = {name: _hash(directory / name) for name in _NAMES}
        write_document(directory / _SEAL, {"identity": dict(identity), "xxh3": hashes})


class TokenFilesWriter:
    """Writes rows of tokens as they come, in bounded memory apart from 12 bytes a row."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = (directory / _NAMES[0]).open("xb")
        self._num_tokens = 0
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._firsts: list[npt.NDArray[np.int32]] = []
        self._write_header()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()

    def write(
        self,
        ids: npt.NDArray[np.int32],
        lengths: npt.NDArray[np.int64],
        firsts: npt.NDArray[np.int32],
    ) -> None:
        """Appends rows: their ids one after another, their lengths, and their first segments' lengths."""
        self._file.write(ids.astype("<i4", copy=False).tobytes())
        self._num_tokens += len(ids)
        self._lengths.append(lengths)
        self._firsts.append(firsts)

    def _finish(self) -> None:
        # numpy pads a header so that the first axis can grow in place.
        self._file.seek(0)
        self._write_header()
        offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.empty(0, np.int64), *self._lengths]))])
        np.save(self._directory / _NAMES[1], offsets.astype("<i8"))
        np.save(self._directory / _NAMES[2], np.concatenate([np.empty(0, np.int32), *self._firsts]))

    def _write_header(self) -> None:
        header = {"descr": "<i4", "fortran_order": False, "shape": (self._num_tokens,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
