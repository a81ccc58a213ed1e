"""``task.json`` beside a language student: what it is, and what it was taught by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from schemas.digest import DocumentError, read_document, write_document
from schemas.errors import DataError, RecipeError, first_line
from schemas.fields import Frozen
from schemas.language import Objective

TASK_FILE = "task.json"
# How the classes of language models end in transformers; GPT-2's does with LMHeadModel.
_HEADS = ("ForCausalLM", "ForMaskedLM", "LMHeadModel")


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


def read_language_task(directory: Path) -> LanguageStudentTask | None:
    """Reads ``task.json``; None where the directory has none (a stage's model, or any other).

    Raises:
        DataError: It is damaged, or a classifier's.
    """
    path = directory / TASK_FILE
    if not path.exists():
        return None
    try:
        return LanguageStudentTask.model_validate(read_document(path))
    except (OSError, DocumentError, ValidationError) as error:
        raise DataError(f"{path}: {first_line(error)}") from error


def refuse_language_model(directory: Path, reason: str) -> None:
    """Refuses a directory of a language model where a classifier is wanted.

    Args:
        directory: A student's.
        reason: What the command does, and what to do instead.

    Raises:
        RecipeError: It is one.
    """
    if any(str(name).endswith(_HEADS) for name in _architectures(directory / "config.json")):
        raise RecipeError(f"{directory} is a language model; {reason}")


def _architectures(path: Path) -> list[Any]:
    try:
        found = json.loads(path.read_bytes())["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        # Whoever wants more of the directory says what it lacks.
        return []
    return found if isinstance(found, list) else []
