"""Log-softmax of a chunk of positions and the numbers that are stored of it.

Shapes: N positions of the chunk, V true vocabulary, K entries of each, G temperatures.

On a CPU torch's ``log_softmax`` takes a third of the time of its ``logsumexp`` and less than its ``exp``, so
log-sums are read off it at the maximum: ``lse = max z - max log_softmax(z)``. One scratch buffer serves
all functions: fresh pages for each would cost more than the arithmetic.

Invariants (tests/precompute/test_log_softmax.py):
    1. ``log_probs + lse`` are the logits and ``temper_lse`` is the log-sum-exp of logits / T, up to float32
       rounding.
    2. ``top_ids`` takes the lower of two ids with equal logits first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def normalise(logits_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log-softmax, log-sum-exp, and which positions have one.

    Args:
        logits_NV: float32.

    Returns:
        ``log_probs_NV`` and ``lse_N``, float32, and ``is_finite_N``. A position that is NaN, +inf or all
        -inf gets the uniform distribution.
    """
    log_probs_NV = logits_NV.log_softmax(dim=1)
    lse_N = logits_NV.amax(dim=1) - log_probs_NV.amax(dim=1)
    is_finite_N = lse_N.isfinite()
    if not bool(is_finite_N.all()):
        log_probs_NV[~is_finite_N] = -math.log(logits_NV.shape[1])
        lse_N = lse_N.masked_fill(~is_finite_N, 0)
    return log_probs_NV, lse_N, is_finite_N


def entropy(log_probs_NV: Tensor, scratch_NV: Tensor) -> Tensor:
    """Returns ``-sum_v p_v log p_v`` in nats, ``[N]``.

    Args:
        log_probs_NV: Log-softmax.
        scratch_NV: Is written over.
    """
    torch.softmax(log_probs_NV, dim=1, out=scratch_NV)
    if bool(log_probs_NV.amin() == -torch.inf):
        # 0 log 0 is 0.
        log_probs_NV = log_probs_NV.clamp(min=torch.finfo(torch.float32).min)
    return -torch.linalg.vecdot(scratch_NV, log_probs_NV)


def temper_lse(log_probs_NV: Tensor, lse_N: Tensor, grid: Sequence[float], scratch_NV: Tensor) -> Tensor:
    """Returns the log-sum-exp of logits / T for each T, ``[N, G]``.

    It is ``lse / T + log sum_v exp(log p_v / T)``.

    Args:
        log_probs_NV: Log-softmax.
        lse_N: Log-sum-exp of the logits.
        grid: Temperatures above 0.
        scratch_NV: Is written over.
    """
    columns = [
        lse_N / temperature + log_sum_exp(torch.div(log_probs_NV, temperature, out=scratch_NV))
        for temperature in grid
    ]
    return torch.stack(columns, dim=1) if columns else lse_N.new_empty(len(lse_N), 0)


def rest_log_mass(log_probs_NV: Tensor, rows_S: Tensor, ids_S: Tensor, scratch_NV: Tensor) -> Tensor:
    """Returns the log of the mass outside some entries, ``[N]``; -inf where nothing is left.

    Args:
        log_probs_NV: Log-softmax.
        rows_S: Rows of those entries.
        ids_S: Their columns.
        scratch_NV: Is written over.
    """
    rest_NV = scratch_NV.copy_(log_probs_NV)
    rest_NV[rows_S, ids_S] = -torch.inf
    return log_sum_exp(rest_NV).nan_to_num_(nan=-torch.inf, neginf=-torch.inf).clamp_(max=0)


def log_sum_exp(values_NV: Tensor) -> Tensor:
    """Returns the log-sum-exp of each row, NaN where all are -inf, and writes over the values."""
    top_N = values_NV.amax(dim=1)
    return top_N - torch.log_softmax(values_NV, dim=1, out=values_NV).amax(dim=1)


def top_ids(values_NV: Tensor, k: int) -> Tensor:
    """Returns the ids of the k largest values of each row, ascending, int64[N, k]; ties go to lower ids.

    Args:
        values_NV: No NaN.
        k: 1 to V.
    """
    vocab = values_NV.shape[1]
    found = values_NV.topk(min(k + 1, vocab), dim=1)
    ids_NK, values_NK = found.indices[:, :k], found.values[:, :k]
    # Which of several equal values topk returns is up to it: where one was left out, the lowest ids go in.
    if k < vocab and bool((values_NK[:, -1] == found.values[:, k]).any()):
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
