"""Step checkpoints: a directory of safetensors and JSON, made visible by one atomically replaced list.

A checkpoint is written to ``.step-<n>.tmp``, checked into its own ``checkpoint.json`` (self-digested: the
trainer's state, what it is bound to, size and xxh3-128 of each file), synced, renamed to ``step-<n>``, and
then listed in ``latest.json`` (self-digested, with the SHA-256 of ``checkpoint.json``). What is not listed
does not exist. Two are kept: if the newer one is damaged, the older one is used. If the list itself is
damaged, the directories are taken as they are. No pickle is written or read.

Invariants:
    1. A run killed at any step, and at any point of writing a checkpoint, ends with the same weights, bit
       for bit, once it is started again (tests/distill/test_resume.py).
    2. A checkpoint of another job, or of other stores, is refused and the fields that differ are named
       (tests/distill/test_checkpoint.py).
    3. A damaged checkpoint is never loaded: not a byte of it, of its list, or of the best weights that
       it refers to (tests/distill/test_checkpoint.py).
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from pydantic import Field, ValidationError

from distill.stage_directory import sync_files
from schemas.digest import (
    DocumentError,
    decode_document,
    hash_file,
    read_document,
    sync_directory,
    write_document,
)
from schemas.errors import DataError, RefusedError
from schemas.fault_points import FaultPoint, reach
from schemas.recipe import Frozen

LATEST_FILE = "latest.json"
STATE_FILE = "checkpoint.json"
NUM_KEPT = 2
_CHUNK_BYTES = 1 << 20
_LOGGER = logging.getLogger(__name__)

Tag = Annotated[str, Field(pattern=r"^step-[0-9]{9}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class FileRecord(Frozen):
    """Size and xxh3-128 (32 hex digits) of one file."""

    num_bytes: int
    xxh3: str


class Origin(Frozen):
    """What a checkpoint is bound to: it is of no use to a run where any of it differs.

    Attributes:
        fingerprint: Of the job.
        job: The job's fields, to name those that differ.
        data: Seeds, corpus, rows, plan hashes and generation hashes; no position.
    """

    fingerprint: str
    job: dict[str, Any]
    data: dict[str, Any]

    def differing_fields(self, other: Origin) -> list[str]:
        """Returns the fields that differ, as ``field: old -> new``, where ``other`` is the new one."""
        differing = [*_differences("", self.data, other.data)]
        if self.fingerprint != other.fingerprint:
            differing += _differences("", self.job, other.job)
            differing = differing or [f"job: {self.fingerprint[:16]} -> {other.fingerprint[:16]}"]
        return differing


class Checkpoint(Frozen):
    """``checkpoint.json``.

    Attributes:
        format: Of the directory.
        step: Optimizer steps done.
        world_size: Ranks that wrote it, for people; any number can go on from it.
        best_step: Whose weights must be kept beside it, if selection has found a best step.
        state: The trainer's own state: step, data position, selection, the engine's counters.
        files: The files beside this one, by name.
        best_files: The files of the best step's weights, by name.
    """

    format: Literal["1.0"] = "1.0"
    step: int
    origin: Origin
    world_size: int
    best_step: int | None = None
    state: dict[str, Any]
    files: dict[FileName, FileRecord]
    best_files: dict[FileName, FileRecord] = Field(default_factory=dict)


class Entry(Frozen):
    """One line of ``latest.json``.

    Attributes:
        tag: Name of the directory.
        best_step: As in ``Checkpoint``.
        sha256: Of ``checkpoint.json``, which holds the hashes of the other files.
    """

    tag: Tag
    best_step: int | None = None
    sha256: str

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.tag.removeprefix("step-"))


class Latest(Frozen):
    """``latest.json``: the checkpoints that exist, newest first."""

    checkpoints: tuple[Entry, ...] = ()


class CheckpointDirectory:
    """The checkpoints of one stage. Every method is for rank 0, unless it says otherwise.

    Attributes:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unusable: set[str] = set()

    def temporary(self, step: int) -> Path:
        """Returns the directory into which the checkpoint of a step is written (any rank)."""
        return self.path / f".{_tag(step)}.tmp"

    def place(self, step: int) -> Path:
        """Returns the directory where the checkpoint of a step lies once it is visible (any rank)."""
        return self.path / _tag(step)

    def prepare(self, step: int) -> None:
        """Clears what a crash, or a write that failed, left under the temporary name."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def commit(
        self, step: int, origin: Origin, world_size: int, best_step: int | None, state: dict[str, Any]
    ) -> None:
        """Makes a checkpoint visible once its files are in the temporary directory.

        Args:
            step: Optimizer steps done.
            origin: What it is bound to.
            world_size: Number of ranks.
            best_step: Whose weights lie in ``best_model`` and are needed to go on.
            state: The trainer's own state, JSON values.

        Raises:
            OSError: It cannot be written; what was visible is still there.
        """
        temporary, final = self.temporary(step), self.place(step)
        checkpoint = Checkpoint(
            step=step,
            origin=origin,
            world_size=world_size,
            best_step=best_step,
            state=state,
            files=_record_files(temporary),
            best_files={} if best_step is None else _record_files(self.best_model(best_step)),
        )
        write_document(temporary / STATE_FILE, checkpoint.model_dump(mode="json"))
        reach(FaultPoint.CHECKPOINT_WRITTEN)
        sync_files(temporary)
        entry = Entry(tag=final.name, best_step=best_step, sha256=hash_file(temporary / STATE_FILE))
        reach(FaultPoint.CHECKPOINT_SYNCED)
        older = [old for old in self._read_list() if old.step < step and old.tag not in self._unusable]
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        sync_directory(self.path)
        reach(FaultPoint.CHECKPOINT_RENAMED)
        latest = Latest(checkpoints=(entry, *older)[:NUM_KEPT])
        write_document(self.path / LATEST_FILE, latest.model_dump(mode="json"))
        reach(FaultPoint.CHECKPOINT_LISTED)
        self._remove_unlisted(latest)

    def find(self, origin: Origin) -> Checkpoint | None:
        """Returns the newest undamaged checkpoint, or None if there is none at all.

        Args:
            origin: What the run that wants to go on is bound to.

        Raises:
            RefusedError: The checkpoints belong to another job or to other stores.
            DataError: There are checkpoints, and all are damaged.
        """
        reasons = []
        for entry in self._read_list():
            found = self._open(entry)
            if isinstance(found, Checkpoint):
                differing = found.origin.differing_fields(origin)
                if differing:
                    raise RefusedError(
                        f"{self.path}: holds checkpoints of another job or of other data "
                        f"({'; '.join(differing[:3])}); choose another output, or delete them",
                        differing=differing,
                    )
                return found
            _LOGGER.warning("%s: checkpoint %s is not used: %s", self.path, entry.tag, found)
            self._unusable.add(entry.tag)
            reasons.append(f"{entry.tag}: {found}")
        if reasons:
            raise DataError(
                f"{self.path}: all checkpoints are damaged; delete the directory to start over "
                f"({'; '.join(reasons)})"
            )
        return None

    def best_model(self, step: int) -> Path:
        """Returns where the weights of the best step so far are kept (any rank)."""
        return self.path / f"best-{step:09d}"

    def prune_best(self, current: int | None) -> None:
        """Deletes the kept weights that neither the run nor a listed checkpoint refers to."""
        needed = {entry.best_step for entry in self._read_list()} | {current}
        keep = {self.best_model(step).name for step in needed if step is not None}
        for path in self.path.glob("best-*"):
            if path.name not in keep:
                shutil.rmtree(path, ignore_errors=True)

    def delete(self) -> None:
        """Deletes everything; the stage is complete. The list goes first."""
        (self.path / LATEST_FILE).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def _read_list(self) -> list[Entry]:
        path = self.path / LATEST_FILE
        try:
            return list(Latest.model_validate(read_document(path)).checkpoints)
        except FileNotFoundError:
            return []
        except (OSError, DocumentError, ValidationError) as error:
            _LOGGER.warning("%s: %s; the directories beside it are looked through", path, _first_line(error))
            return sorted(self._scan(), key=lambda entry: entry.step, reverse=True)

    def _scan(self) -> Iterator[Entry]:
        """Lists the directories themselves: they became visible whole, one by one."""
        for path in self.path.glob("step-" + "[0-9]" * 9):
            state = path / STATE_FILE
            sha256 = hash_file(state) if state.is_file() else ""
            found = self._open(Entry(tag=path.name, sha256=sha256))
            best_step = found.best_step if isinstance(found, Checkpoint) else None
            yield Entry(tag=path.name, best_step=best_step, sha256=sha256)

    def _open(self, entry: Entry) -> Checkpoint | str:
        """Returns a checkpoint whose every file matches its hash, or what is wrong with it."""
        directory = self.path / entry.tag
        try:
            if hash_file(directory / STATE_FILE) != entry.sha256:
                return f"{STATE_FILE} does not match its hash"
            checkpoint = Checkpoint.model_validate(decode_document((directory / STATE_FILE).read_bytes()))
            damage = _find_damage(directory, checkpoint.files)
            if damage is None and checkpoint.best_step is not None:
                damage = _find_damage(self.best_model(checkpoint.best_step), checkpoint.best_files)
        except OSError as error:
            return f"{error.filename or directory}: {error.strerror}"
        except (DocumentError, ValidationError) as error:
            return f"{STATE_FILE}: {_first_line(error)}"
        if checkpoint.step != entry.step:
            return f"{STATE_FILE} is that of step {checkpoint.step}"
        return checkpoint if damage is None else damage

    def _remove_unlisted(self, latest: Latest) -> None:
        listed = {entry.tag for entry in latest.checkpoints}
        for path in (*self.path.glob("step-*"), *self.path.glob(".step-*.tmp")):
            if path.name not in listed:
                shutil.rmtree(path, ignore_errors=True)


def _tag(step: int) -> str:
    return f"step-{step:09d}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _differences(name: str, old: Any, new: Any) -> Iterator[str]:
    """Yields the leaves that differ.

    Of a path only the last part counts: what a store or a corpus holds is in its name or its hash, and a
    run may be moved.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(f"{name}.{key}" if name else key, old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for position, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from _differences(f"{name}.{position}", left, right)
    elif _last_part(old) != _last_part(new):
        yield f"{name}: {_last_part(old)} -> {_last_part(new)}"


def _last_part(value: Any) -> Any:
    return value.rstrip("/").rsplit("/", 1)[-1] if isinstance(value, str) else value


def _find_damage(directory: Path, files: dict[str, FileRecord]) -> str | None:
    for name, record in files.items():
        path = directory / name
        if not path.is_file():
            return f"{directory.name}/{name} is missing"
        if path.stat().st_size != record.num_bytes or _record_file(path) != record:
            return f"{directory.name}/{name} does not match its hash"
    return None


def _record_files(directory: Path) -> dict[str, FileRecord]:
    return {path.name: _record_file(path) for path in sorted(directory.iterdir()) if path.is_file()}


def _record_file(path: Path) -> FileRecord:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return FileRecord(num_bytes=path.stat().st_size, xxh3=digest.hexdigest())
