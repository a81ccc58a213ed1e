"""How far a student's gradient turns when it learns from kept entries in place of whole distributions.

The gradient is that of the mean loss over a sample, with respect to all parameters that are trained, at
the student's initial weights. That of whole distributions is compared: loss by loss, angle and length.

Shapes: R chunks, B of a batch, L tokens of the longest, P positions of all chunks, N of a piece, D hidden
size, V true vocabulary, W rows of the head.

The gradient is made in two parts, so that no ``[P, V]`` tensor exists: of the losses with respect to the
head and its inputs, piece by piece of positions; then from the inputs on through the model.

Invariants (tests/cluster/language/test_gradient_angle.py):
    1. The gradient is that of the whole model in one piece.
    2. The angle of a gradient to itself is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distill.fused_head import fused_losses
from distill.language_student import LanguageStudent
from distill.packing import PackedTokens
from distill.stored_targets import StoredTargets, TargetOrigin
from distill.token_losses import LossSpec, LossTerm
from precompute.batching import cut_batches
from precompute.kept_positions import slice_positions
from precompute.language_forward import ChunkRows, find_positions
from precompute.trial_sample import DensePiece
from precompute.truncate import KeptPositions, Truncation
from schemas.kept_entries import KeptEntries, PositionStats
from schemas.language import CodecName, LossName
from schemas.policy import AnyPolicy, DensePolicy

# Tokens that go through the student at once, with what their backward pass needs.
_BATCH_TOKENS = 2048
# Positions whose kept entries are padded to one tensor at once.
_PIECE_POSITIONS = 512
_WHOLE: LossName = "unbiased_kl"

Gradient = tuple[Tensor, ...]
"""Of each trained parameter."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A gradient beside another: angle in degrees, and its length over the other's."""

    angle: float
    ratio: float


@dataclass(frozen=True, slots=True)
class HeadGradient:
    """Of a loss, so far: of the head's inputs, and of its weight and bias where these are trained."""

    hidden_PD: Tensor
    weight_WD: Tensor | None
    bias_W: Tensor | None


@dataclass(frozen=True, slots=True)
class _StudentBatch:
    """Chunks as the student reads them, and where their positions lie in it and among all P."""

    input_ids_BL: Tensor
    positions_BL: Tensor
    segments_BL: Tensor
    inner_N: Tensor
    places_N: Tensor


class SampleStudent:
    """A student over the chunks of a sample."""

    def __init__(self, student: LanguageStudent, rows: ChunkRows, vocab: int) -> None:
        self._student, self._vocab = student.eval(), vocab
        positions_P, _ = rows.positions()
        targets_P = rows.chunks.input_ids[positions_P + rows.objective_shift].astype(np.int64)
        self._device = student.head.weight.device
        self._targets_P = torch.from_numpy(targets_P)
        self._batches = [self._lay_out(rows, indices_B) for indices_B in _cut(rows)]
        self._hidden_PD = torch.empty(len(positions_P), student.head.weight.shape[1], device=self._device)
        with torch.no_grad():
            for batch in self._batches:
                self._hidden_PD[batch.places_N] = self._encode(batch).to(self._hidden_PD.dtype)

    def empty(self) -> HeadGradient:
        """Returns the gradient of no positions."""
        head = self._student.head
        weight, bias = head.weight, head.bias
        return HeadGradient(
            torch.zeros_like(self._hidden_PD),
            torch.zeros_like(weight) if weight.requires_grad else None,
            torch.zeros_like(bias) if bias is not None and bias.requires_grad else None,
        )

    def add_whole(
        self, gradient: HeadGradient, piece: DensePiece, entries: KeptEntries | None = None
    ) -> None:
        """Adds the positions of a piece, with their whole distributions.

        Args:
            gradient: Is added to.
            piece: Of the teacher's pass.
            entries: In place of the exact ones.
        """
        exact = piece.exact
        places_N = torch.from_numpy(piece.places_N)
        self._add(gradient, places_N, (entries or exact.entries, exact.stats), DensePolicy(), _WHOLE)

    def add_kept(self, kept: KeptPositions, policy: AnyPolicy, loss: LossName) -> HeadGradient:
        """Returns the gradient of a loss on what a policy keeps of all positions."""
        gradient = self.empty()
        for start in range(0, len(self._targets_P), _PIECE_POSITIONS):
            stop = min(start + _PIECE_POSITIONS, len(self._targets_P))
            part = slice_positions(kept, start, stop)
            self._add(gradient, torch.arange(start, stop), (part.entries, part.stats), policy, loss)
        return gradient

    def through_model(self, gradient: HeadGradient) -> Gradient:
        """Returns the gradient with respect to all trained parameters, in memory of its own."""
        self._student.zero_grad(set_to_none=True)
        for batch in self._batches:
            hidden_ND = self._encode(batch)
            hidden_ND.backward(gradient.hidden_PD[batch.places_N].to(hidden_ND.dtype))
        head = self._student.head
        for parameter, found in ((head.weight, gradient.weight_WD), (head.bias, gradient.bias_W)):
            if found is not None:
                # A weight that is tied to the embeddings has their gradient already.
                parameter.grad = found if parameter.grad is None else parameter.grad.add_(found)
        trained = [one for one in self._student.parameters() if one.requires_grad]
        gradients = tuple(torch.zeros_like(one) if one.grad is None else one.grad for one in trained)
        self._student.zero_grad(set_to_none=True)
        return gradients

    def _add(
        self,
        gradient: HeadGradient,
        places_N: Tensor,
        stored: tuple[KeptEntries, PositionStats],
        policy: AnyPolicy,
        loss: LossName,
    ) -> None:
        head = self._student.head
        origin = TargetOrigin(policy.kind, self._vocab)
        targets = StoredTargets.of_entries(*stored, origin, self._targets_P[places_N]).to(self._device)
        places_N = places_N.to(self._device)
        hidden_ND = self._hidden_PD[places_N].requires_grad_()
        sums = {"weight": gradient.weight_WD, "bias": gradient.bias_W}
        wanted = [name for name, total in sums.items() if total is not None]
        found = fused_losses(
            hidden_ND, head.weight, head.bias, targets, LossSpec((LossTerm(loss),)), head.form
        )
        inputs = [hidden_ND, *(getattr(head, name) for name in wanted)]
        hidden_grad_ND, *others = torch.autograd.grad(found.total, inputs)
        gradient.hidden_PD[places_N] += hidden_grad_ND
        for name, other in zip(wanted, others, strict=True):
            total = sums[name]
            if total is not None:
                total += other

    def _encode(self, batch: _StudentBatch) -> Tensor:
        hidden_BLD = self._student.encode(batch.input_ids_BL, batch.positions_BL, batch.segments_BL)
        return hidden_BLD.flatten(0, 1).index_select(0, batch.inner_N)

    def _lay_out(self, rows: ChunkRows, indices_B: npt.NDArray[np.int64]) -> _StudentBatch:
        offsets = rows.chunks.offsets
        lengths_B = np.diff(offsets)[indices_B]
        laid = PackedTokens.lay_out(lengths_B, np.arange(len(indices_B) + 1, dtype=np.int64))
        sources = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in indices_B.tolist()])
        tokens = rows.chunks.input_ids[sources].astype(np.int64)
        if rows.mask_token is not None:
            tokens[rows.chunks.loss_mask[sources] == 1] = rows.mask_token
        input_ids_BL = np.full(laid.shape, self._student.pad_id, np.int64)
        input_ids_BL.reshape(-1)[laid.places] = tokens
        truncation = Truncation(DensePolicy(), self._vocab)
        found = find_positions(rows, indices_B, rows.positions(), truncation)
        inner_N = found.rows_P * laid.shape[1] + found.columns_P
        arrays = (input_ids_BL, laid.positions_BL, laid.segments_BL, inner_N, found.places_P)
        return _StudentBatch(*(torch.from_numpy(array).to(self._device) for array in arrays))


class WholeGradients:
    """Watches a teacher's pass: the gradient of whole distributions, exact and as codecs give them back."""

    def __init__(self, student: SampleStudent) -> None:
        self._student = student
        self.exact = student.empty()
        self.decoded: dict[CodecName, HeadGradient] = {}

    def __call__(self, piece: DensePiece) -> None:
        """Adds the positions of a piece."""
        self._student.add_whole(self.exact, piece)
        for codec, entries in piece.decoded.items():
            if codec not in self.decoded:
                self.decoded[codec] = self._student.empty()
            self._student.add_whole(self.decoded[codec], piece, entries)


def measure_turn(gradient: Gradient, reference: Gradient) -> Turn:
    """Compares two gradients that are not zero.

    The angle is that between unit vectors u and v, ``2 atan2(|u - v|, |u + v|)``: exact for small ones too.

    Source: Kahan 2006, "How Futile are Mindless Assessments of Roundoff in Floating-Point Computation?".
    """
    length, other = _length(gradient), _length(reference)
    if not length or not other:
        return Turn(0.0 if length == other else 90.0, 1.0 if length == other else 0.0)
    apart = together = 0.0
    for one, two in zip(gradient, reference, strict=True):
        u, v = one.double() / length, two.double() / other
        apart += float((u - v).square().sum())
        together += float((u + v).square().sum())
    angle = math.degrees(2 * math.atan2(math.sqrt(apart), math.sqrt(together)))
    return Turn(min(angle, 180.0), length / other)


def _length(gradient: Gradient) -> float:
    return math.sqrt(sum(float(one.double().square().sum()) for one in gradient))


def _cut(rows: ChunkRows) -> list[npt.NDArray[np.int64]]:
    return cut_batches(np.diff(rows.chunks.offsets), _BATCH_TOKENS)
