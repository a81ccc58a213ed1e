"""One pass over chunks of positions: head, losses, and the gradients where they are wanted.

Shapes: N positions, D hidden size, V true vocabulary (the weight may have more rows: padding of the
vocabulary, which takes no part), M positions of a chunk, U entries of a chunk's supports, L terms.

A chunk's logits live in one buffer that becomes, in place, their exponentials and then their gradient;
each temperature beyond one takes a copy. The losses' own gradient is autograd's, over ``[M, U]`` tensors;
from there to all logits it is the closed form of ``distill.supports``.

Invariants (tests/distill/test_fused_head.py): those of ``distill.fused_head``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.head_form import HeadForm
from distill.stored_targets import StoredTargets
from distill.supports import EMPTY, Supports
from distill.token_losses import LossSpec

BLOCK_ELEMENTS = 2**21
"""Elements of a product that is added to a weight's gradient of another type."""


@dataclass(slots=True)
class HeadOutcome:
    """What a pass over all chunks leaves; gradients are None where not wanted, float32 at least."""

    total: Tensor
    terms_LN: Tensor
    top_N: Tensor
    hits_N: Tensor
    gradients: list[Tensor | None]


@dataclass(frozen=True, slots=True)
class HeadPass:
    """All that is not a tensor with a gradient. ``wanted``: of hidden, weight, bias."""

    teachers: tuple[StoredTargets, ...]
    spec: LossSpec
    form: HeadForm
    compute_dtype: torch.dtype
    wanted: tuple[bool, ...]

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The distinct temperatures of the terms."""
        return tuple(sorted({term.temperature for term in self.spec.terms}))

    @property
    def sum_dtype(self) -> torch.dtype:
        """Of sums over the vocabulary and over positions."""
        return torch.promote_types(self.compute_dtype, torch.float32)

    def run(self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> HeadOutcome:
        """Goes through all chunks."""
        num, vocab_size = hidden_ND.shape[0], self.teachers[0].vocab_size
        weight_VD = weight_VD.detach()
        inputs = (hidden_ND, weight_VD, bias_V)
        gradients = [
            torch.zeros_like(tensor, dtype=self.sum_dtype, memory_format=torch.contiguous_format)
            if wanted and tensor is not None
            else None
            for tensor, wanted in zip(inputs, self.wanted, strict=True)
        ]
        empty_N = hidden_ND.new_empty(num, dtype=self.sum_dtype)
        outcome = HeadOutcome(
            total=hidden_ND.new_zeros((), dtype=self.sum_dtype),
            terms_LN=hidden_ND.new_empty(len(self.spec.terms), num, dtype=self.sum_dtype),
            top_N=empty_N,
            hits_N=torch.empty(num, dtype=torch.bool, device=hidden_ND.device),
            gradients=gradients,
        )
        chunk = min(self.form.chunk_of(vocab_size, hidden_ND.device), max(num, 1))
        pass_ = _ChunkPass(self, weight_VD[:vocab_size].to(self.compute_dtype), bias_V, chunk)
        for start in range(0, num, chunk):
            pass_.go(hidden_ND.detach(), start, min(start + chunk, num), outcome)
        return outcome


class _ChunkPass:
    """Goes through one chunk after another with buffers that they share."""

    def __init__(self, head: HeadPass, weight_VD: Tensor, bias_V: Tensor | None, chunk: int) -> None:
        self._head = head
        self._weight_VD = weight_VD
        self._vocab_size = weight_VD.shape[0]
        self._bias_V = None if bias_V is None else bias_V.detach()[: self._vocab_size].to(head.sum_dtype)
        # Half precision has 6e-8 as its least number: gradients would vanish before any loss scaling.
        self._gradient_dtype = torch.float32 if head.compute_dtype == torch.float16 else head.compute_dtype
        self._wants_any = any(head.wanted)
        self._buffer_MV = weight_VD.new_empty(chunk, self._vocab_size, dtype=head.sum_dtype)

    def go(self, hidden_ND: Tensor, start: int, stop: int, outcome: HeadOutcome) -> None:
        """Adds one chunk's part to the outcome."""
        head = self._head
        hidden_MD = hidden_ND[start:stop].to(head.compute_dtype)
        supports = Supports.of([each.narrow(start, stop) for each in head.teachers])
        logits_MV = self._logits(hidden_MD)
        soft_cap = head.form.soft_cap
        capped_MV = logits_MV.clone() if soft_cap is not None and self._wants_any else None
        kept_MU = logits_MV.gather(1, supports.ids_NU)
        logits_MV.scatter_(1, supports.ids_NU, -torch.inf)
        top_M1 = logits_MV.amax(dim=-1, keepdim=True).clamp(min=EMPTY)
        powers = _exponentiate(logits_MV, top_M1, head.temperatures)
        rest_M = {
            temperature: (power.sums_M1.log() + top_M1 / temperature).clamp(min=EMPTY)[:, 0]
            for temperature, power in powers.items()
        }
        outcome.top_N[start:stop], outcome.hits_N[start:stop] = _judge(
            supports, kept_MU, top_M1, rest_M.get(1.0)
        )
        kept_gradient_MU = self._differentiate(supports, kept_MU, rest_M, slice(start, stop), outcome)
        if kept_gradient_MU is None:
            return
        gradient_MV = _combine(powers, rest_M)
        gradient_MV.scatter_add_(1, supports.ids_NU, kept_gradient_MU)
        if capped_MV is not None and soft_cap is not None:
            gradient_MV.mul_(capped_MV.div_(soft_cap).square_().neg_().add_(1.0))
        if head.form.scale != 1:
            gradient_MV.mul_(head.form.scale)
        self._accumulate(gradient_MV, hidden_MD, slice(start, stop), outcome.gradients)

    def _logits(self, hidden_MD: Tensor) -> Tensor:
        """Fills the buffer with a chunk's logits."""
        logits_MV = self._buffer_MV[: hidden_MD.shape[0]]
        if hidden_MD.dtype == logits_MV.dtype:
            torch.mm(hidden_MD, self._weight_VD.T, out=logits_MV)
        else:
            logits_MV.copy_(hidden_MD @ self._weight_VD.T)
        if self._bias_V is not None:
            logits_MV.add_(self._bias_V)
        if self._head.form.scale != 1:
            logits_MV.mul_(self._head.form.scale)
        soft_cap = self._head.form.soft_cap
        if soft_cap is not None:
            logits_MV.div_(soft_cap).tanh_().mul_(soft_cap)
        return logits_MV

    def _differentiate(
        self,
        supports: Supports,
        kept_MU: Tensor,
        rest_M: dict[float, Tensor],
        rows: slice,
        outcome: HeadOutcome,
    ) -> Tensor | None:
        """Adds up the losses; leaves dL/drest in the ``grad`` of ``rest_M``, returns dL/dkept."""
        spec, teachers = self._head.spec, self._head.teachers
        weights_L = kept_MU.new_tensor([term.weight for term in spec.terms])
        weights_M = teachers[0].position_weights_N[rows].to(kept_MU.dtype)
        leaves = [kept_MU, *rest_M.values()]
        with torch.set_grad_enabled(self._wants_any):
            for leaf in leaves:
                leaf.requires_grad_(self._wants_any)
            terms_LM = supports.losses(kept_MU, rest_M, spec)
            total = ((weights_L[:, None] * terms_LM).sum(dim=0) * weights_M).sum()
            if self._wants_any:
                total.backward()
        outcome.terms_LN[:, rows] = terms_LM.detach()
        outcome.total += total.detach()
        return kept_MU.grad

    def _accumulate(
        self, gradient_MV: Tensor, hidden_MD: Tensor, rows: slice, gradients: list[Tensor | None]
    ) -> None:
        """Takes a chunk's gradient with respect to the head's raw outputs through the head."""
        of_hidden_ND, of_weight_VD, of_bias_V = gradients
        if of_bias_V is not None:
            of_bias_V[: self._vocab_size] += gradient_MV.sum(dim=0)
        narrow_MV = gradient_MV.to(self._gradient_dtype)
        if of_hidden_ND is not None:
            of_hidden_ND[rows] = narrow_MV @ self._weight_VD.to(self._gradient_dtype)
        if of_weight_VD is None:
            return
        inputs_MD = hidden_MD.to(self._gradient_dtype)
        true_VD = of_weight_VD[: self._vocab_size]
        if true_VD.dtype == narrow_MV.dtype:
            true_VD.addmm_(narrow_MV.T, inputs_MD)
            return
        # In blocks: the products are of another type than their sum and need room of their own.
        rows_of_block = max(1, BLOCK_ELEMENTS // inputs_MD.shape[1])
        for block in range(0, self._vocab_size, rows_of_block):
            cut = slice(block, block + rows_of_block)
            true_VD[cut] += narrow_MV[:, cut].T @ inputs_MD


@dataclass(slots=True)
class _Powers:
    """Exponentials of (logits - their largest) / T outside a chunk's supports, and their sums."""

    powers_MV: Tensor
    sums_M1: Tensor


def _exponentiate(logits_MV: Tensor, top_M1: Tensor, temperatures: Sequence[float]) -> dict[float, _Powers]:
    """Makes exponentials for each temperature; the last ones take the logits' place."""
    logits_MV.sub_(top_M1)
    made = {}
    for index, temperature in enumerate(temperatures):
        is_last = index == len(temperatures) - 1
        powers_MV = logits_MV if is_last else logits_MV.clone()
        if temperature != 1:
            powers_MV.div_(temperature)
        powers_MV.exp_()
        made[temperature] = _Powers(powers_MV, powers_MV.sum(dim=-1, keepdim=True))
    return made


def _combine(powers: dict[float, _Powers], rest_M: dict[float, Tensor]) -> Tensor:
    """Returns the gradient with respect to the logits outside the supports (0 inside), in place."""
    combined_MV: Tensor | None = None
    for temperature, power in powers.items():
        gradient_M = rest_M[temperature].grad
        if gradient_M is None:
            raise ValueError("unreachable: a loss depends on every temperature of the spec")
        factor_M1 = gradient_M[:, None] / temperature / power.sums_M1
        power.powers_MV.mul_(factor_M1.masked_fill(power.sums_M1 == 0, 0.0))
        combined_MV = power.powers_MV if combined_MV is None else combined_MV.add_(power.powers_MV)
    if combined_MV is None:
        raise ValueError("unreachable: a spec has at least one temperature")
    return combined_MV


def _judge(
    supports: Supports, kept_MU: Tensor, top_M1: Tensor, rest_M: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns log q of the most probable token (NaN without T = 1), and whether the target is it."""
    best_M = torch.maximum(top_M1[:, 0], kept_MU.amax(dim=-1))
    hits_M = kept_MU.gather(1, supports.target_slots_N[:, None])[:, 0] >= best_M
    if rest_M is None:
        return torch.full_like(best_M, torch.nan), hits_M
    shifted_MU = kept_MU.masked_fill(~supports.valid_NU, EMPTY) - best_M[:, None]
    return -shifted_MU.logsumexp(dim=-1).logaddexp(rest_M - best_M), hits_M
