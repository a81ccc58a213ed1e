"""Several teachers' logits as one soft label (arm 1avg-o-1), by the stage's soft loss.

Shapes: R rows, K teachers, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from distill.losses import SOFT_LOSSES


@dataclass(frozen=True, slots=True)
class Averaging:
    """How the teachers of one soft target become one.

    Attributes:
        soft_loss: The stage's soft loss: mean logits under MSE, mean probabilities under KL.
        temperature: T of the KL loss: probabilities are averaged at T, and given back as logits that
            a loss divides by T like any teacher's.
    """

    soft_loss: Literal["mse", "kl"] = "mse"
    temperature: float = 1.0

    def apply(self, logits_RKC: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Returns float32[R, C]; a single teacher's logits are returned as they are."""
        if logits_RKC.shape[1] == 1:
            return logits_RKC[:, 0]
        average = SOFT_LOSSES[self.soft_loss].average
        return average(torch.from_numpy(logits_RKC).double(), self.temperature).float().numpy()
