"""A stage's output directory: status, lock, request to stop, and the final model's place.

Neither torch nor DeepSpeed is imported, so the supervisor reads the same files with the same code.

Invariants:
    1. One process group at a time trains into a directory; the lock dies with its holder
       (tests/distill/test_stage_directory.py).
    2. ``model/`` is either absent or complete (tests/distill/test_stage_directory.py).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from schemas.digest import replace_file, sync_directory
from schemas.errors import RecipeError, RefusedError, ResourceError
from schemas.job import JOB_ADAPTER, STATUS_FILE, AnyJob, StageStatus

MODEL_DIRECTORY = "model"
METRICS_FILE = "metrics.jsonl"
_LOCK_FILE = "trainer.lock"
_STOP_FILE = "stop"


class StageDirectory:
    """Paths and small files below a job's ``output``.

    Attributes:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    @property
    def model(self) -> Path:
        """Where the finished student lies."""
        return self.path / MODEL_DIRECTORY

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie until the stage is complete."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """``metrics.jsonl``."""
        return self.path / METRICS_FILE

    @property
    def tensorboard(self) -> Path:
        """Where TensorBoard's event files lie."""
        return self.path / "tensorboard"

    def create(self) -> None:
        """Makes the directory.

        Raises:
            ResourceError: It cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{self.path}: cannot be created ({error.strerror})") from error

    def lock(self) -> None:
        """Takes the directory for this process until it ends.

        Raises:
            RefusedError: Another process trains here.
        """
        descriptor = os.open(self.path / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise RefusedError(f"{self.path}: another process trains here; wait for it or stop it") from error
        self._lock = descriptor

    def unlock(self) -> None:
        """Gives the directory back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write_status(self, status: StageStatus, *, rank: int = 0) -> None:
        """Replaces the status; a rank above 0 writes beside it, and only when it fails."""
        replace_file(self._status_path(rank), (status.model_dump_json(indent=1) + "\n").encode())

    def read_status(self) -> StageStatus | None:
        """Returns rank 0's status, or None if there is none that can be read."""
        return _read_status(self._status_path(0))

    def read_failures(self) -> list[StageStatus]:
        """Returns the statuses of all ranks that failed, rank 0 first."""
        paths = [self._status_path(0), *sorted(self.path.glob("status.rank*.json"))]
        found = [_read_status(path) for path in paths]
        return [status for status in found if status is not None and status.state == "failed"]

    def is_complete(self, job: AnyJob) -> bool:
        """Tells whether this job's stage is finished here.

        Raises:
            RefusedError: Another job's stage is finished here.
        """
        status = self.read_status()
        if status is None or status.state != "complete" or not self.model.is_dir():
            return False
        if status.fingerprint != job.fingerprint():
            raise RefusedError(
                f"{self.path}: holds the result of another job; choose another output, or delete it",
                differing=[f"job: {status.fingerprint[:16]} -> {job.fingerprint()[:16]}"],
            )
        return True

    def clear_requests(self) -> None:
        """Forgets the status and the requests of an earlier launch; the supervisor's first act."""
        for path in (self.path / _STOP_FILE, self._status_path(0), *self.path.glob("status.rank*.json")):
            path.unlink(missing_ok=True)

    def request_stop(self) -> None:
        """Asks the trainer to save and leave at the end of its step.

        A file, so that ranks on other hosts of a shared file system are reached as well.
        """
        (self.path / _STOP_FILE).touch()

    def stop_requested(self) -> bool:
        """Tells whether the trainer was asked to leave."""
        return (self.path / _STOP_FILE).exists()

    def publish_model(self, write: Callable[[Path], None]) -> None:
        """Lets ``write`` fill a temporary directory and renames it to ``model/``."""
        publish_directory(self.model, write)

    def _status_path(self, rank: int) -> Path:
        return self.path / (STATUS_FILE if rank == 0 else f"status.rank{rank}.json")


def read_job(path: Path) -> AnyJob:
    """Reads a job's file.

    Raises:
        RecipeError: It is missing or is no job.
    """
    try:
        return JOB_ADAPTER.validate_json(path.read_bytes())
    except OSError as error:
        raise RecipeError(f"cannot be read ({error.strerror})", source=str(path)) from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(step) for step in first["loc"])
        raise RecipeError(first["msg"], source=str(path), field=field) from error


def publish_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Lets ``write`` fill a temporary directory beside ``target``, syncs it, and renames it.

    An older ``target`` is replaced; it can be made again.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unique = f".{target.name}.{uuid.uuid4().hex}"
    temporary, older = target.with_name(f"{unique}.tmp"), target.with_name(f"{unique}.old")
    try:
        write(temporary)
        sync_files(temporary)
        if target.exists():
            # A directory cannot be replaced in one call; put aside, it is away for a moment only.
            os.replace(target, older)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(older, ignore_errors=True)
    sync_directory(target.parent)


def sync_files(directory: Path) -> None:
    """Makes all files below ``directory`` durable."""
    for path in (directory, *directory.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read_status(path: Path) -> StageStatus | None:
    try:
        return StageStatus.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
