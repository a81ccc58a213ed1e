"""The storage of one store: what a backend must be able to do.

A backend holds named files below one root. Names are relative, with ``/``, and come from
``schemas.records``: ``STORE.json``, ``data/s000000-....arrow``, ``commit/s000000.r0.json``.

All backends raise alike: ``FileNotFoundError`` for a file that is not there, ``ResourceError`` for what
is outside (no permission, disk full, service unreachable after bounded retries), ``DamagedStoreError``
for a file that a store cannot have (larger than it may be, a link out of the store, not a regular file).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import pyarrow as pa

Filled = TypeVar("Filled")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a store.

    Attributes:
        name: Relative to the store's root.
        num_bytes: Its size.
        modified_s: When it was last written, seconds since the epoch.
    """

    name: str
    num_bytes: int
    modified_s: float


class StoreSource(Protocol):
    """The reading half.

    Attributes:
        root: A local directory's absolute path or a URL, without a slash at its end.
        is_local: Whether files are read in place and listing and mapping them costs nothing.
    """

    root: str
    is_local: bool

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """Reads a whole file; one that is larger than ``max_bytes`` is damage, and is not read."""

    def list_files(self, directory: str) -> list[StoredFile]:
        """Lists the files directly below a directory (``""``: the root), by name; none if it is not there."""

    def map_file(self, name: str, *, num_bytes: int | None = None, sha256: str | None = None) -> pa.Buffer:
        """Maps a file, read-only.

        Args:
            name: The file.
            num_bytes: Its size, where a record says it. A local file of another size is returned as it
                is, for the caller to name; a remote one is damage.
            sha256: Its hash, where a record says it: the key of a remote file's local copy, which is
                checked before it is returned. A remote file without one is read into memory.
        """

    def discard_copy(self, sha256: str) -> bool:
        """Deletes the local copy of a remote file, because its mapped bytes turned out to be damaged.

        Returns:
            Whether there was a copy, so that mapping the file again fetches it again.
        """


class StoreSink(Protocol):
    """The writing half.

    Attributes:
        settles: Whether a ``create`` that raised is over: what ``read`` says afterwards is final. An
            object store may still apply a request whose answer was lost.
    """

    settles: bool

    def create(self, name: str, data: bytes) -> bool:
        """Creates a file only if it is absent, atomically and durably.

        Returns:
            True if this call created it, also where that came out only by reading it back after an
            ambiguous answer; False if another's is there.
        """

    def replace(self, name: str, data: bytes) -> None:
        """Writes a whole file atomically and durably over what is there.

        Files that any process created before are durable before it is.
        """

    def publish(self, name: str, fill: Callable[[Path], Filled]) -> Filled:
        """Lets ``fill`` write a new local file, then publishes it under ``name``, whole and durably.

        An exception of ``fill`` publishes nothing. ``name`` is new: nobody else writes it.

        Returns:
            What ``fill`` returned.
        """

    def delete(self, name: str) -> None:
        """Deletes a file; one that is not there is no error."""


class Storage(StoreSource, StoreSink, Protocol):
    """Both halves."""
