"""Running stage jobs: each once, found again by fingerprint, through the deepspeed launcher.

Invariant: a directory that holds another job's result is refused, never overwritten
(tests/cluster/test_students.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distill.stage_directory import StageDirectory
from schemas.digest import replace_file
from schemas.errors import DataError, InterruptedRunError, RefusedError
from schemas.job import JOB_FILE, StageJob, StageStatus

Launch = Callable[[Path], StageStatus]


def is_complete(job: StageJob) -> bool:
    """Tells whether the job's result is there already.

    Raises:
        RefusedError: Another job's result is there.
        DataError: What is there cannot be read.
    """
    output = Path(job.output)
    path = output / JOB_FILE
    if not path.exists():
        return False
    before = _read(path, StageJob)
    if before.fingerprint() != job.fingerprint():
        raise RefusedError(
            f"{output} holds another job; give the run another name (--set name=...) or delete it",
            differing=differing_fields(before.model_dump(mode="json"), job.model_dump(mode="json")),
        )
    return StageDirectory(output).is_complete(job)


def run_job(job: StageJob, launch: Launch) -> bool:
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


def differing_fields(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lists the fields in which two jobs differ, as ``path: before -> now``; paths of files are left out."""
    found: list[str] = []
    for key in now:
        old, new = before.get(key), now[key]
        if old == new or key in ("output", "name", "threads", "rows"):
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += differing_fields(old, new, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}: {_short(old)} -> {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read(path: Path, kind: Any) -> Any:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}); delete it to start anew"
        ) from error
