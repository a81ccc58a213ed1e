"""Softmax of a chunk of positions and the numbers that are stored of it.

Shapes: N positions of the chunk, V true vocabulary, K entries of each, J of them at most, S of all
positions, G temperatures.

Passes over ``[N, V]`` are what costs on a CPU, and exponentials most of all: they are made once, by torch's
``softmax``, and log-sums are read off its result, ``log sum exp(z - max z) = -log max p``. Buffers are made
once for each chunk: fresh pages for every function would cost more than the arithmetic.

Invariants (tests/precompute/test_log_softmax.py):
    1. ``log_probs + lse`` are the logits and ``temper_lse`` is the log-sum-exp of logits / T, up to float32
       rounding.
    2. ``top_ids`` takes the lower of two ids with equal logits first.
    3. Sums are of what is summed, never differences; those too small for float32 are made again.
    4. ``locate`` finds the intervals that a cumulative sum in float64 gives, but for rounding of points at
       their ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Ids whose largest value or whose sum stands for them in a first search.
_BLOCK = 64
# Below it, a sum of float32 probabilities lacks those that are too small to be normal numbers.
_SAFE_MASS = 1e-20


class Buffers:
    """Memory that calls of one thread share: what lies in it is written over by the next call.

    On a CPU fresh pages cost more than the arithmetic on them.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        """Returns float32 numbers of any value."""
        held = self._held.get(name)
        if held is None or held.numel() < shape.numel() or held.device != device:
            held = self._held[name] = torch.empty(shape.numel(), device=device)
        return held[: shape.numel()].view(shape)


@dataclass(frozen=True, slots=True)
class Softmax:
    """The distributions of N positions.

    Attributes:
        shifted_NV: Logits less the largest of their position, float32; not to be written to.
        probs_NV: Their softmax, float32. Whoever takes probabilities out writes 0 there.
        log_sum_N: Log of the sum of ``exp(shifted_NV)``, so that ``log p = shifted - log_sum``.
        lse_N: Log-sum-exp of the logits.
        is_finite_N: False for a position that is NaN, +inf or all -inf: it has the uniform distribution.
        scratch_NV: float32, may be written over.
    """

    shifted_NV: Tensor
    probs_NV: Tensor
    log_sum_N: Tensor
    lse_N: Tensor
    is_finite_N: Tensor
    scratch_NV: Tensor

    @classmethod
    def of(cls, logits_NV: Tensor, buffers: Buffers) -> Softmax:
        """Returns the softmax of logits of any floating dtype, in the memory of ``buffers``."""
        top_N = logits_NV.amax(dim=1).float()
        shifted_NV, probs_NV, scratch_NV = (
            buffers.take(name, logits_NV.shape, logits_NV.device) for name in ("shifted", "probs", "scratch")
        )
        torch.sub(logits_NV, top_N[:, None], out=shifted_NV)
        torch.softmax(shifted_NV, dim=1, out=probs_NV)
        peak_N = probs_NV.amax(dim=1)
        is_finite_N = top_N.isfinite() & peak_N.isfinite()
        if not bool(is_finite_N.all()):
            shifted_NV[~is_finite_N] = 0
            probs_NV[~is_finite_N] = 1 / logits_NV.shape[1]
            peak_N = probs_NV.amax(dim=1)
            top_N = top_N.masked_fill(~is_finite_N, 0)
        log_sum_N = (-peak_N.log()).clamp_(min=0)
        return cls(shifted_NV, probs_NV, log_sum_N, top_N + log_sum_N, is_finite_N, scratch_NV)

    def log_probs(self) -> Tensor:
        """Returns log p of all ids, float32[N, V]."""
        return self.shifted_NV - self.log_sum_N[:, None]

    def log_probs_of(self, ids_NJ: Tensor) -> Tensor:
        """Returns log p of some ids, float32[N, J]."""
        return self.shifted_NV.gather(1, ids_NJ) - self.log_sum_N[:, None]

    def entropy(self) -> Tensor:
        """Returns ``-sum_v p_v log p_v`` in nats, ``[N]``."""
        terms_NV = torch.mul(self.probs_NV, self.shifted_NV, out=self.scratch_NV)
        mean_N = terms_NV.sum(dim=1)
        if not bool(mean_N.isfinite().all()):
            # 0 log 0 is 0.
            mean_N = terms_NV.nan_to_num_(nan=0.0).sum(dim=1)
        return self.log_sum_N - mean_N

    def temper_lse(self, grid: Sequence[float]) -> Tensor:
        """Returns the log-sum-exp of logits / T for each T above 0 of a grid, ``[N, G]``."""
        if not grid:
            return self.lse_N.new_empty(len(self.lse_N), 0)
        top_N = self.lse_N - self.log_sum_N
        columns = [top_N / temperature + self.power(1 / temperature)[1] for temperature in grid]
        return torch.stack(columns, dim=1)

    def power(self, exponent: float) -> tuple[Tensor, Tensor]:
        """Returns ``exp(exponent shifted)`` over its sum, in ``scratch_NV``, and the log of that sum.

        Args:
            exponent: Above 0.
        """
        powers_NV = torch.mul(self.shifted_NV, exponent, out=self.scratch_NV)
        torch.softmax(powers_NV, dim=1, out=powers_NV)
        return powers_NV, -powers_NV.amax(dim=1).log()

    def take_out(self, rows_S: Tensor, ids_S: Tensor) -> Tensor:
        """Sets the probabilities of some entries to 0.

        Args:
            rows_S: Rows of those entries.
            ids_S: Their columns.

        Returns:
            The log of the mass that is left, ``[N]``; -inf where there is none.
        """
        self.probs_NV[rows_S, ids_S] = 0
        rest_N = self.probs_NV.sum(dim=1)
        log_rest_N = rest_N.log()
        small_M = (rest_N < _SAFE_MASS).nonzero()[:, 0]
        if len(small_M):
            shifted_MV = self.shifted_NV[small_M]
            places_N = torch.full_like(rest_N, -1, dtype=torch.int64)
            places_N[small_M] = torch.arange(len(small_M), device=small_M.device)
            is_small_S = places_N[rows_S] >= 0
            shifted_MV[places_N[rows_S][is_small_S], ids_S[is_small_S]] = -torch.inf
            log_rest_N[small_M] = shifted_MV.logsumexp(dim=1) - self.log_sum_N[small_M]
        return log_rest_N.clamp_(max=0)


def top_ids(values_NV: Tensor, k: int) -> Tensor:
    """Returns the ids of the k largest values of each row, ascending, int64[N, k]; ties go to lower ids.

    Args:
        values_NV: No NaN.
        k: 1 to V.
    """
    vocab = values_NV.shape[1]
    found_NJ, found_ids_NJ = _find_largest(values_NV, min(k + 1, vocab))
    ids_NK, values_NK = found_ids_NJ[:, :k], found_NJ[:, :k]
    # Which of several equal values topk returns is up to it: where one was left out, the lowest ids go in.
    if k < vocab and bool((values_NK[:, -1] == found_NJ[:, k]).any()):
        least_N1 = values_NK[:, -1:]
        is_least_NK = values_NK == least_N1
        rows_M, equal_M = (values_NV == least_N1).nonzero(as_tuple=True)
        firsts_N = torch.searchsorted(rows_M, torch.arange(len(ids_NK), device=rows_M.device))
        ranks_M = torch.arange(len(rows_M), device=rows_M.device) - firsts_N[rows_M]
        ids_NK[is_least_NK] = equal_M[ranks_M < is_least_NK.sum(dim=1)[rows_M]]
    return ids_NK.sort(dim=1).values


def rank_ids(values_NV: Tensor, k: int) -> Tensor:
    """Returns the ids of the k largest values of each row, largest first, int64[N, k]; ties to lower ids."""
    ids_NK = top_ids(values_NV, k)
    order_NK = values_NV.gather(1, ids_NK).sort(dim=1, descending=True, stable=True).indices
    return ids_NK.gather(1, order_NK)


def _find_largest(values_NV: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Returns the ``num`` largest values of each row, largest first, and their ids.

    They all lie in the ``num`` blocks with the largest maxima, or are equal to some that do: a value above
    the num-th largest is in a block whose maximum is above it, and there are fewer than ``num`` of those.
    On a CPU that takes half the time of ``topk`` over all ids.
    """
    vocab = values_NV.shape[1]
    num_blocks = vocab // _BLOCK
    if 2 * num * _BLOCK > vocab:
        found = values_NV.topk(num, dim=1)
        return found.values, found.indices
    inner = num_blocks * _BLOCK
    blocks_NAB = values_NV[:, :inner].unflatten(1, (num_blocks, _BLOCK))
    best_NJ = blocks_NAB.amax(dim=2).topk(num, dim=1, sorted=False).indices
    rows_N1 = torch.arange(len(values_NV), device=values_NV.device)[:, None]
    # What is left over of the vocabulary goes behind the chosen blocks.
    candidates_NC = torch.cat([blocks_NAB[rows_N1, best_NJ].flatten(1), values_NV[:, inner:]], dim=1)
    found = candidates_NC.topk(num, dim=1)
    blocks_NJ = best_NJ.gather(1, (found.indices // _BLOCK).clamp(max=num - 1))
    ids_NJ = blocks_NJ * _BLOCK + found.indices % _BLOCK
    behind_NJ = found.indices - num * _BLOCK
    return found.values, torch.where(behind_NJ >= 0, inner + behind_NJ, ids_NJ)


class Intervals:
    """The ids of each position end to end on a line, each as long as its mass.

    Attributes:
        total_N1: Length of the line, float64.
    """

    def __init__(self, mass_NV: Tensor) -> None:
        """Sums blocks of ids up.

        Args:
            mass_NV: float32, 0 or more; must not change before ``locate``.
        """
        self._mass_NV = mass_NV
        self._inner = inner = mass_NV.shape[1] // _BLOCK * _BLOCK
        self._blocks_NAB = mass_NV[:, :inner].unflatten(1, (inner // _BLOCK, _BLOCK))
        # What is left over of the vocabulary is a block of its own.
        self._behind_NB = mass_NV[:, inner:]
        sums_NA = torch.cat([self._blocks_NAB.sum(dim=2), self._behind_NB.sum(dim=1, keepdim=True)], dim=1)
        self._ends_NA = sums_NA.cumsum(dim=1, dtype=torch.float64)
        self.total_N1 = self._ends_NA[:, -1:]

    def locate(self, points_NJ: Tensor) -> Tensor:
        """Returns the ids in whose intervals points lie, int64[N, J].

        Args:
            points_NJ: float64, 0 or more; those beyond the end count as the last before it.
        """
        if points_NJ.shape[1] * _BLOCK > self._inner:
            return _find(self._mass_NV.cumsum(dim=1, dtype=torch.float64), points_NJ)
        blocks_NJ = _find(self._ends_NA, points_NJ)
        starts_NJ = self._ends_NA.gather(1, (blocks_NJ - 1).clamp(min=0)).masked_fill(blocks_NJ == 0, 0)
        is_behind_NJ = blocks_NJ == self._blocks_NAB.shape[1]
        rows_N1 = torch.arange(len(points_NJ), device=blocks_NJ.device)[:, None]
        mass_NJB = self._blocks_NAB[rows_N1, blocks_NJ.clamp(max=self._blocks_NAB.shape[1] - 1)]
        if bool(is_behind_NJ.any()):
            mass_NJB[is_behind_NJ] = 0
            rows_M, places_M = is_behind_NJ.nonzero(as_tuple=True)
            mass_NJB[rows_M, places_M, : self._behind_NB.shape[1]] = self._behind_NB[rows_M]
        ends_NJB = mass_NJB.cumsum(dim=2, dtype=torch.float64)
        places_NJ1 = _find(ends_NJB, (points_NJ - starts_NJ).clamp(min=0)[:, :, None])
        return blocks_NJ * _BLOCK + places_NJ1[:, :, 0]


def _find(ends: Tensor, points: Tensor) -> Tensor:
    """Returns in which of the intervals with these ends points lie, the last dimension's."""
    last = ends[..., -1:]
    below = torch.nextafter(last, torch.zeros_like(last))
    points = torch.minimum(points, below).contiguous()
    return torch.searchsorted(ends, points, right=True).clamp_(max=ends.shape[-1] - 1)
