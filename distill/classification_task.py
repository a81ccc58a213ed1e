"""The stage of a classifier: several heads, golden and soft labels.

Shapes: B rows, H heads, N soft heads, C labels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from distill.engine import Engine
from distill.held_out import HeldOutSums
from distill.loader import Batch
from distill.objective import Losses, Objective
from distill.stage_data import StageData, open_stage_data
from distill.stage_task import StageFrame, StepLosses
from distill.student import MultiHeadStudent
from schemas.job import StageJob


class ClassificationTask:
    """A ``StageTask``.

    Attributes:
        frame: Student, data and plan.
    """

    def __init__(self, job: StageJob, student: MultiHeadStudent, data: StageData) -> None:
        self.frame = StageFrame(student, data.loader, data.plan, evaluates=len(data.held_out) > 0)
        self._student = student
        self._data = data
        self._objective = Objective.of(job)
        self._job = job

    @classmethod
    def open(cls, job: StageJob) -> ClassificationTask:
        """Builds the student and opens its data; every rank must call it.

        Raises:
            TmkdError: See ``MultiHeadStudent.from_init`` and ``open_stage_data``.
        """
        student = MultiHeadStudent.from_init(
            job.init, job.prediction_heads(), job.labels, job.seed, max_length=job.max_length
        )
        if job.training.freeze_embeddings:
            student.freeze_embeddings()
        return cls(job, student, open_stage_data(job, student.tokenizer))

    def sum_losses(self, engine: Engine, batch: Batch) -> StepLosses:
        """Puts a micro-batch through the model."""
        _, losses = self._forward(engine, batch)
        objective = self._objective
        parts = {
            "golden_loss": losses.golden if objective.uses_golden else None,
            "soft_loss": losses.soft if objective.num_soft else None,
        }
        return StepLosses(losses.total, parts)

    def measure(self, engine: Engine) -> dict[str, float]:
        """Returns measures on the held-out rows; every rank must call it, without gradients."""
        sums = HeldOutSums.empty(len(self._job.labels), engine.device)
        for batch in self._data.loader.evaluate(self._data.held_out, self._job.training.max_micro_batch):
            logits_BHC, losses = self._forward(engine, batch)
            device = engine.device
            sums.add(logits_BHC, batch.labels.to(device), batch.weights.to(device), losses)
        sums.share()
        return sums.measures(golden=self._objective.uses_golden, soft=self._objective.num_soft > 0)

    def save(self, directory: Path, weights: dict[str, Tensor]) -> None:
        """Writes the student."""
        self._student.save_pretrained(directory, state_dict=weights)

    def _forward(self, engine: Engine, batch: Batch) -> tuple[torch.Tensor, Losses]:
        device = engine.device
        logits_BHC = engine(**{name: value.to(device) for name, value in batch.input.items()})
        losses = self._objective.sum_losses(
            logits_BHC, batch.labels.to(device), batch.logits_BNC.to(device), batch.weights.to(device)
        )
        return logits_BHC, losses
