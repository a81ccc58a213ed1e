"""The objective of a stage over one batch: which head learns what.

Shapes: B rows, H heads (golden first if it is trained, then the N soft heads), C labels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distill.losses import SOFT_LOSSES, combine, golden_loss
from schemas.job import StageJob


@dataclass(frozen=True, slots=True)
class Losses:
    """Sums over the rows that count; scalars.

    Attributes:
        total: What is minimised, with its graph.
        golden, soft: Its parts, unweighted and detached; 0 where they are not trained.
    """

    total: Tensor
    golden: Tensor
    soft: Tensor


@dataclass(frozen=True, slots=True)
class Objective:
    """The losses of a job.

    Attributes:
        uses_golden: Whether head 0 is the golden head.
        num_soft: N.
    """

    uses_golden: bool
    num_soft: int
    alpha: float
    soft_loss: str
    temperature: float

    @classmethod
    def of(cls, job: StageJob) -> Objective:
        """Reads a job."""
        return cls(job.uses_golden, len(job.soft_targets), job.alpha, job.soft_loss, job.temperature)

    def sum_losses(
        self, logits_BHC: Tensor, labels_B: Tensor, teacher_BNC: Tensor, weights_B: Tensor
    ) -> Losses:
        """Sums the losses of a batch.

        Args:
            logits_BHC: The student's raw logits.
            labels_B: int64, -1 where unlabelled.
            teacher_BNC: The soft labels: raw logits.
            weights_B: 1 for a real row, 0 for padding.
        """
        golden_B = golden_loss(logits_BHC[:, 0], labels_B) if self.uses_golden else None
        soft_B = None
        if self.num_soft:
            student_BNC = logits_BHC[:, int(self.uses_golden) :]
            soft_B = SOFT_LOSSES[self.soft_loss].per_row(student_BNC, teacher_BNC, self.temperature)
        total = combine(golden_B, soft_B, self.alpha, weights_B)
        return Losses(total, _sum_rows(golden_B, weights_B), _sum_rows(soft_B, weights_B))


def _sum_rows(loss_B: Tensor | None, weights_B: Tensor) -> Tensor:
    if loss_B is None:
        return weights_B.new_zeros(())
    return (loss_B.detach() * weights_B).sum()
