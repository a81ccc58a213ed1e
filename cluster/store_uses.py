"""Who uses a store: the runs that lock it, the names they have for it, and the students trained from it.

Read from what lies below an output root: the locks of runs and of a sweep's cells, and the jobs beside
trained stages, finished or begun. Neither a store nor a model is opened.

Invariants (tests/cluster/test_store_uses.py):
    1. A store is known by its plan and generation hashes, wherever it lies and whatever it is called.
    2. A student uses what it was trained from in any stage, a stage that several students share included.
    3. A damaged file of a run uses nothing, and is no error: a listing of stores is no place to complain.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from schemas.errors import DamagedStoreError, RefusedError
from schemas.job import JOB_ADAPTER, JOB_FILE, AnyJob, StageJob, StudentInit
from schemas.records import LOCK_FILE, StoresLock, read_record
from schemas.storage.location import is_local

# Where trained stages and a sweep's cells lie below a run: what else is there may be of any size.
_SEARCHED = ("students", "stages", "cells")
# Where the stages of all sweeps lie, below the output root itself.
_SHARED = "students"
_HASHED_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}")
_STAGE_NAME = re.compile(r"/stage-\d+$")


@dataclass(frozen=True)
class StoreUse:
    """Who uses one store; each tuple is sorted.

    Attributes:
        names: What locks call it, as ``teacher/corpus/part``.
        runs: Directories of the locks that name it, below the output root.
        students: ``<run>/<student>``, such as ``quickstart/tmkd/seed-17``.
    """

    names: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    students: tuple[str, ...] = ()


@dataclass
class _Found:
    names: set[str] = field(default_factory=set)
    runs: set[str] = field(default_factory=set)
    students: set[str] = field(default_factory=set)


class StoreUses:
    """What the runs below some output roots use."""

    def __init__(self, uses: Mapping[str, StoreUse]) -> None:
        self._uses = uses

    @classmethod
    def find(cls, outs: Sequence[Path]) -> StoreUses:
        """Looks through output roots; one that is not there holds no run."""
        found: defaultdict[str, _Found] = defaultdict(_Found)
        for out in outs:
            for run in _list_runs(out):
                jobs: dict[str, AnyJob] = {}
                for directory, file in _find_files(run):
                    if file == LOCK_FILE:
                        _add_lock(found, directory, str(directory.relative_to(out)))
                    elif (job := _read_job(directory / file)) is not None:
                        jobs[str(directory.resolve())] = job
                _add_students(found, jobs, f"{run.name}/")
            # The names of sweeps' stages, which all sweeps share, say which sweep trained them first.
            shared = {path.parent: _read_job(path) for path in (out / _SHARED).glob(f"*/{JOB_FILE}")}
            _add_students(
                found, {str(at.resolve()): job for at, job in shared.items() if job is not None}, ""
            )
        return cls(
            {
                key: StoreUse(*(tuple(sorted(kind)) for kind in (use.names, use.runs, use.students)))
                for key, use in found.items()
            }
        )

    def of(self, root: str) -> StoreUse:
        """Returns who uses the store at ``root``."""
        return self._uses.get(_key(root), StoreUse())


def _list_runs(out: Path) -> list[Path]:
    return sorted(path for path in out.iterdir() if path.is_dir()) if out.is_dir() else []


def _find_files(run: Path) -> Iterator[tuple[Path, str]]:
    """Yields directory and name of each lock and each job of a run; what cannot be listed has none."""
    if (run / LOCK_FILE).is_file():
        yield run, LOCK_FILE
    for searched in _SEARCHED:
        for directory, below, files in os.walk(run / searched):
            if JOB_FILE in files:
                # Below a stage's own directory there is neither.
                below.clear()
            for name in (LOCK_FILE, JOB_FILE):
                if name in files:
                    yield Path(directory), name


def _add_lock(found: defaultdict[str, _Found], directory: Path, run: str) -> None:
    try:
        lock = read_record(directory / LOCK_FILE, StoresLock, store=directory)
    except (DamagedStoreError, RefusedError):
        return
    for corpus, parts in lock.corpora.items():
        for part in parts:
            for teacher, root in part.stores.items():
                use = found[_key(root)]
                use.runs.add(run)
                use.names.add(f"{teacher}/{corpus}/{part.part}")


def _read_job(path: Path) -> AnyJob | None:
    try:
        return JOB_ADAPTER.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _add_students(found: defaultdict[str, _Found], jobs: Mapping[str, AnyJob], run: str) -> None:
    """Adds the students whose last stages are among ``jobs``, which are named by their directories.

    Args:
        found: Is added to.
        jobs: By directory.
        run: What their names begin with.
    """
    before = {directory: _directory_before(job) for directory, job in jobs.items()}
    for last in jobs.keys() - before.values():
        student = f"{run}{_STAGE_NAME.sub('', jobs[last].name)}"
        for stage in _stages_up_to(last, before):
            for root in _stores_of(jobs[stage]):
                found[_key(root)].students.add(student)


def _stages_up_to(last: str, before: Mapping[str, str | None]) -> list[str]:
    """Returns the directories of a student's stages, the last one first."""
    stages: list[str] = []
    stage: str | None = last
    # A directory of an earlier stage that is not there, or that comes round again, ends the search.
    while stage is not None and stage in before and stage not in stages:
        stages.append(stage)
        stage = before[stage]
    return stages


def _directory_before(job: AnyJob) -> str | None:
    """Returns the directory of the stage that a job's student comes from."""
    return str(Path(job.init.path).parent.resolve()) if isinstance(job.init, StudentInit) else None


def _stores_of(job: AnyJob) -> Iterator[str]:
    if isinstance(job, StageJob):
        for target in job.soft_targets:
            for roots in target.stores:
                yield from roots
    else:
        for teacher in job.teachers:
            yield from teacher.stores


def _key(root: str) -> str:
    """Returns what a store is known by: its directory's name where that is made of its hashes."""
    name = root.rstrip("/").rsplit("/", 1)[-1]
    if _HASHED_NAME.fullmatch(name):
        return name
    return str(Path(root).resolve()) if is_local(root) else root
