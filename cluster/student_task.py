"""``task.json`` beside a student: what its inputs are called and what its labels mean."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from schemas.digest import DocumentError, read_document, write_document
from schemas.errors import DataError
from schemas.recipe import Arm, Frozen

TASK_FILE = "task.json"


class StudentTask(Frozen):
    """What a student does.

    Attributes:
        text: Names of the text columns that it reads, in order.
        labels: Label names.
        question: The column whose passages it ranks, if it does.
        fingerprint: Of its last stage's job.
    """

    text: tuple[str, ...]
    labels: tuple[str, ...]
    question: str | None = None
    arm: Arm | None = None
    seed: int | None = None
    teachers: tuple[str, ...] = ()
    fingerprint: str | None = None


def write_task(task: StudentTask, directory: Path) -> None:
    """Writes ``task.json``."""
    write_document(directory / TASK_FILE, task.model_dump(mode="json"))


def read_task(directory: Path) -> StudentTask | None:
    """Reads ``task.json``; None where the directory has none (a stage's model).

    Raises:
        DataError: It is damaged.
    """
    path = directory / TASK_FILE
    if not path.exists():
        return None
    try:
        return StudentTask.model_validate(read_document(path))
    except (OSError, DocumentError, ValidationError) as error:
        raise DataError(f"{path}: {str(error).splitlines()[0]}") from error
