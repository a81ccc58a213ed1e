"""Running stage jobs: each once, found again by fingerprint, through the deepspeed launcher.

Invariant: a directory that holds another job's result is refused, never overwritten
(tests/cluster/test_students.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distill.stage_directory import StageDirectory
from schemas.digest import replace_file
from schemas.errors import DataError, InterruptedRunError, RefusedError
from schemas.job import JOB_ADAPTER, JOB_FILE, AnyJob, StageStatus

# Where things lie, and what they are called: nothing that decides a weight.
_IGNORED = re.compile(r"output|name|threads|init\.path|parts\.\d+\.rows")
_STORE = re.compile(r"soft_targets\.\d+\.stores\.\d+\.\d+|teachers\.\d+\.stores\.\d+")

Launch = Callable[[Path], StageStatus]


def is_complete(job: AnyJob) -> bool:
    """Tells whether the job's result is there already.

    Raises:
        RefusedError: Another job's result is there.
        DataError: What is there cannot be read.
    """
    output = Path(job.output)
    path = output / JOB_FILE
    if not path.exists():
        return False
    before = _read(path)
    if before.fingerprint() != job.fingerprint():
        raise RefusedError(
            f"{output} holds another job; give the run another name (--set name=...) or delete it",
            differing=differing_fields(before.model_dump(mode="json"), job.model_dump(mode="json")),
        )
    return StageDirectory(output).is_complete(job)


def run_job(job: AnyJob, launch: Launch) -> bool:
    """Runs a stage job unless its result is there.

    Args:
        job: The job.
        launch: Starts the trainer on a job file and waits for it.

    Returns:
        True if it ran, False if it was complete already.

    Raises:
        InterruptedRunError: It was asked to stop, and left a checkpoint.
    """
    if is_complete(job):
        return False
    path = Path(job.output) / JOB_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(job.model_dump(mode="json"), indent=1) + "\n").encode())
    status = launch(path)
    if status.state == "preempted":
        raise InterruptedRunError(
            f"{job.name}: stopped at step {status.step}; the same command goes on from there",
            signal_number=2,
        )
    return True


def differing_fields(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lists the fields in which two jobs differ, as ``path: before -> now``; paths of files are left out."""
    old, new = ({path: _name(path, value) for path, value in _flatten(job).items()} for job in (before, now))
    return [
        f"{path}: {_short(old.get(path))} -> {_short(new.get(path))}"
        for path in dict.fromkeys([*old, *new])
        if old.get(path) != new.get(path) and not _IGNORED.fullmatch(path)
    ]


def _flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Returns the leaves below ``value`` by their dotted paths; an empty list or object is no leaf."""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return {path: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat.update(_flatten(item, f"{path}.{key}" if path else str(key)))
    return flat


def _name(path: str, value: Any) -> Any:
    # A store's directory is named by its plan and generation hashes, wherever it lies.
    return value.rstrip("/").rsplit("/", 1)[-1] if _STORE.fullmatch(path) else value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read(path: Path) -> AnyJob:
    try:
        return JOB_ADAPTER.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); delete it to start anew"
        ) from error
