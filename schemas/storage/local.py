"""A store on a local (or mounted) file system.

Invariants (tests/schemas/test_local_storage.py):
    1. ``publish`` and ``create`` leave the whole file or none, whatever step fails.
    2. Of many creators of one name exactly one succeeds (a hard link).
    3. Nothing outside the root is read: a symbolic link that leads out, a pipe, a device is damage.
    4. After a loss of power all is there that was created or published before (tests/reliability/
       test_power_loss.py).
"""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from schemas.digest import sync_directory, write_temporary
from schemas.errors import DamagedStoreError, ResourceError
from schemas.fault_points import FaultPoint, reach
from schemas.storage.os_errors import explain_os_error, translated_os_errors
from schemas.storage.storage import Filled, StoredFile

TEMPORARY_SUFFIX = ".tmp"


class LocalStorage:
    """A directory. Implements ``schemas.storage.storage.Storage``.

    Args:
        root: The store's directory; it need not exist before something is written.
    """

    is_local = True
    settles = True

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self._root = root
        self._real_root: str | None = None

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """See ``StoreSource``."""
        path = self._inside(name)
        with _refusals(self.root, name), path.open("rb") as file:
            # Asked first: a large file of holes costs its maker nothing, and reading it much.
            num_bytes = os.fstat(file.fileno()).st_size
            data = b"" if num_bytes > max_bytes else file.read(max_bytes + 1)
        if max(num_bytes, len(data)) > max_bytes:
            raise DamagedStoreError(f"{name} is larger than {max_bytes} bytes", store=self.root)
        return data

    def list_files(self, directory: str) -> list[StoredFile]:
        """See ``StoreSource``."""
        prefix = f"{directory}/" if directory else ""
        found = []
        with _refusals(self.root, directory):
            try:
                entries = list(os.scandir(self._root / directory))
            except FileNotFoundError:
                return []
            for entry in entries:
                if not entry.is_file(follow_symlinks=False):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # Another process renamed or deleted it meanwhile.
                found.append(StoredFile(prefix + entry.name, status.st_size, status.st_mtime))
        return sorted(found, key=lambda file: file.name)

    def map_file(self, name: str, *, num_bytes: int | None = None, sha256: str | None = None) -> pa.Buffer:  # noqa: ARG002
        """See ``StoreSource``; size and hash are the caller's to check: the file is read in place."""
        path = self._inside(name)
        # The buffer keeps the map alive; the file descriptor is closed here.
        with _refusals(self.root, name), pa.memory_map(str(path)) as source:
            return source.read_buffer()

    def discard_copy(self, sha256: str) -> bool:  # noqa: ARG002
        """See ``StoreSource``: there is no copy."""
        return False

    def create(self, name: str, data: bytes) -> bool:
        """See ``StoreSink``."""
        path = self._root / name
        with translated_os_errors(self._root):
            temporary = write_temporary(path, data)
            try:
                reach(FaultPoint.RECORD_WRITTEN)
                os.link(temporary, path)
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
            reach(FaultPoint.RECORD_CREATED)
            sync_directory(path.parent)
        return True

    def replace(self, name: str, data: bytes) -> None:
        """See ``StoreSink``."""
        path = self._root / name
        with translated_os_errors(self._root):
            temporary = write_temporary(path, data)
            try:
                # What it names was perhaps created by a process that has not come to sync it yet.
                for directory in path.parent.iterdir():
                    if directory.is_dir():
                        sync_directory(directory)
                reach(FaultPoint.MANIFEST_WRITTEN)
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            reach(FaultPoint.MANIFEST_REPLACED)
            sync_directory(path.parent)

    def publish(self, name: str, fill: Callable[[Path], Filled]) -> Filled:
        """See ``StoreSink``. The temporary file lies beside the final one, in the same file system."""
        final = self._root / name
        temporary = final.with_name(f".{final.stem}-{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
        with translated_os_errors(self._root):
            try:
                filled = fill(temporary)
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
                reach(FaultPoint.SHARD_SYNCED)
                temporary.rename(final)
                try:
                    reach(FaultPoint.SHARD_RENAMED)
                    sync_directory(final.parent)
                except BaseException:
                    final.unlink(missing_ok=True)
                    raise
            finally:
                temporary.unlink(missing_ok=True)
        return filled

    def delete(self, name: str) -> None:
        """See ``StoreSink``."""
        with translated_os_errors(self._root):
            (self._root / name).unlink(missing_ok=True)

    def _inside(self, name: str) -> Path:
        """Returns the path of an existing regular file below the root.

        Raises:
            FileNotFoundError: There is none.
            DamagedStoreError: It leads out of the store, or is no regular file (a pipe would wait for ever).
        """
        path = self._root / name
        with _refusals(self.root, name):
            if self._real_root is None:
                self._real_root = os.path.realpath(self._root, strict=True)
            real = os.path.realpath(path, strict=True)
            mode = Path(real).stat().st_mode
        if not real.startswith(self._real_root + os.sep):
            raise DamagedStoreError(f"{name} leads out of the store, to {real}", store=self.root)
        if not stat.S_ISREG(mode):
            raise DamagedStoreError(f"{name} is no regular file", store=self.root)
        return Path(real)


@contextmanager
def _refusals(root: str, name: str) -> Iterator[None]:
    """Turns what a read may fail with into the errors of ``schemas.storage.storage``."""
    try:
        yield
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise ResourceError(f"{root}/{name}: no permission to read it") from error
    except OSError as error:
        # A sector that cannot be read is damage of one file; of other failures no file is to blame.
        refusal = None if error.errno == errno.EIO else explain_os_error(error, f"{root}/{name}")
        if refusal is not None:
            raise refusal from error
        raise DamagedStoreError(f"{name} cannot be read ({error.strerror or error})", store=root) from error


def create_local(root: Path) -> LocalStorage:
    """Makes the directories of a new store, durably, or finds them there.

    Raises:
        ResourceError: The disk is full or may not be written.
    """
    from schemas.records import COMMIT_DIRECTORY, DATA_DIRECTORY

    with translated_os_errors(root):
        new = [directory for directory in root.parents if not directory.exists()]
        for directory in (*reversed(new), root, root / DATA_DIRECTORY, root / COMMIT_DIRECTORY):
            directory.mkdir(parents=True, exist_ok=True)
            sync_directory(directory.parent)
    return LocalStorage(root)


def list_local_stores(root: Path) -> list[str]:
    """Lists the directories directly below ``root``, by name; none if it is not there."""
    try:
        return sorted(str(path) for path in root.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []
    except PermissionError as error:
        raise ResourceError(f"{root}: no permission to read it") from error
