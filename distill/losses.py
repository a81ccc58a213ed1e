"""Losses of distillation, per row, before weighting.

Shapes: B rows, N teachers (soft heads), K teachers averaged into one soft label, C labels.

Every function returns one number per row; ``combine`` adds them up under the rows' weights. The caller
divides that sum by the number of rows that count (weight 1) in the whole optimizer step, over ranks
and micro-batches. So the loss does not depend on how a step is cut, padding (weight 0) changes
nothing, and an unlabelled row counts in the denominator like any other.

Invariants:
    1. Every entry of ``SOFT_LOSSES`` is zero where student and teacher agree, never negative, and has
       the gradient that finite differences give (tests/distill/test_losses.py).
    2. A row's loss does not depend on the other rows (tests/distill/test_losses.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor
from torch.nn import functional

from schemas.rows import UNLABELLED


@dataclass(frozen=True, slots=True)
class SoftLoss:
    """One way to compare a student's heads with its teachers.

    Attributes:
        per_row: ``(student_BNC, teacher_BNC, temperature) -> loss_B``: raw logits of soft head i and of
            teacher i, mean over the N heads.
        average: ``(teacher_BKC, temperature) -> teacher_BC``: the one soft label that several teachers
            make (1avg-o-1), again as logits.
        uses_temperature: Whether the temperature changes anything.
    """

    per_row: Callable[[Tensor, Tensor, float], Tensor]
    average: Callable[[Tensor, float], Tensor]
    uses_temperature: bool


def golden_loss(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Cross-entropy of the golden head with the golden label, in nats.

    Source: Yang et al., WSDM 2020, arXiv:1910.08381, l_g.

    Args:
        logits_BC: Raw logits of the golden head.
        labels_B: int64 label indices in ``[0, C)``, or -1 for an unlabelled row.

    Returns:
        ``loss_B``, 0 for unlabelled rows.
    """
    return functional.cross_entropy(_widen(logits_BC), labels_B, ignore_index=UNLABELLED, reduction="none")


def mean_squared_logits(student_BNC: Tensor, teacher_BNC: Tensor, _temperature: float = 1.0) -> Tensor:
    """``(1/N) sum_i (1/C) sum_c (R_si[c] - R_ti[c])^2`` on raw logits; there is no temperature.

    Source: Yang et al., WSDM 2020, arXiv:1910.08381, l_s.

    Args:
        student_BNC: Raw logits of the soft heads.
        teacher_BNC: Raw logits of their teachers.

    Returns:
        ``loss_B``.
    """
    return (_widen(student_BNC) - _widen(teacher_BNC)).square().mean(dim=(1, 2))


def tempered_divergence(student_BNC: Tensor, teacher_BNC: Tensor, temperature: float = 1.0) -> Tensor:
    """``(1/N) sum_i T^2 KL(softmax(R_ti / T) || softmax(R_si / T))``, in nats.

    T^2 keeps the gradient's size when T changes.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.

    Args:
        student_BNC: Raw logits of the soft heads.
        teacher_BNC: Raw logits of their teachers.
        temperature: T > 0.

    Returns:
        ``loss_B``.
    """
    student_log_BNC = (_widen(student_BNC) / temperature).log_softmax(dim=-1)
    teacher_log_BNC = (_widen(teacher_BNC) / temperature).log_softmax(dim=-1)
    divergence_BNC = functional.kl_div(student_log_BNC, teacher_log_BNC, reduction="none", log_target=True)
    return temperature**2 * divergence_BNC.sum(dim=-1).mean(dim=1)


def average_logits(teacher_BKC: Tensor, _temperature: float = 1.0) -> Tensor:
    """Returns the mean of the teachers' raw logits, ``[B, C]``."""
    return _widen(teacher_BKC).mean(dim=1)


def average_probabilities(teacher_BKC: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns logits ``[B, C]`` whose tempered softmax is the mean of the teachers' tempered softmaxes.

    They are ``T log((1/K) sum_i softmax(R_ti / T))``.

    Args:
        teacher_BKC: Raw logits of the teachers.
        temperature: T > 0.
    """
    log_probs_BKC = (_widen(teacher_BKC) / temperature).log_softmax(dim=-1)
    return temperature * (log_probs_BKC.logsumexp(dim=1) - math.log(teacher_BKC.shape[1]))


SOFT_LOSSES: Mapping[str, SoftLoss] = MappingProxyType(
    {
        "mse": SoftLoss(mean_squared_logits, average_logits, uses_temperature=False),
        "kl": SoftLoss(tempered_divergence, average_probabilities, uses_temperature=True),
    }
)


def combine(golden_B: Tensor | None, soft_B: Tensor | None, alpha: float, weights_B: Tensor) -> Tensor:
    """``sum_b w_b ((1 - alpha) l_g,b + alpha l_s,b)``; the caller divides by the step's real row count.

    With golden labels only (``soft_B`` is None) alpha plays no part: the sum is that of l_g. With
    alpha = 1 the golden loss is left out of the graph altogether. An unlabelled row has l_g = 0 and so
    contributes its soft part only.

    Source: Yang et al., WSDM 2020, arXiv:1910.08381, stage 1 (alpha = 1) and stage 2.

    Args:
        golden_B: ``golden_loss``, or None if the golden head is not trained.
        soft_B: A soft loss, or None if there is no teacher.
        alpha: Weight of the soft loss, in [0, 1].
        weights_B: 1 for a real row, 0 for padding.

    Returns:
        A scalar.

    Raises:
        ValueError: No loss is given, or the golden one is missing though alpha < 1.
    """
    if soft_B is None:
        if golden_B is None:
            raise ValueError("there is no loss: neither golden labels nor a teacher")
        rows_B = golden_B
    elif alpha == 1:
        rows_B = soft_B
    elif golden_B is None:
        raise ValueError(f"alpha is {alpha}, which needs a golden loss")
    else:
        rows_B = (1 - alpha) * golden_B + alpha * soft_B
    return (rows_B * weights_B).sum()


def _widen(values: Tensor) -> Tensor:
    """Lifts half precision to float32; sums of exponentials need it."""
    return values.float() if values.dtype.itemsize < 4 else values
