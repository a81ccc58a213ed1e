"""What the losses need to know of a student's logits: the entries that any store names, and the rest.

Shapes: N positions, V vocabulary, K kept entries of one teacher, U = 1 + the sum of all teachers' K.

Let U be the union of all teachers' supports and the target. Every loss is a function of the logits in U
and of one number besides: r, the log-sum-exp of all logits outside U. A teacher's tail is
``logaddexp(r, logits of U outside its support)``: only sums, nothing is subtracted from 1, so a tail of
mass 1e-30 has as many digits as one of mass 1. The gradient with respect to a logit outside U is
dL/dr times exp(z - r), whatever the losses and the number of teachers.

Invariants:
    1. Duplicates among teachers and padding count once (tests/distill/test_token_losses.py).
    2. Tail masses of 1e-7 and less have full relative precision (tests/distill/test_token_losses.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.stored_targets import StoredTargets
from distill.token_losses import LOG_FLOOR, TOKEN_LOSSES, Comparison, LossSpec

EMPTY = -1e30
"""Log of no mass, as a finite number: its exponential is 0 and 0 times it is 0, never NaN."""


@dataclass(frozen=True, slots=True)
class Supports:
    """The union of the supports of some teachers and the target.

    Attributes:
        targets: The teachers' targets.
        ids_NU: int64 in ``[0, V)``, ascending; duplicates are kept but invalid.
        valid_NU: False for duplicates, so that valid ids are distinct.
        slots_NK: Per teacher: where its entries are in ``ids_NU`` (valid ones; anything at padding).
        inside_NU: Per teacher: True where an id of the union is one of its exact entries.
        target_slots_N: Where the target is.
    """

    targets: tuple[StoredTargets, ...]
    ids_NU: Tensor
    valid_NU: Tensor
    slots_NK: tuple[Tensor, ...]
    inside_NU: tuple[Tensor, ...]
    target_slots_N: Tensor

    @classmethod
    def of(cls, targets: Sequence[StoredTargets]) -> Supports:
        """Merges supports; the target is that of the first."""
        goal_N1 = targets[0].target_ids_N.long()[:, None]
        # Padding repeats the target, which makes it one more duplicate.
        columns = [torch.where(each.mask_NK, each.ids_NK.long(), goal_N1) for each in targets]
        ids_NU = torch.cat([*columns, goal_N1], dim=-1).sort(dim=-1).values
        valid_NU = torch.ones_like(ids_NU, dtype=torch.bool)
        valid_NU[:, 1:] = ids_NU[:, 1:] != ids_NU[:, :-1]
        slots = tuple(torch.searchsorted(ids_NU, column_NK) for column_NK in columns)
        inside = tuple(
            torch.zeros_like(ids_NU, dtype=torch.int32).scatter_add_(1, slots_NK, each.exact_NK.int()) > 0
            for each, slots_NK in zip(targets, slots, strict=True)
        )
        goal_N = torch.searchsorted(ids_NU, goal_N1)[:, 0]
        return cls(tuple(targets), ids_NU, valid_NU, slots, inside, goal_N)

    def compare(self, logits_NU: Tensor, rest_N: Tensor, teacher: int, temperature: float) -> Comparison:
        """Puts the student beside one teacher.

        Args:
            logits_NU: The student's logits at ``ids_NU``, not tempered.
            rest_N: Log-sum-exp of its logits / T outside ``ids_NU``, ``EMPTY`` where there are none.
            teacher: Index of the teacher.
            temperature: T.
        """
        stored, slots_NK = self.targets[teacher], self.slots_NK[teacher]
        tempered_NU = logits_NU / temperature
        filled_NU = torch.cat([tempered_NU.masked_fill(~self.valid_NU, EMPTY), rest_N[:, None]], dim=-1)
        # Shifted first: differences of numbers near 0 keep their digits.
        shift_N1 = filled_NU.detach().amax(dim=-1, keepdim=True)
        shifted_NU = filled_NU - shift_N1
        total_N1 = shifted_NU.logsumexp(dim=-1, keepdim=True)
        inside_NU = torch.nn.functional.pad(self.inside_NU[teacher], (0, 1))
        tail_N = shifted_NU.masked_fill(inside_NU, EMPTY).logsumexp(dim=-1)
        student_NU = shifted_NU - total_N1
        return Comparison(
            student_NK=student_NU.gather(1, slots_NK),
            student_tail_N=tail_N - total_N1[:, 0],
            student_target_N=student_NU.gather(1, self.target_slots_N[:, None])[:, 0],
            **_teacher_side(stored, temperature),
        )

    def losses(self, logits_NU: Tensor, rest_N: dict[float, Tensor], spec: LossSpec) -> Tensor:
        """Returns each term's loss at each position, ``[L, N]``, L terms, without the terms' weights.

        Args:
            logits_NU: The student's logits at ``ids_NU``, not tempered.
            rest_N: Log-sum-exp of logits / T outside ``ids_NU``, for each temperature of the spec.
            spec: The terms; T^2 and the teachers' weights are in the result.
        """
        pairs: dict[tuple[int, float], Comparison] = {}
        weights = spec.weights_of(len(self.targets))
        rows = []
        for term in spec.terms:
            loss, temperature = TOKEN_LOSSES[term.name], term.temperature
            loss_N = logits_NU.new_zeros(logits_NU.shape[0])
            for teacher, weight in enumerate(weights if loss.uses_teacher else (1.0,)):
                key = (teacher, temperature)
                if key not in pairs:
                    pairs[key] = self.compare(logits_NU, rest_N[temperature], teacher, temperature)
                each_N = loss.per_position(pairs[key], term.beta)
                loss_N = loss_N + weight * temperature**2 * each_N
            rows.append(loss_N)
        return torch.stack(rows)


def _teacher_side(stored: StoredTargets, temperature: float) -> dict[str, Tensor]:
    """Returns the fields of a ``Comparison`` that the student has no part in."""
    log_probs_NK, log_tail_N = stored.tempered(temperature)
    exact_NK = stored.exact_NK
    teacher_NK = log_probs_NK.masked_fill(~exact_NK, 0.0).clamp(min=LOG_FLOOR)
    probs_NK = teacher_NK.exp()
    mass_NK = probs_NK if stored.weights_NK is None else stored.weights_NK.to(teacher_NK.dtype)
    inexact_N = torch.zeros_like(log_tail_N)
    if stored.num_exact_N is not None and stored.entropy_N is not None:
        inexact_N = -stored.entropy_N - (probs_NK * teacher_NK).sum(dim=-1)
    return {
        "mask_NK": exact_NK,
        "teacher_NK": teacher_NK,
        "teacher_tail_N": log_tail_N.clamp(min=LOG_FLOOR),
        "mass_NK": mass_NK.masked_fill(~stored.mask_NK, 0.0),
        "inexact_N": inexact_N,
    }
