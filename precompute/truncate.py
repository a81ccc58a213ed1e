"""Keep policies carried out: from the logits of a chunk of positions to kept entries.

Shapes: N positions of the chunk, V true vocabulary, W >= V the model's padded one, K entries of a
position, J of them at most, S of all positions, G temperatures of the grid.

Whoever calls cuts positions into chunks: some ``[N, V]`` buffers of the chunk are made here, never one
of all tokens. On a CPU chunks of some 2 MB of float32 (8 positions at V = 50,000) take half the time of
larger ones: they stay in the cache.

Invariants (tests/precompute/test_truncate.py):
    1. Columns from V on are neither kept nor counted in any sum.
    2. What a position keeps depends on its logits and its key alone, not on the chunk; equal logits are
       taken with the lower id first.
    3. ``log_tail`` is the log-sum-exp of what is left out, never 1 minus a sum of rounded numbers.
    4. A position whose logits are not numbers is flagged and disturbs no other.
    5. Masses of ``sampled`` and ``hybrid`` make ``sum_i mass_i f(id_i)`` an unbiased estimate of
       ``sum_v p_v f(v)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from precompute.draws import Keys, draw_uniforms
from precompute.log_softmax import Buffers, Intervals, Softmax
from schemas.errors import DataError
from schemas.kept_entries import Draws, KeptEntries, PositionStats, offsets_of
from schemas.policy import (
    AnyPolicy,
    DensePolicy,
    HybridPolicy,
    SampledPolicy,
    TopKPolicy,
    TopPPolicy,
    check_policy,
)

# An entry this near to the threshold of a systematic sample is certain; rounding could draw it twice.
_CERTAIN = 1 - 1e-6
# Share of a mass at which it counts as reached.
_REACHED = 1 - 1e-6


@dataclass(frozen=True, slots=True)
class Truncation:
    """What to compute of each position.

    Attributes:
        policy: What is kept.
        vocab: V, the true vocabulary.
        grid: Temperatures of ``lse_grid``.
    """

    policy: AnyPolicy
    vocab: int
    grid: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class PositionChunk:
    """What a policy sees.

    Attributes:
        softmax: Of the logits over the true vocabulary. All that needs whole probabilities was computed
            before: a policy may take some out.
        keys_N: From ``position_keys``, or None where the policy draws nothing.
    """

    softmax: Softmax
    keys_N: Keys | None


@dataclass(frozen=True, slots=True)
class Selection:
    """What a policy keeps.

    Attributes:
        counts_N: int64 entries of each position.
        ids_S: int64 ids, ascending within a position (hybrid: within head and tail).
        log_probs_S: float32; ``log(tau)`` in the tail of hybrid.
        log_tail_N: float32, or None to have it computed from what is not in ``ids_S``.
        num_head_N, tau_N: Of hybrid.
        draws_S, log_norm_N: Of sampled: draws of each entry, and log of the sum of p^tau.
    """

    counts_N: Tensor
    ids_S: Tensor
    log_probs_S: Tensor
    log_tail_N: Tensor | None = None
    num_head_N: Tensor | None = None
    tau_N: Tensor | None = None
    draws_S: Tensor | None = None
    log_norm_N: Tensor | None = None


@dataclass(frozen=True, slots=True)
class KeptPositions:
    """The result for N positions, in numpy.

    Attributes:
        entries: Kept entries.
        stats: Further numbers of each position.
        is_finite_N: bool[N]: False where logits were NaN or infinite, or all -inf; what is kept of such a
            position means nothing.
    """

    entries: KeptEntries
    stats: PositionStats
    is_finite_N: Any


def keep_entries(
    logits_NW: Tensor,
    targets_N: Tensor,
    keys_N: Keys | None,
    truncation: Truncation,
    buffers: Buffers | None = None,
) -> KeptPositions:
    """Reduces the logits of a chunk of positions to what is stored of them.

    A logit may be -inf (a token that the model never says).

    Args:
        logits_NW: Any floating dtype, on any device; columns from V on are padding.
        targets_N: int64 tokens to predict, in ``[0, V)``.
        keys_N: From ``position_keys``; ``sampled`` and ``hybrid`` need it.
        truncation: What to compute.
        buffers: Memory of the calling thread for several calls.

    Raises:
        RecipeError: The policy keeps more entries than the vocabulary has.
        DataError: There are fewer columns than the vocabulary, or a target is out of range.
        ValueError: Lengths disagree, or there are no keys for a policy that draws.
    """
    policy, vocab = truncation.policy, truncation.vocab
    check_policy(policy, vocab)
    _check_input(logits_NW, targets_N, keys_N, truncation)
    num = len(logits_NW)
    logits_NV = logits_NW[:, :vocab]
    if num == 1:
        # Torch splits the sums of a single row between threads, and so rounds them in another way.
        logits_NV, targets_N = logits_NV.repeat(2, 1), targets_N.repeat(2)
        keys_N = None if keys_N is None else keys_N.repeat(2)
    softmax = Softmax.of(logits_NV, truncation.grid, buffers or Buffers())
    chunk = PositionChunk(softmax, keys_N)
    selection = POLICIES[policy.kind](chunk, policy)
    stats = PositionStats(
        log_tail=_to_numpy(_log_tail(chunk, selection)[:num]),
        lse=_to_numpy(softmax.lse_N[:num]),
        entropy=_to_numpy(softmax.entropy_N[:num]),
        target_logprob=_to_numpy(softmax.log_probs_of(targets_N[:, None])[:num, 0]),
        lse_grid=_to_numpy(softmax.lse_grid_NG[:num]),
    )
    return KeptPositions(_to_entries(selection, policy, num), stats, softmax.is_finite_N[:num].cpu().numpy())


def keep_dense(chunk: PositionChunk, _policy: DensePolicy) -> Selection:
    """Keeps everything; nothing is left for the tail."""
    log_probs_NV = chunk.softmax.log_probs()
    num, vocab = log_probs_NV.shape
    device = log_probs_NV.device
    return Selection(
        counts_N=torch.full((num,), vocab, device=device),
        ids_S=torch.arange(vocab, device=device).repeat(num),
        log_probs_S=log_probs_NV.reshape(-1),
        log_tail_N=torch.full((num,), -torch.inf, device=device),
    )


def keep_top_k(chunk: PositionChunk, policy: TopKPolicy) -> Selection:
    """Keeps the k largest entries."""
    ids_NK = chunk.softmax.top_ids(policy.k)
    return _select(chunk, ids_NK, torch.ones_like(ids_NK, dtype=torch.bool))


def keep_top_p(chunk: PositionChunk, policy: TopPPolicy) -> Selection:
    """Keeps the fewest entries, largest first, with a mass of at least p; k_min to k_max of them."""
    ids_NJ = chunk.softmax.rank_ids(policy.k_max)
    probs_NJ = chunk.softmax.log_probs_of(ids_NJ).double().exp()
    # An entry is needed if those before it have less than p, by more than float32 logits can tell.
    before_NJ = probs_NJ.cumsum(dim=1) - probs_NJ
    counts_N = (before_NJ < policy.p * _REACHED).sum(dim=1).clamp(min=policy.k_min)
    ranks_J = torch.arange(policy.k_max, device=ids_NJ.device)
    kept_NJ = ranks_J[None, :] < counts_N[:, None]
    ids_NJ, order_NJ = ids_NJ.sort(dim=1)
    return _select(chunk, ids_NJ, kept_NJ.gather(1, order_NJ))


def keep_sampled(chunk: PositionChunk, policy: SampledPolicy) -> Selection:
    """Draws ids with replacement from q = p^tau / sum p^tau and merges equal ones.

    Source: Anshumann et al., ACL 2025, arXiv:2503.16870.
    """
    softmax = chunk.softmax
    mass_NV, log_norm_N = softmax.powers_NV, torch.zeros_like(softmax.lse_N)
    if policy.tau != 1:
        mass_NV, log_norm_N = softmax.raise_to(policy.tau)
        log_norm_N = log_norm_N - policy.tau * softmax.log_sum_N
    line = Intervals(mass_NV)
    uniforms_ND = _uniforms(chunk, policy.num_samples)
    ids_ND = line.locate(uniforms_ND * line.total_N1).sort(dim=1).values
    is_new_ND = torch.ones_like(ids_ND, dtype=torch.bool)
    is_new_ND[:, 1:] = ids_ND[:, 1:] != ids_ND[:, :-1]
    # Every run of equal ids ends where the next one, or the next position, starts.
    starts_S = is_new_ND.reshape(-1).nonzero()[:, 0]
    ends_S = torch.cat([starts_S[1:], starts_S.new_tensor([ids_ND.numel()])])
    selection = _select(chunk, ids_ND, is_new_ND)
    return dataclasses.replace(selection, draws_S=ends_S - starts_S, log_norm_N=log_norm_N)


def keep_hybrid(chunk: PositionChunk, policy: HybridPolicy) -> Selection:
    """Keeps the k largest entries and a systematic sample of m ids of the rest.

    Inclusion probabilities are ``min(1, p_v / c)`` with ``sum_v min(1, p_v / c) = m`` over the rest. The
    r certain ids join the head; the others lie end to end on a line of length (m - r) c, on which points
    at a distance of c, the first one random, choose m - r of them.

    Source: Horvitz and Thompson, JASA 1952; Madow, Ann. Math. Stat. 1949 (systematic sampling); the
    threshold c: Duffield, Lund and Thorup, J. ACM 2007 (priority sampling), section 2.
    """
    softmax = chunk.softmax
    num_kept = policy.k + policy.m
    ranked_NJ = softmax.rank_ids(num_kept)
    rows_NJ = _rows(chunk)[:, None].expand_as(ranked_NJ)
    mass_NJ = softmax.powers_NV.gather(1, ranked_NJ)
    log_rest_N = softmax.take_out(rows_NJ.reshape(-1), ranked_NJ.reshape(-1))
    num_head_N = policy.k + _count_certain(softmax.log_probs_of(ranked_NJ[:, policy.k :]), log_rest_N)
    ranks_J = torch.arange(num_kept, device=ranked_NJ.device)
    is_head_NJ = ranks_J[None, :] < num_head_N[:, None]
    # Those that are not certain come back.
    softmax.powers_NV.scatter_(1, ranked_NJ, mass_NJ.masked_fill_(is_head_NJ, 0))
    line = Intervals(softmax.powers_NV)
    tail_N1 = line.total_N1
    num_tail_N1 = (num_kept - num_head_N)[:, None]
    places_NJ = ranks_J[None, :] - num_head_N[:, None] + _uniforms(chunk, 1)
    points_NJ = places_NJ * (tail_N1 / num_tail_N1)
    drawn_NJ = line.locate(points_NJ.clamp(min=0))
    # Where nothing is left to draw from, the next ids stand for a tail without mass.
    drawn_NJ = torch.where(tail_N1 > 0, drawn_NJ, ranked_NJ)
    ids_NJ = torch.where(is_head_NJ, ranked_NJ, drawn_NJ)
    vocab = softmax.powers_NV.shape[1]
    ids_NJ = (ids_NJ + vocab * ~is_head_NJ).sort(dim=1).values % vocab
    log_tail_N1 = tail_N1.log() - softmax.log_sum_N[:, None]
    log_tau_N1 = log_tail_N1 - num_tail_N1.log()
    values_NJ = torch.where(is_head_NJ, softmax.log_probs_of(ids_NJ), log_tau_N1.float())
    return Selection(
        counts_N=torch.full_like(num_head_N, num_kept),
        ids_S=ids_NJ.reshape(-1),
        log_probs_S=values_NJ.reshape(-1),
        log_tail_N=log_tail_N1[:, 0].float(),
        num_head_N=num_head_N,
        tau_N=log_tau_N1[:, 0].exp().float(),
    )


POLICIES: Mapping[str, Callable[[PositionChunk, Any], Selection]] = MappingProxyType(
    {
        "dense": keep_dense,
        "top_k": keep_top_k,
        "top_p": keep_top_p,
        "sampled": keep_sampled,
        "hybrid": keep_hybrid,
    }
)


def _count_certain(log_probs_NM: Tensor, log_rest_N: Tensor) -> Tensor:
    """Returns how many ids of the rest a systematic sample of M is certain to have, int64[N], below M.

    The r-th largest of the rest (from 0) is certain if it is at least the threshold that would hold
    without those before it: the mass from it on, over M - r.

    Args:
        log_probs_NM: Of the M largest of the rest, largest first.
        log_rest_N: Log of the mass beyond them.
    """
    num = log_probs_NM.shape[1]
    probs_NM, rest_N = log_probs_NM.double().exp(), log_rest_N.double().exp()
    from_here_NM = probs_NM.flip(1).cumsum(dim=1).flip(1) + rest_N[:, None]
    room_M = torch.arange(num, 0, -1, device=probs_NM.device)
    is_certain_NM = probs_NM * room_M[None, :] >= _CERTAIN * from_here_NM
    return is_certain_NM.long().cumprod(dim=1).sum(dim=1).clamp(max=num - 1)


def _select(chunk: PositionChunk, ids_NJ: Tensor, kept_NJ: Tensor) -> Selection:
    return Selection(
        counts_N=kept_NJ.sum(dim=1),
        ids_S=ids_NJ[kept_NJ],
        log_probs_S=chunk.softmax.log_probs_of(ids_NJ)[kept_NJ],
    )


def _log_tail(chunk: PositionChunk, selection: Selection) -> Tensor:
    if selection.log_tail_N is not None:
        return selection.log_tail_N
    rows_S = _rows(chunk).repeat_interleave(selection.counts_N)
    return chunk.softmax.take_out(rows_S, selection.ids_S)


def _rows(chunk: PositionChunk) -> Tensor:
    return torch.arange(len(chunk.softmax.lse_N), device=chunk.softmax.lse_N.device)


def _uniforms(chunk: PositionChunk, num: int) -> Tensor:
    if chunk.keys_N is None:
        raise ValueError("a policy that draws needs the positions' keys")
    return torch.from_numpy(draw_uniforms(chunk.keys_N, num)).to(chunk.softmax.lse_N.device)


def _to_entries(selection: Selection, policy: AnyPolicy, num: int) -> KeptEntries:
    """Returns the entries of the first ``num`` positions, on the host."""
    offsets = offsets_of(_to_numpy(selection.counts_N[:num]))
    stop = int(offsets[-1])
    draws = None
    if selection.draws_S is not None and isinstance(policy, SampledPolicy):
        counts = _to_numpy(selection.draws_S[:stop].int())
        log_norm = _to_numpy(_given(selection.log_norm_N)[:num])
        draws = Draws(counts, log_norm, policy.num_samples, policy.tau)
    is_hybrid = selection.num_head_N is not None
    return KeptEntries(
        offsets=offsets,
        ids=_to_numpy(selection.ids_S[:stop].int()),
        log_probs=_to_numpy(selection.log_probs_S[:stop].clamp(max=0)),
        num_head=_to_numpy(_given(selection.num_head_N)[:num]) if is_hybrid else None,
        tau=_to_numpy(_given(selection.tau_N)[:num]) if is_hybrid else None,
        draws=draws,
    )


def _given(values: Tensor | None) -> Tensor:
    if values is None:
        raise ValueError("a policy left out a part of its selection")
    return values


def _to_numpy(values: Tensor) -> Any:
    return values.detach().cpu().numpy()


def _check_input(logits_NW: Tensor, targets_N: Tensor, keys_N: Keys | None, truncation: Truncation) -> None:
    num, width = logits_NW.shape
    if width < truncation.vocab:
        raise DataError(f"logits have {width} columns for a vocabulary of {truncation.vocab} tokens")
    if not num or len(targets_N) != num or (keys_N is not None and len(keys_N) != num):
        raise ValueError(f"{num} positions have {len(targets_N)} targets or keys of another number")
    least, most = (int(bound) for bound in targets_N.aminmax())
    if not 0 <= least <= most < truncation.vocab:
        wrong = least if least < 0 else most
        raise DataError(f"target id {wrong} is out of range; the vocabulary has {truncation.vocab} tokens")
