"""A store on an object store, or on any other file system that fsspec knows.

Invariants (tests/schemas/test_object_store.py, test_object_store_faults.py):
    1. A file appears whole or not at all: it is staged locally, sent whole, and its size is checked.
    2. Of many creators of one name exactly one is told that it won, whatever answers get lost.
    3. Nothing is returned from a local copy before its hash was checked (``copy_cache``).
    4. Each call ends: requests have time limits, tries are counted (``retry``).
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from schemas.errors import DamagedStoreError, ResourceError
from schemas.fault_points import FaultPoint, reach
from schemas.storage.copy_cache import CopyCache, CopyError
from schemas.storage.filesystem import needs_directories, open_filesystem
from schemas.storage.os_errors import translated_os_errors
from schemas.storage.probe import probe_create, refuse
from schemas.storage.retry import RetrySettings, persist
from schemas.storage.service_errors import (
    InterruptedTransferError,
    is_empty_range,
    is_existing,
    is_missing,
    is_transient,
    is_unsupported,
    service_errors,
)
from schemas.storage.storage import Filled, StoredFile

# Time is given for a listing of this size; it comes in pages of some hundred kilobytes.
_LISTING_BYTES = 64 * 2**20
_TIME_KEYS = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")

# A single committer is one process; its threads take turns here.
_single_committer_turn = threading.Lock()


class ObjectStorage:
    """Files below a URL. Implements ``schemas.storage.storage.Storage``.

    Holds no connection and no lock, so it may be pickled, forked and used by many threads.

    Args:
        root: A URL without a slash at its end.
        single_committer: One process alone creates files: the service's create-if-absent is not used.
        settings: How patient to be; from the environment if None.
        cache: Where copies of mapped files lie; from the environment if None.
    """

    is_local = False
    settles = False

    def __init__(
        self,
        root: str,
        *,
        single_committer: bool = False,
        settings: RetrySettings | None = None,
        cache: CopyCache | None = None,
    ) -> None:
        self.root = root
        self._single_committer = single_committer
        self._settings = settings or RetrySettings.from_environment()
        self._cache = cache or CopyCache.from_environment()

    def __repr__(self) -> str:
        return f"ObjectStorage({self.root!r})"

    @property
    def filesystem(self) -> Any:
        """This process's fsspec file system."""
        return open_filesystem(self.root, self._settings)

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """See ``StoreSource``: at most ``max_bytes`` + 1 bytes are asked for."""
        url = self._url(name)
        data = self._persist(name, lambda: self._read_range(url, max_bytes + 1))
        if len(data) > max_bytes:
            raise DamagedStoreError(f"{name} is larger than {max_bytes} bytes", store=self.root)
        return data

    def list_files(self, directory: str) -> list[StoredFile]:
        """See ``StoreSource``."""
        prefix = f"{directory}/" if directory else ""
        return sorted(
            (
                StoredFile(prefix + _base_name(entry), int(entry["size"] or 0), _modified_s(entry))
                for entry in self._list(self._url(directory) if directory else self.root)
                if entry["type"] == "file"
            ),
            key=lambda file: file.name,
        )

    def list_directories(self) -> list[str]:
        """Lists the names of what has files below it, directly below the root."""
        return sorted({_base_name(entry) for entry in self._list(self.root) if entry["type"] == "directory"})

    def map_file(self, name: str, *, num_bytes: int | None = None, sha256: str | None = None) -> pa.Buffer:
        """See ``StoreSource``. A copy whose hash is right is not compared with the service again."""
        url = self._url(name)
        if sha256 is None:
            return pa.py_buffer(
                self._persist(name, lambda: self._read_whole(name, url, num_bytes), is_transfer=True)
            )

        def fetch(path: Path) -> None:
            self._persist(name, lambda: self._download(name, url, num_bytes, path), is_transfer=True)

        try:
            buffer = self._cache.map(sha256, fetch)
        except CopyError as error:
            raise DamagedStoreError(f"{name}: {error}", store=self.root) from error
        self._check_size(name, len(buffer), num_bytes)
        return buffer

    def discard_copy(self, sha256: str) -> bool:
        """See ``StoreSource``."""
        return self._cache.discard(sha256)

    def create(self, name: str, data: bytes) -> bool:
        """See ``StoreSink``.

        The bytes tell creators apart: of those that bring the same bytes, all may be told that they won.
        """
        reach(FaultPoint.RECORD_WRITTEN)
        created = self.create_settled(name, data)
        if created:
            reach(FaultPoint.RECORD_CREATED)
        return created

    def create_settled(self, name: str, data: bytes) -> bool:
        """Does what ``create`` does; the probe's files are no records, so no fault point is reached."""
        attempt = self._create_alone if self._single_committer else self._create_conditionally
        return bool(self._write(name, partial(attempt, self._url(name), data)))

    def replace(self, name: str, data: bytes) -> None:
        """See ``StoreSink``: as atomic as the service's own PUT, which on object stores is whole."""
        url = self._url(name)
        reach(FaultPoint.MANIFEST_WRITTEN)
        self._write(name, lambda: self._call("pipe_file", url, data, num_bytes=len(data)))
        reach(FaultPoint.MANIFEST_REPLACED)

    def publish(self, name: str, fill: Callable[[Path], Filled]) -> Filled:
        """See ``StoreSink``. The local file lies in a temporary directory (``TMPDIR``)."""
        url = self._url(name)
        with tempfile.TemporaryDirectory(prefix="tmkd-") as directory:
            staged = Path(directory) / PurePosixPath(name).name
            with translated_os_errors(staged):
                filled = fill(staged)
            reach(FaultPoint.SHARD_SYNCED)
            self._write(name, lambda: self._upload(staged, url), is_transfer=True)
            reach(FaultPoint.SHARD_RENAMED)
        return filled

    def delete(self, name: str) -> None:
        """See ``StoreSink``."""
        url = self._url(name)
        try:
            self._persist(name, lambda: self._call("rm_file", url))
        except FileNotFoundError:
            return

    def make_directories(self, names: tuple[str, ...]) -> None:
        """Makes directories below the root, where the service has any."""
        for name in names if needs_directories(self.root) else ():
            self._write(name, partial(self._call, "makedirs", self._url(name), exist_ok=True))

    def _persist(self, name: str, action: Callable[[], Any], *, is_transfer: bool = False) -> Any:
        return persist(action, self._settings, location=f"{self.root}/{name}", is_transfer=is_transfer)

    def _write(self, name: str, action: Callable[[], Any], *, is_transfer: bool = False) -> Any:
        try:
            return self._persist(name, action, is_transfer=is_transfer)
        except FileNotFoundError as error:
            raise ResourceError(
                f"{self.root}/{name}: there is nothing to write to; check the bucket and the endpoint"
            ) from error

    def _call(self, method: str, *arguments: Any, num_bytes: int = 0, **options: Any) -> Any:
        """Makes a request of the file system that ends after its time, whatever the service does."""
        filesystem = self.filesystem
        if filesystem.async_impl:
            # Taken by ``fsspec.asyn.sync``, which every method of such a file system goes through.
            options["timeout"] = self._settings.limit_s(num_bytes)
        return getattr(filesystem, method)(*arguments, **options)

    def _url(self, name: str) -> str:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise DamagedStoreError(f"{name!r} leads out of the store", store=self.root)
        return f"{self.root}/{name}"

    def _list(self, url: str) -> list[dict[str, Any]]:
        def request() -> list[dict[str, Any]]:
            # Where listings are cached in spite of all, an old one would hide what others committed.
            self.filesystem.invalidate_cache(url)
            return list(self._call("ls", url, detail=True, num_bytes=_LISTING_BYTES))

        try:
            entries = persist(request, self._settings, location=url)
        except FileNotFoundError:
            return []
        # Some tools leave an empty object that ends with a slash where a directory would be.
        return [entry for entry in entries if not entry["name"].endswith("/")]

    def _read_range(self, url: str, num_bytes: int) -> bytes:
        try:
            return bytes(self._call("cat_file", url, start=0, end=num_bytes, num_bytes=num_bytes))
        except service_errors() as error:
            if is_empty_range(error):
                return b""
            raise

    def _read_whole(self, name: str, url: str, num_bytes: int | None) -> bytes:
        size = self._check_size(name, self._size(url), num_bytes)
        data = self._read_range(url, size + 1)
        if len(data) != size:
            raise InterruptedTransferError(f"{len(data)} of {size} bytes came")
        return data

    def _download(self, name: str, url: str, num_bytes: int | None, path: Path) -> None:
        size = self._check_size(name, self._size(url), num_bytes)
        self._call("get_file", url, str(path), num_bytes=size)
        if path.stat().st_size != size:
            raise InterruptedTransferError(f"{path.stat().st_size} of {size} bytes came")

    def _upload(self, staged: Path, url: str) -> None:
        sent = staged.stat().st_size
        self._call("put_file", str(staged), url, num_bytes=sent)
        arrived = self._size(url)
        if arrived != sent:
            raise InterruptedTransferError(f"{arrived} of {sent} bytes arrived")

    def _size(self, url: str) -> int:
        entry = self._call("info", url)
        if entry["type"] != "file":
            raise FileNotFoundError(url)
        return int(entry["size"])

    def _check_size(self, name: str, size: int, num_bytes: int | None) -> int:
        if num_bytes is not None and size != num_bytes:
            raise DamagedStoreError(f"{name} has {size} bytes, not {num_bytes}", store=self.root)
        return size

    def _create_conditionally(self, url: str, data: bytes) -> bool:
        """Creates a file; where the answer is lost or doubtful, what is there decides.

        A refusal is doubtful too: HTTP libraries repeat a PUT whose connection broke, and the second
        one meets the first.
        """
        try:
            self._call("pipe_file", url, data, mode="create", num_bytes=len(data))
        except service_errors() as error:
            if is_unsupported(error):
                raise refuse(self.root, "it cannot create a file only if it is absent") from error
            if not is_existing(error) and not is_transient(error):
                raise
            found = self._read_back(url, len(data))
            if found is None:
                raise InterruptedTransferError("neither created nor refused") from error
            return found == data
        return True

    def _create_alone(self, url: str, data: bytes) -> bool:
        """Looks, then writes: enough for a single process."""
        with _single_committer_turn:
            # A lost answer is settled by trying again, which would then find our own bytes.
            found = self._read_back(url, len(data))
            if found is None:
                self._call("pipe_file", url, data, num_bytes=len(data))
        return found is None or found == data

    def _read_back(self, url: str, num_bytes: int) -> bytes | None:
        try:
            return self._read_range(url, num_bytes + 1)
        except FileNotFoundError as error:
            if is_missing(error):
                return None
            raise


def open_object_store(root: str) -> ObjectStorage:
    """Opens what lies below a URL, without a request.

    Raises:
        RecipeError: Its kind of storage is unknown, or its package is not installed.
    """
    storage = ObjectStorage(root)
    storage.filesystem  # noqa: B018  a missing package shows now
    return storage


def create_object_store(root: str, single_committer: bool) -> ObjectStorage:
    """Opens a URL for a new store, or one that goes on.

    Args:
        root: The URL.
        single_committer: One process alone commits: the service need not know create-if-absent.

    Raises:
        RecipeError: See ``open_object_store``.
        ResourceError: It may not be written, or does not keep create-if-absent.
    """
    from schemas.records import COMMIT_DIRECTORY, DATA_DIRECTORY

    storage = ObjectStorage(root, single_committer=single_committer)
    storage.make_directories((DATA_DIRECTORY, COMMIT_DIRECTORY))
    if not single_committer:
        probe_create(storage, storage.create_settled)
    return storage


def list_objects(root: str) -> list[str]:
    """Lists the URLs directly below one that have files below them, by name; none if it is not there.

    Raises:
        ResourceError: It may not be read, or there is no such bucket.
    """
    return [f"{root.rstrip('/')}/{name}" for name in ObjectStorage(root).list_directories()]


def _base_name(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rpartition("/")[2]


def _modified_s(entry: dict[str, Any]) -> float:
    """Returns when a file was written; now, if nobody says, so that nothing takes it for abandoned."""
    for key in _TIME_KEYS:
        value = entry.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, str):
            return datetime.fromisoformat(value).timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return time.time()
