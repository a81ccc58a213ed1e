"""Softmax of a chunk of positions and the numbers that are stored of it.

Shapes: N positions of the chunk, V true vocabulary, K entries of each, J of them at most, S of all
positions, G temperatures.

Passes over ``[N, V]`` are what costs on a CPU, and exponentials most of all: they are made once, as powers
of 2, which take torch a third of the time of its ``exp`` and, with a sum, less than ``softmax``. Buffers
serve many calls: fresh pages for each would cost more than the arithmetic.

Invariants (tests/precompute/test_log_softmax.py):
    1. ``log_probs + lse`` are the logits and ``temper_lse`` is the log-sum-exp of logits / T, up to float32
       rounding.
    2. ``top_ids`` takes the lower of two ids with equal logits first.
    3. Sums are of what is summed, never differences; those too small for float32 are made again.
    4. ``locate`` finds the intervals that a cumulative sum in float64 gives, but for rounding of points at
       their ends.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Ids whose largest value or whose sum stands for them in a first search.
_BLOCK = 64
# Below it, a sum of float32 powers lacks those that are too small to be normal numbers.
_SAFE_MASS = 1e-20
_LOG2_E = math.log2(math.e)
# Of float32 logits that go through all passes together on a CPU; two buffers more are in use.
_CACHED_BYTES = 2**21


class Buffers:
    """Memory that calls of one thread share: what lies in it is written over by the next call.

    On a CPU fresh pages cost more than the arithmetic on them.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, like_NV: Tensor) -> Tensor:
        """Returns float32 numbers of any value, in the shape of others."""
        num, vocab = like_NV.shape
        width = -(-vocab // _BLOCK) * _BLOCK
        held = self._held.get(name)
        if held is None or held.numel() < num * width or held.device != like_NV.device:
            held = self._held[name] = torch.empty(num * width, device=like_NV.device)
        # Torch rounds the end of an array, where it does not fill a vector, in another way. With rows apart
        # that is the end of each row, whatever the number of rows.
        return held[: num * width].view(num, width)[:, :vocab]


@dataclass(frozen=True, slots=True)
class Softmax:
    """The distributions of N positions.

    Attributes:
        logits_NV: Not to be written to.
        top_N: The largest of each position, float32.
        tops_NA: The largest of each whole block of ids.
        powers_NV: ``exp(logits - top)``, float32. Whoever takes probabilities out writes 0 there.
        log_sum_N: Log of its sums, so that ``log p = logits - top - log_sum``.
        lse_N: Log-sum-exp of the logits.
        entropy_N: ``-sum_v p_v log p_v`` in nats.
        lse_grid_NG: Log-sum-exp of logits / T for each T of the grid.
        is_finite_N: False for a position that is NaN, +inf or all -inf: it has the uniform distribution.
    """

    logits_NV: Tensor
    top_N: Tensor
    tops_NA: Tensor
    powers_NV: Tensor
    log_sum_N: Tensor
    lse_N: Tensor
    entropy_N: Tensor
    lse_grid_NG: Tensor
    is_finite_N: Tensor

    @classmethod
    def of(cls, logits_NV: Tensor, grid: Sequence[float], buffers: Buffers) -> Softmax:
        """Goes through logits once, some rows at a time.

        Args:
            logits_NV: Of any floating dtype.
            grid: Temperatures above 0.
            buffers: Hold ``powers_NV``.
        """
        passes = _Passes(logits_NV, grid, buffers)
        for rows in _cut_rows(logits_NV):
            passes.go(rows)
        return passes.finish()

    def log_probs(self) -> Tensor:
        """Returns log p of all ids, float32[N, V]."""
        return self._shift(self.logits_NV).sub_(self.log_sum_N[:, None])

    def log_probs_of(self, ids_NJ: Tensor) -> Tensor:
        """Returns log p of some ids, float32[N, J]."""
        return self._shift(self.logits_NV.gather(1, ids_NJ)).sub_(self.log_sum_N[:, None])

    def top_ids(self, k: int) -> Tensor:
        """Returns the ids of the k most probable, see ``top_ids``."""
        return top_ids(self.logits_NV, k, self.tops_NA)

    def rank_ids(self, k: int) -> Tensor:
        """Returns the ids of the k most probable, see ``rank_ids``."""
        return rank_ids(self.logits_NV, k, self.tops_NA)

    def raise_to(self, exponent: float) -> tuple[Tensor, Tensor]:
        """Returns ``exp(exponent (logits - top))`` and the log of its sums, ``[N]``.

        Args:
            exponent: Above 0.
        """
        powers_NV = Buffers().take("raised", self.logits_NV)
        torch.sub(self.logits_NV, self.top_N[:, None], out=powers_NV)
        return powers_NV, _exponentiate(powers_NV, exponent, powers_NV).sum(dim=1).log()

    def take_out(self, rows_S: Tensor, ids_S: Tensor) -> Tensor:
        """Sets the probabilities of some entries to 0.

        Args:
            rows_S: Rows of those entries.
            ids_S: Their columns.

        Returns:
            The log of the mass that is left, ``[N]``; -inf where there is none.
        """
        self.powers_NV[rows_S, ids_S] = 0
        rest_N = self.powers_NV.sum(dim=1)
        log_rest_N = rest_N.log() - self.log_sum_N
        small_M = (rest_N < _SAFE_MASS).nonzero()[:, 0]
        if len(small_M):
            shifted_MV = self.logits_NV[small_M].float() - self.top_N[small_M, None]
            places_N = torch.full_like(rest_N, -1, dtype=torch.int64)
            places_N[small_M] = torch.arange(len(small_M), device=small_M.device)
            is_small_S = places_N[rows_S] >= 0
            shifted_MV[places_N[rows_S][is_small_S], ids_S[is_small_S]] = -torch.inf
            log_rest_N[small_M] = shifted_MV.logsumexp(dim=1) - self.log_sum_N[small_M]
        return log_rest_N.clamp_(max=0)

    def _shift(self, logits_NJ: Tensor) -> Tensor:
        """Returns logits less the largest of their position, float32."""
        return logits_NJ.float() - self.top_N[:, None]


class _Passes:
    """What is computed of rows while they are in a cache."""

    def __init__(self, logits_NV: Tensor, grid: Sequence[float], buffers: Buffers) -> None:
        (num, vocab), device = logits_NV.shape, logits_NV.device
        self._logits_NV = logits_NV
        self._grid = tuple(grid)
        self._powers_NV = buffers.take("powers", logits_NV)
        self._buffers = buffers
        self._tops_NA = logits_NV.new_empty(num, vocab // _BLOCK)
        self._top_N, self._sum_N, self._product_N = torch.empty(3, num, device=device)
        self._sums_GN = torch.empty(len(self._grid), num, device=device)

    def go(self, rows: slice) -> None:
        """Adds some rows."""
        logits_MV, powers_MV = self._logits_NV[rows], self._powers_NV[rows]
        shifted_MV, scratch_MV = (self._buffers.take(name, logits_MV) for name in ("shifted", "scratch"))
        top_M, tops_MA = self._top_N[rows], self._tops_NA[rows]
        inner = tops_MA.shape[1] * _BLOCK
        if inner:
            torch.amax(_in_blocks(logits_MV), dim=2, out=tops_MA)
        # What is left over of the vocabulary is no whole block.
        parts = [part.amax(dim=1) for part in (tops_MA, logits_MV[:, inner:]) if part.shape[1]]
        top_M.copy_(parts[0] if len(parts) == 1 else torch.maximum(*parts))
        torch.sub(logits_MV, top_M[:, None], out=shifted_MV)
        torch.sum(_exponentiate(shifted_MV, 1, powers_MV), dim=1, out=self._sum_N[rows])
        for sum_N, temperature in zip(self._sums_GN, self._grid, strict=True):
            torch.sum(_exponentiate(shifted_MV, 1 / temperature, scratch_MV), dim=1, out=sum_N[rows])
        torch.sum(shifted_MV.mul_(powers_MV), dim=1, out=self._product_N[rows])

    def finish(self) -> Softmax:
        """Puts the numbers of all rows together."""
        top_N, sum_N = self._top_N, self._sum_N
        is_finite_N = top_N.isfinite() & sum_N.isfinite()
        if not bool(is_finite_N.all()):
            self._make_uniform(~is_finite_N)
        wrong_N = ~self._product_N.isfinite()
        if bool(wrong_N.any()):
            # 0 log 0 is 0.
            products_MV = (self._logits_NV[wrong_N].float() - top_N[wrong_N, None]) * self._powers_NV[wrong_N]
            self._product_N[wrong_N] = products_MV.nan_to_num_(nan=0.0).sum(dim=1)
        log_sum_N = sum_N.log()
        temperatures_G1 = top_N.new_tensor(self._grid)[:, None]
        return Softmax(
            logits_NV=self._logits_NV,
            top_N=top_N,
            tops_NA=self._tops_NA,
            powers_NV=self._powers_NV,
            log_sum_N=log_sum_N,
            lse_N=top_N + log_sum_N,
            entropy_N=log_sum_N - self._product_N / sum_N,
            lse_grid_NG=(top_N / temperatures_G1 + self._sums_GN.log()).T.contiguous(),
            is_finite_N=is_finite_N,
        )

    def _make_uniform(self, wrong_N: Tensor) -> None:
        """Replaces positions by ones whose logits are all 0."""
        self._logits_NV = self._logits_NV.clone()
        vocab = self._logits_NV.shape[1]
        for values, value in (
            (self._logits_NV, 0),
            (self._top_N, 0),
            (self._tops_NA, 0),
            (self._powers_NV, 1),
            (self._sum_N, vocab),
            (self._product_N, 0),
            (self._sums_GN.T, vocab),
        ):
            values[wrong_N] = value


def _cut_rows(values_NV: Tensor) -> list[slice]:
    """Cuts rows into groups that a CPU's cache holds; no group is of one row.

    Torch splits the sums of a single row between threads, and so rounds them in another way.
    """
    num = len(values_NV)
    size = num if values_NV.device.type != "cpu" else max(2, _CACHED_BYTES // (4 * values_NV.shape[1]))
    starts = [0, *(start for start in range(size, num, size) if num - start > 1)]
    return [slice(*pair) for pair in itertools.pairwise([*starts, num])]


def _exponentiate(shifted_NV: Tensor, exponent: float, powers_NV: Tensor) -> Tensor:
    """Writes ``exp(exponent shifted)``, whose sums are 1 at least, and returns it."""
    torch.mul(shifted_NV, exponent * _LOG2_E, out=powers_NV)
    return torch.exp2(powers_NV, out=powers_NV)


def _in_blocks(values_NV: Tensor) -> Tensor:
    """Returns the whole blocks of ids, ``[N, A, B]``, as a view."""
    num_blocks = values_NV.shape[1] // _BLOCK
    return values_NV[:, : num_blocks * _BLOCK].unflatten(1, (num_blocks, _BLOCK))


def top_ids(values_NV: Tensor, k: int, tops_NA: Tensor | None = None) -> Tensor:
    """Returns the ids of the k largest values of each row, ascending, int64[N, k]; ties go to lower ids.

    Args:
        values_NV: No NaN.
        k: 1 to V.
        tops_NA: The largest value of each whole block of ids, or what orders blocks like that.
    """
    vocab = values_NV.shape[1]
    found_NJ, found_ids_NJ = _find_largest(values_NV, min(k + 1, vocab), tops_NA)
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


def rank_ids(values_NV: Tensor, k: int, tops_NA: Tensor | None = None) -> Tensor:
    """Returns the ids of the k largest values of each row, largest first, int64[N, k]; see ``top_ids``."""
    ids_NK = top_ids(values_NV, k, tops_NA)
    order_NK = values_NV.gather(1, ids_NK).sort(dim=1, descending=True, stable=True).indices
    return ids_NK.gather(1, order_NK)


def _find_largest(values_NV: Tensor, num: int, tops_NA: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the ``num`` largest values of each row, largest first, and their ids.

    They all lie in the ``num`` blocks with the largest maxima, or are equal to some that do: a value above
    the num-th largest is in a block whose maximum is above it, and there are fewer than ``num`` of those.
    On a CPU that takes half the time of ``topk`` over all ids.
    """
    vocab = values_NV.shape[1]
    if 2 * num * _BLOCK > vocab:
        found = values_NV.topk(num, dim=1)
        return found.values, found.indices
    blocks_NAB = _in_blocks(values_NV)
    if tops_NA is None:
        tops_NA = blocks_NAB.amax(dim=2)
    best = tops_NA.topk(num, dim=1, sorted=False)
    best_NJ = best.indices
    rows_N1 = torch.arange(len(values_NV), device=values_NV.device)[:, None]
    inner = tops_NA.shape[1] * _BLOCK
    # What is left over of the vocabulary goes behind the chosen blocks.
    candidates_NC = torch.cat([blocks_NAB[rows_N1, best_NJ].flatten(1), values_NV[:, inner:]], dim=1)
    values_NJ, places_NJ = _find_above(candidates_NC, best.values.amin(dim=1), num)
    blocks_NJ = best_NJ.gather(1, (places_NJ // _BLOCK).clamp(max=num - 1))
    behind_NJ = places_NJ - num * _BLOCK
    ids_NJ = torch.where(behind_NJ >= 0, inner + behind_NJ, blocks_NJ * _BLOCK + places_NJ % _BLOCK)
    return values_NJ, ids_NJ


def _find_above(values_NC: Tensor, bound_N: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Returns the ``num`` largest values of each row, largest first, and their places.

    Few are as large as the bound, which makes this quicker than ``topk`` over all.

    Args:
        values_NC: At least ``num`` of each row are at or above the bound.
        bound_N: Of each row.
        num: How many.
    """
    rows_M, places_M = (values_NC >= bound_N[:, None]).nonzero(as_tuple=True)
    counts_N = torch.bincount(rows_M, minlength=len(values_NC))
    within_M = torch.arange(len(rows_M), device=rows_M.device) - (counts_N.cumsum(0) - counts_N)[rows_M]
    shape = (len(values_NC), int(counts_N.max()))
    above_NJ = values_NC.new_full(shape, -torch.inf)
    above_NJ[rows_M, within_M] = values_NC[rows_M, places_M]
    places_NJ = rows_M.new_zeros(shape)
    places_NJ[rows_M, within_M] = places_M
    found = above_NJ.topk(num, dim=1)
    return found.values, places_NJ.gather(1, found.indices)


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
        self._blocks_NAB = _in_blocks(mass_NV)
        self._inner = inner = self._blocks_NAB.shape[1] * _BLOCK
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
