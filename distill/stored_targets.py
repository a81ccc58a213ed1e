"""What a teacher's store says about a batch of positions, as tensors for the losses.

Shapes: N positions, K kept entries (padded to the longest position), S kept entries of all positions,
G temperatures of the grid, V true vocabulary.

Position t of a sequence predicts token t + 1: row n of the targets belongs to the hidden state of
position t and carries ``target_ids_N[n] = input_ids[t + 1]``. The shift is done once, by whoever
stored or selected the positions, never in a loss.

Invariants:
    1. Padding entries have mask False and mass 0, and no loss depends on their ids or values
       (tests/distill/test_token_losses.py).
    2. At a temperature of the grid the kept log-probabilities are exact up to rounding, and the tail
       lies within bounds that are computed without cancellation (tests/distill/test_stored_targets.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from schemas.errors import DataError, TemperatureError
from schemas.kept_entries import KeptEntries, PositionStats

_Change: TypeAlias = Callable[[Tensor], Tensor]


class SupportKind(StrEnum):
    """What the kept entries are to the whole distribution.

    Attributes:
        COMPLETE: All of it (``dense``).
        EXACT: A deterministic head (``top_k``, ``top_p``): sums over it are exact for the head and
            say nothing of the tail but its mass.
        UNBIASED: A random draw (``sampled``, ``hybrid``): sums over it with the weights have the whole
            distribution's sum as their expectation.
    """

    COMPLETE = "complete"
    EXACT = "exact"
    UNBIASED = "unbiased"

    @classmethod
    def of(cls, policy: str) -> SupportKind:
        """Returns what the policy of this ``kind`` keeps."""
        return {"dense": cls.COMPLETE, "sampled": cls.UNBIASED, "hybrid": cls.UNBIASED}.get(policy, cls.EXACT)


@dataclass(frozen=True, slots=True)
class TargetOrigin:
    """What a store says of all its positions.

    Attributes:
        policy: The ``kind`` of its keep policy.
        vocab_size: V, the true vocabulary.
        temperatures: Its grid.
    """

    policy: str
    vocab_size: int
    temperatures: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredTargets:
    """One teacher's stored distributions for N positions.

    Attributes:
        kind: What the entries are to the whole distribution.
        vocab_size: V, the true vocabulary.
        ids_NK: int32 or int64 token ids in ``[0, V)``, distinct within a position; any id at padding.
        log_probs_NK: Log-softmax at T = 1 over the true vocabulary, not renormalised; anything at padding
            and at inexact entries.
        counts_N: int64, kept entries of each position; entries from there on are padding.
        num_exact_N: int64, how many of them, the first, have their own log-probability; the others are
            the sampled tail of ``hybrid``, which only sums linear in p may use. None: all.
        weights_NK: Probability mass that each entry stands for: for ``sampled`` its importance
            weight (1/N times the sum over its draws of p over the proposal), for ``hybrid`` p of
            the head's entries and tau of the tail's; None: p itself.
        log_tail_N: Log of the mass outside the exact entries; -inf where nothing is missing.
        entropy_N: The teacher's entropy at T = 1; needed where entries are inexact, else it may be None.
        lse_N: Log-sum-exp of the teacher's logits at T = 1.
        lse_grid_NG: Log-sum-exp of logits / T for each temperature of the grid, or None.
        temperatures: The grid.
        target_ids_N: int64, the token that the position has to predict, in ``[0, V)``.
        position_weights_N: Weight of each position in the sums; 0 for padding.
    """

    kind: SupportKind
    vocab_size: int
    ids_NK: Tensor
    log_probs_NK: Tensor
    counts_N: Tensor
    num_exact_N: Tensor | None
    weights_NK: Tensor | None
    log_tail_N: Tensor
    entropy_N: Tensor | None
    lse_N: Tensor
    lse_grid_NG: Tensor | None
    temperatures: tuple[float, ...]
    target_ids_N: Tensor
    position_weights_N: Tensor

    @classmethod
    def of_entries(
        cls,
        entries: KeptEntries,
        stats: PositionStats,
        origin: TargetOrigin,
        target_ids_N: Tensor,
        position_weights_N: Tensor | None = None,
    ) -> StoredTargets:
        """Pads what a codec has decoded; all numbers are copied, so that mapped memory may go.

        Args:
            entries: Kept entries of N positions, of any number of rows.
            stats: Their other numbers.
            origin: What the store says of itself.
            target_ids_N: int64, the token that each position has to predict.
            position_weights_N: None: 1 each.
        """
        span = slice(int(entries.offsets[0]), int(entries.offsets[-1]))
        counts, weights = entries.counts, entries.weights
        padding = _Padding.of(counts)
        return cls(
            kind=SupportKind.of(origin.policy),
            vocab_size=origin.vocab_size,
            # Narrow ids are widened (torch can do little with uint16), narrow floats where they are used.
            ids_NK=padding.lay_out(entries.ids[span], np.int32),
            log_probs_NK=padding.lay_out(entries.log_probs[span]),
            counts_N=torch.tensor(counts),
            num_exact_N=None if entries.num_head is None else torch.tensor(entries.num_head).long(),
            weights_NK=None if weights is None else padding.lay_out(weights[span]),
            log_tail_N=torch.tensor(stats.log_tail),
            entropy_N=torch.tensor(stats.entropy),
            lse_N=torch.tensor(stats.lse),
            lse_grid_NG=torch.tensor(stats.lse_grid) if origin.temperatures else None,
            temperatures=origin.temperatures,
            target_ids_N=target_ids_N,
            position_weights_N=torch.ones(len(counts)) if position_weights_N is None else position_weights_N,
        )

    @classmethod
    def of_tokens(
        cls, target_ids_N: Tensor, vocab_size: int, position_weights_N: Tensor | None = None
    ) -> StoredTargets:
        """Makes targets without a teacher: K = 0, all mass in the tail; for cross-entropy alone."""
        (num,), device = target_ids_N.shape, target_ids_N.device
        zeros_N = torch.zeros(num, device=device)
        return cls(
            kind=SupportKind.EXACT,
            vocab_size=vocab_size,
            ids_NK=torch.zeros(num, 0, dtype=torch.int64, device=device),
            log_probs_NK=torch.zeros(num, 0, device=device),
            counts_N=torch.zeros(num, dtype=torch.int64, device=device),
            num_exact_N=None,
            weights_NK=None,
            log_tail_N=zeros_N,
            entropy_N=None,
            lse_N=zeros_N,
            lse_grid_NG=None,
            temperatures=(),
            target_ids_N=target_ids_N,
            position_weights_N=torch.ones_like(zeros_N) if position_weights_N is None else position_weights_N,
        )

    @property
    def num_positions(self) -> int:
        """N."""
        return self.ids_NK.shape[0]

    @property
    def mask_NK(self) -> Tensor:
        """True for entries, False for padding."""
        return self._first(self.counts_N)

    @property
    def exact_NK(self) -> Tensor:
        """True for entries with their own log-probability."""
        return self._first(self.counts_N if self.num_exact_N is None else self.num_exact_N)

    def narrow(self, start: int, stop: int) -> StoredTargets:
        """Returns positions ``[start, stop)`` as views."""
        return self._map(lambda rows: rows[start:stop])

    def select(self, index_M: Tensor) -> StoredTargets:
        """Returns the positions of an index or a mask, as copies."""
        return self._map(lambda rows: rows[index_M])

    def weighted(self, position_weights_N: Tensor) -> StoredTargets:
        """Returns the same with other weights of positions."""
        return dataclasses.replace(self, position_weights_N=position_weights_N)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> StoredTargets:
        """Moves all tensors to a device."""
        return self._map(lambda rows: rows.to(device, non_blocking=non_blocking))

    def check(self) -> None:
        """Checks shapes and ids.

        Raises:
            DataError: Shapes disagree, an id is out of range, or a kind lacks its weights.
        """
        shapes = {name: tuple(rows.shape) for name, rows in self._tensors().items()}
        num, width = self.ids_NK.shape
        wanted = {
            name: (num, width) if name.endswith("_NK") else (num, len(self.temperatures))
            for name in shapes
            if not name.endswith("_N")
        } | {name: (num,) for name in shapes if name.endswith("_N")}
        for name, shape in shapes.items():
            if shape != wanted[name]:
                raise DataError(f"stored targets: {name} has shape {shape}, expected {wanted[name]}")
        if (self.kind is SupportKind.UNBIASED) != (self.weights_NK is not None):
            raise DataError(f"stored targets: kind {self.kind} and weights do not go together")
        if self.num_exact_N is not None and (self.weights_NK is None or self.entropy_N is None):
            raise DataError("stored targets: inexact entries need weights and the teacher's entropy")
        for name, ids in (("kept", self.ids_NK[self.mask_NK]), ("target", self.target_ids_N)):
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
                raise DataError(
                    f"stored targets: {name} id {int(ids.max())} or {int(ids.min())} is out of range; "
                    f"the vocabulary has {self.vocab_size} tokens"
                )

    def check_temperature(self, temperature: float, store: str = "the store") -> None:
        """Checks that the teacher's distribution can be had exactly at a temperature.

        Args:
            temperature: T > 0.
            store: What the error calls the store.

        Raises:
            TemperatureError: It is not 1, and not in the grid or the policy is not deterministic.
        """
        if temperature == 1:
            return
        if self.kind is SupportKind.UNBIASED:
            raise TemperatureError(
                f"{store} is sampled or hybrid, and unbiased at temperature 1 only; use a dense, top_k or "
                "top_p one, or temperature 1",
                temperature=temperature,
                grid=self.temperatures,
            )
        if self.lse_grid_NG is None or self._grid_column(temperature) is None:
            raise TemperatureError(
                f"{store} holds no log-sum-exp at this temperature; use one that it has, or make it again "
                "with this one in its teacher's `temperatures`",
                temperature=temperature,
                grid=self.temperatures,
            )

    def tempered(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Returns the teacher's log-probabilities at T: of the entries, and of the tail.

        log p_T,i = (log p_i + lse) / T - lse_T, exact up to rounding. The tail at T is what the
        entries leave; where it is small the subtraction is noise, so it is kept within bounds that
        need none: with s = (log_tail + lse) / T - lse_T, the tail lies between s and
        s + (1 - 1/T) log(V - K), since x -> x^(1/T) is concave for T > 1 (convex for T < 1).

        Args:
            temperature: T > 0.

        Returns:
            ``(log_probs_NK, log_tail_N)``, float32 at least; anything at padding.

        Raises:
            TemperatureError: See ``check_temperature``.
        """
        log_probs_NK, log_tail_N = _widen(self.log_probs_NK), _widen(self.log_tail_N)
        if temperature == 1:
            return log_probs_NK, log_tail_N
        self.check_temperature(temperature)
        column = self._grid_column(temperature)
        if column is None or self.lse_grid_NG is None:
            raise ValueError("unreachable: the temperature was checked")
        # Float64: the tail is a difference of numbers near 1.
        lse_N, lse_t_N = self.lse_N.double(), self.lse_grid_NG[:, column].double()
        at_t_NK = (log_probs_NK.double() + lse_N[:, None]) / temperature - lse_t_N[:, None]
        kept_N = at_t_NK.masked_fill(~self.mask_NK, -math.inf).exp().sum(dim=-1).log()
        start_N = (log_tail_N.double() + lse_N) / temperature - lse_t_N
        num_rest_N = (self.vocab_size - self.counts_N).clamp(min=1).double()
        end_N = start_N + (1 - 1 / temperature) * num_rest_N.log()
        tail_N = _log1mexp(kept_N.clamp(max=-1e-300))
        tail_N = torch.minimum(tail_N.maximum(start_N.minimum(end_N)), start_N.maximum(end_N)).clamp(max=0)
        return at_t_NK.to(log_probs_NK.dtype), tail_N.to(log_tail_N.dtype)

    def _first(self, counts_N: Tensor) -> Tensor:
        slots_K = torch.arange(self.ids_NK.shape[1], device=self.ids_NK.device)
        return slots_K[None, :] < counts_N[:, None]

    def _grid_column(self, temperature: float) -> int | None:
        close = (math.isclose(temperature, entry, rel_tol=1e-9) for entry in self.temperatures)
        return next((column for column, is_it in enumerate(close) if is_it), None)

    def _tensors(self) -> dict[str, Tensor]:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def _map(self, change: _Change) -> StoredTargets:
        changed: dict[str, Any] = {name: change(rows) for name, rows in self._tensors().items()}
        return dataclasses.replace(self, **changed)


@dataclass(frozen=True, slots=True)
class _Padding:
    """Where entries of positions with different counts go in ``[N, K]``; ``mask`` None: they fill it."""

    num: int
    width: int
    mask: npt.NDArray[np.bool_] | None

    @classmethod
    def of(cls, counts: npt.NDArray[np.int64]) -> _Padding:
        num, width = len(counts), int(counts.max(initial=0))
        if counts.min(initial=width) == width:
            return cls(num, width, None)
        # Comparisons of narrow numbers take a fraction of the time.
        narrow = np.dtype(np.int16 if width < np.iinfo(np.int16).max else np.int32)
        slots: npt.NDArray[np.integer] = np.arange(width).astype(narrow)
        ends: npt.NDArray[np.integer] = counts.astype(narrow)
        return cls(num, width, slots[None, :] < ends[:, None])

    def lay_out(self, values: npt.NDArray[Any], dtype: npt.DTypeLike | None = None) -> Tensor:
        """Copies a flat column of all positions, as ``dtype`` if given; padding is 0.

        Numpy's assignment by mask is three to ten times as fast as torch's, as measured.
        """
        if self.mask is None:
            return torch.from_numpy(np.array(values, dtype)).reshape(self.num, self.width)
        padded = np.zeros(self.mask.shape, dtype or values.dtype)
        padded[self.mask] = values
        return torch.from_numpy(padded)


def join_targets(parts: Sequence[StoredTargets]) -> StoredTargets:
    """Puts positions one after another; narrower parts are padded to the widest K.

    Raises:
        ValueError: There is no part, or parts differ in kind, vocabulary or grid.
    """
    if not parts:
        raise ValueError("there are no targets to join")
    first = parts[0]
    if any(
        (part.kind, part.vocab_size, part.temperatures) != (first.kind, first.vocab_size, first.temperatures)
        for part in parts
    ):
        raise ValueError("targets of different kinds, vocabularies or temperatures cannot be joined")
    width = max(part.ids_NK.shape[1] for part in parts)
    joined: dict[str, Any] = {}
    for name in first._tensors():
        columns = [part._tensors()[name] for part in parts]
        if name.endswith("_NK"):
            columns = [torch.nn.functional.pad(rows, (0, width - rows.shape[1])) for rows in columns]
        joined[name] = torch.cat(columns)
    return dataclasses.replace(first, **joined)


def _log1mexp(values: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for x < 0. Source: Maechler 2012, "Accurately computing log(1 - exp(-|a|))"."""
    near_zero = values > -math.log(2)
    safe_near = torch.where(near_zero, values, torch.full_like(values, -1.0))
    return torch.where(near_zero, (-torch.expm1(safe_near)).log(), torch.log1p(-values.exp()))


def _widen(values: Tensor) -> Tensor:
    return values.float() if values.dtype.itemsize < 4 else values
