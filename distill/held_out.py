"""Measures on the held-out rows, summed over ranks.

Shapes: B rows, H heads, N soft heads, C labels.

Invariants:
    1. The measures do not depend on the number of ranks or the size of batches
       (tests/distill/test_held_out.py).
    2. Macro-F1 is scikit-learn's (tests/distill/test_held_out.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distill.heads import mean_probabilities
from distill.objective import Losses
from schemas.rows import UNLABELLED


@dataclass
class HeldOutSums:
    """Running sums over held-out rows, float64.

    Attributes:
        losses: Sums over rows of loss, golden loss and soft loss, and the number of rows.
        confusion_CC: Labelled rows by golden label and prediction.
    """

    losses: Tensor
    confusion_CC: Tensor

    @classmethod
    def empty(cls, num_labels: int, device: torch.device) -> HeldOutSums:
        """Returns sums over no rows."""
        losses = torch.zeros(4, dtype=torch.float64, device=device)
        return cls(losses, losses.new_zeros(num_labels, num_labels))

    def add(self, logits_BHC: Tensor, labels_B: Tensor, weights_B: Tensor, losses: Losses) -> None:
        """Adds a batch; rows of weight 0 are padding. All heads predict."""
        self.losses += torch.stack([losses.total, losses.golden, losses.soft, weights_B.sum()]).double()
        predicted_B = mean_probabilities(logits_BHC, range(logits_BHC.shape[1])).argmax(dim=-1)
        counts = (weights_B > 0) & (labels_B != UNLABELLED)
        num_labels = len(self.confusion_CC)
        cells = labels_B[counts] * num_labels + predicted_B[counts]
        self.confusion_CC += torch.bincount(cells, minlength=num_labels**2).view(num_labels, num_labels)

    def share(self) -> None:
        """Adds up the sums of all ranks; every rank must call it."""
        dist.all_reduce(self.losses)
        dist.all_reduce(self.confusion_CC)

    def measures(self, *, golden: bool, soft: bool) -> dict[str, float]:
        """Returns ``loss`` and, where they exist, its parts, ``accuracy`` and ``macro_f1``.

        Args:
            golden: Whether the golden head is trained.
            soft: Whether soft heads are.
        """
        loss, golden_loss, soft_loss, count = self.losses.tolist()
        found = {"loss": loss / count}
        if golden:
            found["golden_loss"] = golden_loss / count
        if soft:
            found["soft_loss"] = soft_loss / count
        num_labelled = float(self.confusion_CC.sum())
        if num_labelled:
            found["accuracy"] = float(self.confusion_CC.trace()) / num_labelled
            found["macro_f1"] = _macro_f1(self.confusion_CC)
        return found


def _macro_f1(confusion_CC: Tensor) -> float:
    """Mean over labels of 2 TP / (2 TP + FP + FN); 0 for a label never golden nor predicted."""
    hits_C = confusion_CC.diagonal()
    seen_C = confusion_CC.sum(dim=0) + confusion_CC.sum(dim=1)
    return float((2 * hits_C / seen_C.clamp(min=1)).mean())
