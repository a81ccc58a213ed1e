"""Step checkpoints: DeepSpeed's files, made visible by one atomically replaced ``latest.json``.

A checkpoint is written to ``.step-...tmp``, synced, renamed to ``step-...``, and then listed in
``latest.json`` with the size and hash of each of its files and with the trainer's own state. What is
not listed does not exist. Two are kept: if the newer one is damaged, the older one is used.

Invariants:
    1. A run killed at any step and started again ends with the same weights, bit for bit
       (tests/distill/test_trainer.py).
    2. A checkpoint of another job is refused, and so is another world size where ZeRO partitions
       the optimizer (tests/distill/test_checkpoint.py).
    3. A damaged checkpoint is never loaded (tests/distill/test_checkpoint.py).
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import xxhash
from pydantic import Field, ValidationError

from distill.stage_directory import sync_files
from schemas.digest import DocumentError, read_document, sync_directory, write_document
from schemas.errors import DataError, RefusedError
from schemas.recipe import Frozen

LATEST_FILE = "latest.json"
NUM_KEPT = 2
_CHUNK_BYTES = 1 << 20
_LOGGER = logging.getLogger(__name__)

Tag = Annotated[str, Field(pattern=r"^step-[0-9]{9}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class FileRecord(Frozen):
    """Size and xxh3-128 (32 hex digits) of one file of a checkpoint."""

    num_bytes: int
    xxh3: str


class Checkpoint(Frozen):
    """One checkpoint as ``latest.json`` lists it.

    Attributes:
        tag: Name of its directory.
        step: Optimizer steps done.
        zero_stage: Above 0 the optimizer is partitioned over ``world_size`` ranks.
        best_step: Whose weights must be kept beside it, if selection has found a best step.
        state: The trainer's own state: data position, selection, store hashes.
        files: By name.
    """

    tag: Tag
    step: int
    fingerprint: str
    world_size: int
    zero_stage: int
    best_step: int | None
    state: dict[str, Any]
    files: dict[FileName, FileRecord]


class Latest(Frozen):
    """``latest.json``: the checkpoints that exist, newest first."""

    checkpoints: tuple[Checkpoint, ...] = ()


class CheckpointDirectory:
    """The checkpoints of one stage. Every method is for rank 0, unless it says otherwise.

    Attributes:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def temporary_tag(self, step: int) -> str:
        """Returns the name under which all ranks write the checkpoint of a step (any rank)."""
        return f".{_tag(step)}.tmp"

    def prepare(self, step: int) -> None:
        """Clears what a crash left under the temporary name."""
        self.path.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.path / self.temporary_tag(step), ignore_errors=True)

    def commit(self, step: int, header: dict[str, Any], state: dict[str, Any]) -> None:
        """Makes a checkpoint visible once all ranks have written it.

        Args:
            step: Optimizer steps done.
            header: ``fingerprint``, ``world_size``, ``zero_stage`` and ``best_step``.
            state: The trainer's own state, JSON values.
        """
        temporary, final = self.path / self.temporary_tag(step), self.path / _tag(step)
        _drop_recovery_scripts(temporary)
        sync_files(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        sync_directory(self.path)
        files = {path.name: _record_file(path) for path in sorted(final.iterdir())}
        entry = Checkpoint(tag=_tag(step), step=step, state=state, files=files, **header)
        older = [old for old in self._read().checkpoints if old.step < step]
        latest = Latest(checkpoints=(entry, *older)[:NUM_KEPT])
        write_document(self.path / LATEST_FILE, latest.model_dump(mode="json"))
        self._remove_unlisted(latest)

    def find(self, fingerprint: str, world_size: int) -> Checkpoint | None:
        """Returns the newest undamaged checkpoint, or None if there is none at all.

        Raises:
            RefusedError: The checkpoints belong to another job, or to another number of ranks.
            DataError: There are checkpoints, and all are damaged.
        """
        listed = self._read().checkpoints
        for entry in listed:
            _check_identity(self.path, entry, fingerprint, world_size)
            damage = self._find_damage(entry)
            if damage is None:
                return entry
            _LOGGER.warning("%s: checkpoint %s is not used: %s", self.path, entry.tag, damage)
        if listed:
            raise DataError(f"{self.path}: all checkpoints are damaged; delete the directory to start over")
        return None

    def best_model(self, step: int) -> Path:
        """Returns where the weights of the best step so far are kept (any rank)."""
        return self.path / f"best-{step:09d}"

    def prune_best(self, current: int | None) -> None:
        """Deletes the kept weights that neither the run nor a listed checkpoint refers to."""
        needed = {entry.best_step for entry in self._read().checkpoints} | {current}
        keep = {self.best_model(step).name for step in needed if step is not None}
        for path in self.path.glob("best-*"):
            if path.name not in keep:
                shutil.rmtree(path, ignore_errors=True)

    def delete(self) -> None:
        """Deletes everything; the stage is complete. The list goes first."""
        (self.path / LATEST_FILE).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def _read(self) -> Latest:
        path = self.path / LATEST_FILE
        try:
            return Latest.model_validate(read_document(path))
        except FileNotFoundError:
            return Latest()
        except (OSError, DocumentError, ValidationError) as error:
            raise DataError(f"{path}: {error}; delete {self.path} to start over") from error

    def _find_damage(self, entry: Checkpoint) -> str | None:
        directory = self.path / entry.tag
        for name, record in entry.files.items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != record.num_bytes or _record_file(path) != record:
                return f"{name} does not match its hash"
        return None

    def _remove_unlisted(self, latest: Latest) -> None:
        listed = {entry.tag for entry in latest.checkpoints}
        for path in (*self.path.glob("step-*"), *self.path.glob(".step-*.tmp")):
            if path.name not in listed:
                shutil.rmtree(path, ignore_errors=True)


def _check_identity(path: Path, entry: Checkpoint, fingerprint: str, world_size: int) -> None:
    if entry.fingerprint != fingerprint:
        raise RefusedError(
            f"{path}: holds checkpoints of another job; choose another output, or delete them",
            differing=[f"job: {entry.fingerprint[:16]} -> {fingerprint[:16]}"],
        )
    if entry.zero_stage > 0 and entry.world_size != world_size:
        raise RefusedError(
            f"{path}: its optimizer state is partitioned over {entry.world_size} ranks (ZeRO "
            f"{entry.zero_stage}); go on with as many, or delete the checkpoints",
            differing=[f"ranks: {entry.world_size} -> {world_size}"],
        )


def _tag(step: int) -> str:
    return f"step-{step:09d}"


def _drop_recovery_scripts(directory: Path) -> None:
    # DeepSpeed copies programs for converting its files into each checkpoint.
    for path in directory.glob("*.py"):
        path.unlink()


def _record_file(path: Path) -> FileRecord:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return FileRecord(num_bytes=path.stat().st_size, xxh3=digest.hexdigest())
