"""``task.json`` beside a language student: what it is, and what it was taught by."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from schemas.digest import write_document
from schemas.fields import Frozen
from schemas.language import Objective

TASK_FILE = "task.json"


class LanguageStudentTask(Frozen):
    """What a language student does.

    Attributes:
        tokenizer: Hash of its tokenizer (``schemas.tokenizer_hash``).
        vocab: V, the true vocabulary.
        max_length: Tokens of its training sequences.
        fingerprint: Of its last stage's job.
    """

    task: Literal["language"] = "language"
    objective: Objective
    tokenizer: str
    vocab: int
    max_length: int
    arm: str
    seed: int
    teachers: tuple[str, ...] = ()
    fingerprint: str


def write_language_task(task: LanguageStudentTask, directory: Path) -> None:
    """Writes ``task.json``."""
    write_document(directory / TASK_FILE, task.model_dump(mode="json"))
