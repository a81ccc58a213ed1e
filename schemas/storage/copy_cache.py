"""Local copies of remote files, named by the SHA-256 of their bytes and shared by all processes of a user.

Invariants (tests/schemas/test_copy_cache.py):
    1. Bytes are returned only after their hash was checked: when a copy is made, and whenever it is mapped.
    2. A damaged copy is deleted and fetched again. One that was just fetched and does not match its hash
       is fetched once more; then it is the source that is damaged.
    3. A copy appears whole (temporary file, rename); any number of processes may fill and evict at once.
    4. Copies are only ever unlinked, never cut or overwritten: what is mapped stays readable.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa

from schemas.errors import RecipeError, ResourceError
from schemas.storage.os_errors import translated_os_errors

DEFAULT_MAX_BYTES = 64 * 2**30
_HASH = re.compile(r"[0-9a-f]{64}")
_TEMPORARY_SUFFIX = ".tmp"
_LOCK_DIRECTORY = "locks"
# A temporary file that nobody wrote to for so long belongs to a process that died.
_ABANDONED_S = 3600.0
_NUM_FETCHES = 2


class CopyError(ValueError):
    """The fetched bytes do not match their hash, twice; or the hash is none."""


class CopyCache:
    """A directory of copies.

    Args:
        directory: Where they lie; made when it is needed, readable by its user alone.
        max_bytes: After a copy was added, the least recently mapped others go until they fit.
    """

    def __init__(self, directory: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.directory = directory
        self.max_bytes = max_bytes

    @classmethod
    def from_environment(cls) -> CopyCache:
        """Makes the cache that ``TMKD_CACHE_DIR`` and ``TMKD_CACHE_BYTES`` describe.

        Raises:
            RecipeError: The limit is no number of bytes.
        """
        text = os.environ.get("TMKD_CACHE_BYTES", str(DEFAULT_MAX_BYTES))
        if not text.isdecimal():
            raise RecipeError(f"TMKD_CACHE_BYTES={text}: must be a number of bytes")
        given = os.environ.get("TMKD_CACHE_DIR")
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return cls(Path(given).expanduser() if given else base / "tmkd" / "shards", int(text))

    def map(self, sha256: str, fetch: Callable[[Path], None]) -> pa.Buffer:
        """Maps the copy of a file, which is fetched if there is none or a damaged one.

        Args:
            sha256: The hash of the file's bytes, 64 hex digits.
            fetch: Writes the whole file to a path, or raises.

        Raises:
            CopyError: What was fetched does not match the hash.
            ResourceError: The directory cannot be written, or its disk is full.
        """
        # The hash comes from a record and becomes a file name.
        if _HASH.fullmatch(sha256) is None:
            raise CopyError(f"{sha256!r} is no SHA-256")
        with translated_os_errors(self.directory):
            buffer = self._map_copy(sha256)
            if buffer is not None:
                return buffer
            self._make_directories()
            with self._filling(sha256):
                # Another process may have filled it while this one waited.
                buffer = self._map_copy(sha256)
                return buffer if buffer is not None else self._fill(sha256, fetch)

    def discard(self, sha256: str) -> bool:
        """Deletes a copy; returns whether there was one."""
        if _HASH.fullmatch(sha256) is None:
            return False
        with translated_os_errors(self.directory):
            try:
                (self.directory / sha256).unlink()
            except FileNotFoundError:
                return False
        return True

    def _make_directories(self) -> None:
        try:
            # ``parents`` would make the directory itself with the usual mode.
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.directory / _LOCK_DIRECTORY).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ResourceError(
                f"{self.directory}: cannot be made ({error.strerror}); remote shards are copied there: "
                "name another directory in TMKD_CACHE_DIR"
            ) from error

    def _map_copy(self, sha256: str) -> pa.Buffer | None:
        """Maps a copy and checks it; a damaged one is deleted."""
        path = self.directory / sha256
        try:
            buffer = _map_whole(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if _hash_buffer(buffer) != sha256:
            self.discard(sha256)
            return None
        with suppress(FileNotFoundError):
            os.utime(path)  # The least recently mapped goes first.
        return buffer

    def _fill(self, sha256: str, fetch: Callable[[Path], None]) -> pa.Buffer:
        temporary = self.directory / f".{sha256}.{uuid.uuid4().hex}{_TEMPORARY_SUFFIX}"
        for _ in range(_NUM_FETCHES):
            try:
                fetch(temporary)
                buffer = self._adopt(temporary, sha256)
                if buffer is not None:
                    return buffer
            finally:
                temporary.unlink(missing_ok=True)
            self._make_directories()
        raise CopyError("its bytes do not match the recorded hash")

    def _adopt(self, temporary: Path, sha256: str) -> pa.Buffer | None:
        """Makes a fetched file the copy, if its bytes are right: the very bytes that are returned."""
        try:
            buffer = _map_whole(temporary)
            if _hash_buffer(buffer) != sha256:
                return None
            temporary.replace(self.directory / sha256)
            self._evict(sha256)
        except FileNotFoundError:
            # Somebody empties the cache. To the caller this error would mean that the source is gone.
            return None
        return buffer

    def _evict(self, kept: str) -> None:
        """Unlinks the least recently mapped copies until the rest fits; ``kept`` stays in any case."""
        copies, total_bytes = [], 0
        for entry in os.scandir(self.directory):
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if entry.name.endswith(_TEMPORARY_SUFFIX) and time.time() - status.st_mtime > _ABANDONED_S:
                Path(entry.path).unlink(missing_ok=True)
            elif _HASH.fullmatch(entry.name):
                total_bytes += status.st_size
                copies.append((status.st_mtime_ns, entry.name, status.st_size))
        for _, name, num_bytes in sorted(copies):
            if total_bytes <= self.max_bytes:
                return
            if name != kept:
                (self.directory / name).unlink(missing_ok=True)
                total_bytes -= num_bytes

    @contextmanager
    def _filling(self, sha256: str) -> Iterator[None]:
        """Lets one process at a time fetch a file: the ranks of a node all ask for it at once.

        The lock goes with the process that holds it. Lock files stay: there are at most 256.
        """
        with (self.directory / _LOCK_DIRECTORY / sha256[:2]).open("wb") as lock:
            # Without locks (some network file systems) several fetch the same, which does no harm.
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _map_whole(path: Path) -> pa.Buffer:
    if path.stat().st_size == 0:
        return pa.py_buffer(b"")
    # Not Python's mmap: it keeps a file descriptor for each map.
    with pa.memory_map(str(path)) as source:
        return source.read_buffer()


def _hash_buffer(buffer: pa.Buffer) -> str:
    return hashlib.sha256(memoryview(buffer)).hexdigest()
