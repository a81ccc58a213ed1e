"""Examples per second of teachers and students, timed in one process that is not the trainer.

All models read the same texts in batches of the same size, one after another, with the same threads.

Invariant: a model is timed once per run, and again only if it, the rows, or the number of threads is
another (tests/cluster/test_speed.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.console import say
from cluster.run_context import available_device
from distill.evaluate import time_examples_per_s
from distill.predict import BATCH_ROWS, batch_texts
from distill.student import MultiHeadStudent
from precompute.tasks import WorkerSpec
from precompute.teacher import LoadedTeacher
from schemas.digest import DocumentError, hash_value, read_document, write_document
from schemas.recipe import Frozen

Texts = Sequence[tuple[str, ...]]


class ModelSpeed(Frozen):
    """What one model costs.

    Attributes:
        examples_per_s: Forward passes alone, tokenising not included.
        num_parameters: All of the model's.
        num_examples, batch_rows, num_threads: What it was measured on.
    """

    examples_per_s: float
    num_parameters: int
    num_examples: int
    batch_rows: int
    num_threads: int


@dataclass
class SpeedLog:
    """Speeds that were measured for a run (``speed.json``), by name and hash of what was measured."""

    path: Path
    speeds: dict[str, ModelSpeed]

    @classmethod
    def open(cls, path: Path) -> SpeedLog:
        """Goes on with what an earlier start measured; an unreadable file is measured anew."""
        try:
            speeds = {key: ModelSpeed.model_validate(value) for key, value in read_document(path).items()}
        except (OSError, DocumentError, ValueError):
            speeds = {}
        return cls(path, speeds)

    def measure(self, name: str, of: Mapping[str, Any], time_model: Callable[[], ModelSpeed]) -> ModelSpeed:
        """Returns a model's speed, measuring it only if it is not known.

        Args:
            name: For people.
            of: What decides the figure: the weights, the rows, the threads; JSON values.
            time_model: Measures it.
        """
        key = f"{name} {hash_value(dict(of))[:16]}"
        if key not in self.speeds:
            self.speeds[key] = time_model()
            write_document(
                self.path, {known: speed.model_dump(mode="json") for known, speed in self.speeds.items()}
            )
            say(f"  speed of {name}: {self.speeds[key].examples_per_s:.0f} examples/s")
        return self.speeds[key]


def time_teacher(spec: WorkerSpec, texts: Texts) -> ModelSpeed:
    """Loads a teacher and times it."""
    teacher = LoadedTeacher.load(spec)
    batches = batch_texts(
        teacher.tokenizer, texts, max_length=spec.teacher.max_length, device=teacher.model.device
    )
    inputs = [batch.inputs for batch in batches]
    return _time(lambda **batch: teacher.model(**batch), inputs, teacher.model, spec.num_threads)


def time_student(directory: Path, texts: Texts, *, num_threads: int) -> ModelSpeed:
    """Loads a student and times it."""
    device = available_device()
    student = MultiHeadStudent.from_pretrained(directory).to(device)
    batches = batch_texts(student.tokenizer, texts, max_length=student.layout.max_length, device=device)
    return _time(student, [batch.inputs for batch in batches], student, num_threads)


def _time(
    forward: Callable[..., object],
    batches: Sequence[Mapping[str, torch.Tensor]],
    model: torch.nn.Module,
    num_threads: int,
) -> ModelSpeed:
    with _threads(num_threads):
        speed = time_examples_per_s(forward, [dict(batch) for batch in batches], num_passes=3)
    return ModelSpeed(
        examples_per_s=speed.examples_per_s,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_examples=speed.num_examples,
        batch_rows=BATCH_ROWS,
        num_threads=num_threads,
    )


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
