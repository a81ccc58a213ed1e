"""Reading many small files of a store at once: an object store answers slowly, but many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from schemas.storage.storage import StoreSource

_NUM_THREADS = 16


def read_files(source: StoreSource, names: Sequence[str], *, max_bytes: int) -> list[bytes]:
    """Reads files in the order of ``names``.

    Raises:
        FileNotFoundError: One is missing; its name is the whole message.
        TmkdError: See ``StoreSource.read``.
    """

    def read(name: str) -> bytes:
        try:
            return source.read(name, max_bytes=max_bytes)
        except FileNotFoundError as error:
            raise FileNotFoundError(name) from error

    if source.is_local or len(names) < 2:
        return [read(name) for name in names]
    with ThreadPoolExecutor(min(_NUM_THREADS, len(names))) as pool:
        return list(pool.map(read, names))
