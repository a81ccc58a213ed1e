"""Reading many small files of a store at once: an object store answers slowly, but many at a time.

Invariants (tests/schemas/test_reading.py):
    1. Files are held only until they are taken: memory does not grow with their number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from schemas.storage.storage import StoreSource

_NUM_THREADS = 16


def read_files(source: StoreSource, names: Sequence[str], *, max_bytes: int) -> Iterator[bytes]:
    """Yields the bytes of files in the order of ``names``; remote ones are read up to 16 at a time.

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
        yield from map(read, names)
        return
    with ThreadPoolExecutor(min(_NUM_THREADS, len(names))) as pool:
        ahead: deque[Future[bytes]] = deque()
        for name in names:
            if len(ahead) == _NUM_THREADS:
                yield ahead.popleft().result()
            ahead.append(pool.submit(read, name))
        while ahead:
            yield ahead.popleft().result()
