"""The output head and the token losses in one step, over chunks of positions.

Shapes: N positions, D hidden size, V true vocabulary (the weight may have more rows: padding of the
vocabulary, which takes no part), M positions of a chunk, U entries of a chunk's supports, L terms.

No ``[N, V]`` tensor exists: a chunk's logits live in one buffer that becomes, in place, their
exponentials and then their gradient. Where a gradient is wanted, the forward pass computes it, and the
backward pass only multiplies by the incoming scale: that saves the fourth product with the weight which
recomputation would cost, and the gradient's memory is needed at that moment anyway. A second backward
pass through the same graph computes it again.

The weight must be whole when ``fused_losses`` is called (under ZeRO-3: inside the forward of the module
that owns it), and its gradient goes back through autograd. The first backward pass does not read it.

Invariants (tests/distill/test_fused_head.py):
    1. Value and gradients are those of dense float64 autograd; the size of chunks changes nothing.
    2. Sums over the vocabulary and over positions are float32 at least, whatever the compute dtype.
    3. Memory above hidden states and gradients does not grow with N times V.
    4. Without gradients (``torch.no_grad``) values are the same and no gradient is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.head_form import PLAIN_HEAD, HeadForm
from distill.head_pass import HeadOutcome, HeadPass
from distill.stored_targets import StoredTargets
from distill.token_losses import LossSpec, LossTerm


@dataclass(frozen=True, slots=True)
class FusedLosses:
    """The losses of N positions.

    Attributes:
        total: Scalar with its graph: the sum over positions of position weight times the weighted sum
            of terms. The caller divides by the positions that count in the whole optimizer step.
        terms_LN: Detached: each term at each position, without term and position weights, with T^2
            and the teachers' weights.
        top_log_prob_N: Detached: log q of the student's most probable token at T = 1; None where no
            term is at T = 1.
        hits_N: Whether the target is (one of) the most probable.
    """

    total: Tensor
    terms_LN: Tensor
    top_log_prob_N: Tensor | None
    hits_N: Tensor


def fused_losses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: StoredTargets | Sequence[StoredTargets],
    spec: LossSpec,
    form: HeadForm = PLAIN_HEAD,
) -> FusedLosses:
    """Applies the output head and sums the losses.

    Products are in autocast's dtype where it is on, else in the hidden states' dtype.

    Args:
        hidden_ND: Input of the head, one row for each position of the targets.
        weight_VD: The head's weight, whole; at least V rows.
        bias_V: The head's bias, or None.
        targets: One or several teachers' targets of the same positions.
        spec: The losses.
        form: The model's own scaling or soft cap, and the chunks' size.

    Raises:
        RecipeError: The stores cannot give what the spec needs.
        DataError: An id is out of range, or shapes disagree.
        ValueError: Teachers differ in vocabulary, targets or position weights, or the number of hidden
            states or rows of the weight does not fit.
    """
    teachers = (targets,) if isinstance(targets, StoredTargets) else tuple(targets)
    _check_inputs(hidden_ND, weight_VD, teachers)
    spec.check(teachers)
    wanted = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden_ND, weight_VD, bias_V)
    )
    head = HeadPass(teachers, spec, form, _compute_dtype(hidden_ND), wanted)
    total, terms_LN, top_N, hits_N = _FusedHead.apply(hidden_ND, weight_VD, bias_V, head)
    return FusedLosses(total, terms_LN, top_N if 1.0 in head.temperatures else None, hits_N)


def fused_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets: StoredTargets, form: HeadForm
) -> FusedLosses:
    """Cross-entropy on the targets alone, over the same path: the baseline of the measures."""
    spec = LossSpec((LossTerm("cross_entropy"),))
    return fused_losses(hidden_ND, weight_VD, bias_V, targets, spec, form)


class _FusedHead(torch.autograd.Function):
    """Autograd's view of ``HeadPass.run``."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, head: HeadPass
    ) -> tuple[Tensor, ...]:
        outcome = _run(head, hidden_ND, weight_VD, bias_V)
        ctx.head = head
        ctx.gradients = outcome.gradients
        ctx.has_bias = bias_V is not None
        ctx.save_for_backward(hidden_ND, weight_VD, *(() if bias_V is None else (bias_V,)))
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        details = (outcome.terms_LN, outcome.top_N, outcome.hits_N)
        ctx.mark_non_differentiable(*details)
        return outcome.total, *details

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_details: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        # Handed over and forgotten: they may be scaled in place, and autograd may keep them as .grad.
        ctx.gradients = None
        if gradients is None:
            hidden_ND, weight_VD, *rest = ctx.saved_tensors
            gradients = _run(ctx.head, hidden_ND, weight_VD, rest[0] if ctx.has_bias else None).gradients
        scaled = [
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None)


def _run(head: HeadPass, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> HeadOutcome:
    with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
        return head.run(hidden_ND, weight_VD, bias_V)


def _compute_dtype(hidden_ND: Tensor) -> torch.dtype:
    device_type = hidden_ND.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden_ND.dtype


def _check_inputs(hidden_ND: Tensor, weight_VD: Tensor, teachers: Sequence[StoredTargets]) -> None:
    if not teachers:
        raise ValueError("there are no targets; cross-entropy alone takes StoredTargets.of_tokens")
    first = teachers[0]
    for stored in teachers:
        stored.check()
        if stored.vocab_size != first.vocab_size:
            raise ValueError(f"teachers have vocabularies of {first.vocab_size} and {stored.vocab_size}")
        if not torch.equal(stored.target_ids_N, first.target_ids_N) or not torch.equal(
            stored.position_weights_N, first.position_weights_N
        ):
            raise ValueError("teachers of a batch must share its targets and position weights")
    if hidden_ND.dim() != 2 or hidden_ND.shape[0] != first.num_positions:
        raise ValueError(f"hidden states {tuple(hidden_ND.shape)} for {first.num_positions} positions")
    if weight_VD.shape[0] < first.vocab_size:
        raise ValueError(f"the head has {weight_VD.shape[0]} rows for {first.vocab_size} tokens")
