"""How far what is kept of a distribution is from the whole, position by position, in float64.

Shapes: N positions, V true vocabulary, S kept entries of all positions.

p is the whole distribution, m the masses that a loss uses in its place (``schemas.keep_trial.LossTrial``
says which). Sums over entries that are not kept are taken over them, never as 1 minus a sum, except where
m is 0 on all of them.

Invariants (tests/precompute/test_deviation.py):
    1. Distances are those of both distributions written out in full.
    2. What keeps everything has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from schemas.kept_entries import KeptEntries
from schemas.language import LossName
from schemas.policy import AnyPolicy

NUM_BINS = 15
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Distances:
    """What N positions have; all float64[N], in nats.

    Attributes:
        total_variation: ``1/2 sum |p - m|``.
        kl_to_full: ``sum m log(m / p) - m + p``.
        kl_from_full: ``sum p log(p / m) - p + m``.
        confidence: m of the most probable token of p.
    """

    total_variation: Doubles
    kl_to_full: Doubles
    kl_from_full: Doubles
    confidence: Doubles


@dataclass(frozen=True, slots=True)
class Support:
    """Kept entries beside the whole distributions.

    Attributes:
        log_probs_NV: Log-softmax over the true vocabulary, float32.
        top_N: Most probable token of each position.
        rows_S, ids_S: Where the entries lie.
        log_probs_S: Their log p, float64.
        mass_S: What their weights say, float64: p itself for deterministic policies.
        counts_N: Entries of each position.
    """

    log_probs_NV: Tensor
    top_N: Tensor
    rows_S: Tensor
    ids_S: Tensor
    log_probs_S: Tensor
    mass_S: Tensor
    counts_N: Tensor

    @classmethod
    def of(cls, log_probs_NV: Tensor, entries: KeptEntries) -> Support:
        """Looks the entries up."""
        device = log_probs_NV.device
        counts_N = torch.from_numpy(entries.counts).to(device)
        rows_S = torch.arange(len(counts_N), device=device).repeat_interleave(counts_N)
        ids_S = torch.from_numpy(entries.ids.astype(np.int64)).to(device)
        log_probs_S = log_probs_NV[rows_S, ids_S].double()
        weights = entries.weights
        given_S = None if weights is None else torch.from_numpy(weights).to(device).double()
        mass_S = log_probs_S.exp() if given_S is None else given_S
        top_N = log_probs_NV.argmax(dim=1)
        return cls(log_probs_NV, top_N, rows_S, ids_S, log_probs_S, mass_S, counts_N)

    def sum(self, values_S: Tensor) -> Tensor:
        """Returns the sum over the entries of each position, float64[N]."""
        zeros_N = values_S.new_zeros(len(self.counts_N), dtype=torch.float64)
        return zeros_N.index_add_(0, self.rows_S, values_S.double())

    @property
    def is_whole_N(self) -> Tensor:
        """Whether a position keeps every token."""
        return self.counts_N == self.log_probs_NV.shape[1]

    def missed_mass(self) -> Tensor:
        """Returns the mass of the tokens that are not kept, float64[N]."""
        missed_N = (1 - self.sum(self.log_probs_S.exp())).clamp(min=0)
        return missed_N.masked_fill(self.is_whole_N, 0.0)


def spread_tail(support: Support) -> Distances:
    """For ``ghost_kl``, m is the kept p, and the rest of the mass spread evenly over the other tokens."""
    num_rest_N = (support.log_probs_NV.shape[1] - support.counts_N).double()
    rest_NV = support.log_probs_NV.clone()
    rest_NV[support.rows_S, support.ids_S] = -torch.inf
    rest_NV.exp_()
    tail_N = rest_NV.sum(dim=1, dtype=torch.float64)
    even_N = tail_N / num_rest_N.clamp(min=1)
    entropy_N = torch.special.entr(rest_NV).sum(dim=1, dtype=torch.float64)
    # Every kept entry is 0 in the rest and differs from the even share by all of it.
    gap_N = (rest_NV - even_N[:, None].float()).abs_().sum(dim=1, dtype=torch.float64)
    variation_N = (gap_N - support.counts_N * even_N).clamp(min=0) / 2
    rest_NV.copy_(support.log_probs_NV)
    rest_NV[support.rows_S, support.ids_S] = 0.0
    logs_N = rest_NV.sum(dim=1, dtype=torch.float64)
    to_full_N = torch.xlogy(tail_N, even_N) - even_N * logs_N
    from_full_N = -entropy_N - torch.xlogy(tail_N, even_N)
    without_N = support.is_whole_N | (tail_N == 0)
    confidence_N = support.log_probs_NV.gather(1, support.top_N[:, None])[:, 0].double().exp()
    return _distances(
        variation_N.masked_fill(without_N, 0),
        to_full_N.masked_fill(without_N, 0),
        from_full_N.masked_fill(without_N, 0),
        confidence_N,
    )


def renormalised(support: Support) -> Distances:
    """For ``support_kl``, m is the kept p over their sum, and 0 elsewhere."""
    missed_N = support.missed_mass()
    kept_N = support.sum(support.log_probs_S.exp()).masked_fill(support.is_whole_N, 1.0)
    from_full_N = torch.where(missed_N > 0, torch.inf, 0.0)
    confidence_N = _mass_of_top(support, support.log_probs_S.exp()) / kept_N
    return _distances(missed_N, -kept_N.log(), from_full_N, confidence_N)


def weighted(support: Support) -> Distances:
    """For ``unbiased_kl``, m is the entries' weights, and 0 elsewhere."""
    mass_S, log_p_S = support.mass_S, support.log_probs_S
    p_S = log_p_S.exp()
    missed_N = support.missed_mass()
    variation_N = (support.sum((mass_S - p_S).abs()) + missed_N) / 2
    ratio_S = torch.where(mass_S > 0, mass_S.log() - log_p_S, 0.0)
    to_full_N = support.sum(mass_S * ratio_S - mass_S + p_S) + missed_N
    # p log(p / m) where p has mass: infinite where m has none.
    inverse_S = torch.where(p_S > 0, p_S * (log_p_S - mass_S.log()), 0.0)
    from_full_N = support.sum(inverse_S - p_S + mass_S)
    from_full_N = torch.where(missed_N > 0, torch.inf, from_full_N)
    return _distances(variation_N, to_full_N, from_full_N, _mass_of_top(support, mass_S))


USES: Mapping[LossName, Callable[[Support], Distances]] = MappingProxyType(
    {"ghost_kl": spread_tail, "support_kl": renormalised, "unbiased_kl": weighted}
)
"""The losses whose masses are compared."""


def fitting_losses(policy: AnyPolicy) -> tuple[LossName, ...]:
    """Returns the losses that use what a policy keeps as it is meant to be, the better one first."""
    return ("ghost_kl", "support_kl") if policy.kind in ("top_k", "top_p") else ("unbiased_kl",)


def masses(entries: KeptEntries) -> Doubles:
    """Returns the mass that each entry stands for, float64[S]."""
    weights = entries.weights
    if weights is not None:
        return weights.astype(np.float64)
    return np.exp(entries.log_probs.astype(np.float64))


def rounding(exact: KeptEntries, decoded: KeptEntries) -> tuple[float, float]:
    """Returns the sums over positions of the total variation and the divergence of decoded masses.

    See ``schemas.keep_trial.Quantisation``.
    """
    before, after = masses(exact), masses(decoded)
    variation = 0.5 * float(np.abs(before - after).sum())
    held = before > 0
    with np.errstate(divide="ignore"):
        ratios = np.log(before[held]) - np.log(after[held])
    divergence = float((before[held] * ratios).sum() + after.sum() - before.sum())
    return variation, max(divergence, 0.0)


@dataclass(frozen=True, slots=True)
class CalibrationBins:
    """Sums by bin of the whole distribution's confidence, float64[3, bins]: positions, hits, confidences."""

    sums: Doubles

    @classmethod
    def empty(cls) -> CalibrationBins:
        """Returns sums over no positions."""
        return cls(np.zeros((3, NUM_BINS)))

    def add(self, whole_N: Doubles, confidence_N: Doubles, is_hit_N: npt.NDArray[np.bool_]) -> None:
        """Adds positions.

        Args:
            whole_N: p of the most probable token, which chooses the bin.
            confidence_N: m of it.
            is_hit_N: Whether it is the target.
        """
        bins_N = np.clip(np.ceil(whole_N * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
        for row, values_N in enumerate((np.ones(len(whole_N)), is_hit_N.astype(np.float64), confidence_N)):
            self.sums[row] += np.bincount(bins_N, weights=values_N, minlength=NUM_BINS)

    def error(self) -> float:
        """Returns the calibration error; see ``schemas.keep_trial.LossTrial``."""
        counts, hits, confidences = self.sums
        return float(np.abs(hits - confidences).sum() / max(counts.sum(), 1.0))


def _mass_of_top(support: Support, mass_S: Tensor) -> Tensor:
    return support.sum(mass_S * (support.ids_S == support.top_N[support.rows_S]))


def _distances(*values_N: Tensor) -> Distances:
    return Distances(*(values.cpu().numpy() for values in values_N))
