"""Kept entries of every policy, made at random for tests of codecs and rows."""

from __future__ import annotations

import numpy as np

from schemas.kept_entries import Draws, KeptEntries, PositionStats, offsets_of
from schemas.policy import (
    AnyPolicy,
    DensePolicy,
    HybridPolicy,
    SampledPolicy,
    TopKPolicy,
    TopPPolicy,
    most_kept,
)

POLICIES: dict[str, AnyPolicy] = {
    "dense": DensePolicy(),
    "top_k": TopKPolicy(kind="top_k", k=5),
    "top_p": TopPPolicy(kind="top_p", p=0.9, k_min=1, k_max=9),
    "sampled": SampledPolicy(kind="sampled", num_samples=7, tau=0.8),
    "hybrid": HybridPolicy(kind="hybrid", k=3, m=4),
}


def make_entries(
    policy: AnyPolicy, vocab: int, num_positions: int, seed: int, *, empty: float = 0.0
) -> tuple[KeptEntries, np.ndarray]:
    """Returns entries of a policy, and the ``log_tail`` that a hybrid's tau follows from.

    Args:
        empty: Share of positions without entries (top_p and sampled).
    """
    rng = np.random.default_rng(seed)
    most = min(most_kept(policy, vocab), vocab)
    counts = np.full(num_positions, most)
    if isinstance(policy, TopPPolicy | SampledPolicy):
        counts = rng.integers(1, most + 1, num_positions) * (rng.random(num_positions) >= empty)
    num_head = counts.copy()
    if isinstance(policy, HybridPolicy):
        num_head = rng.integers(policy.k, most, num_positions, endpoint=True)
    ids = [draw_ids(rng, vocab, count, head) for count, head in zip(counts, num_head, strict=True)]
    flat = np.concatenate(ids) if ids else np.empty(0)
    offsets = offsets_of(counts)
    log_probs = -rng.exponential(5, len(flat)).astype(np.float32)
    log_tail = -rng.exponential(2, num_positions).astype(np.float32)
    entries = KeptEntries(offsets, flat.astype(np.int32), log_probs)
    if isinstance(policy, HybridPolicy):
        entries = _with_tail(entries, num_head, log_tail)
    if isinstance(policy, SampledPolicy):
        draws = rng.integers(1, policy.num_samples + 1, len(flat)).astype(np.int32)
        norm = rng.random(num_positions).astype(np.float32)
        entries = KeptEntries(
            offsets, entries.ids, log_probs, draws=Draws(draws, norm, policy.num_samples, policy.tau)
        )
    return entries, log_tail


def draw_ids(rng: np.random.Generator, vocab: int, count: int, head: int) -> np.ndarray:
    """Returns distinct ids, the first ``head`` ascending and the others, too."""
    found = np.arange(vocab) if count == vocab else np.unique(rng.integers(0, vocab, 4 * count + 8))
    while len(found) < count:
        found = np.unique(np.concatenate([found, rng.integers(0, vocab, 4 * count + 8)]))
    chosen = rng.permutation(found)[:count]
    return np.concatenate([np.sort(chosen[:head]), np.sort(chosen[head:])])


def make_stats(log_tail: np.ndarray, num_temperatures: int, seed: int) -> PositionStats:
    """Returns random statistics beside a given tail."""
    rng = np.random.default_rng(seed)
    columns = rng.normal(size=(3, len(log_tail))).astype(np.float32)
    grid = rng.normal(size=(len(log_tail), num_temperatures)).astype(np.float32)
    return PositionStats(log_tail, columns[0], columns[1], columns[2], grid)


def cut_rows(num_positions: int, num_rows: int, seed: int) -> np.ndarray:
    """Returns row offsets int64[num_rows + 1] over positions; rows may be empty."""
    inner = np.random.default_rng(seed).integers(0, num_positions + 1, num_rows - 1)
    return np.concatenate([[0], np.sort(inner), [num_positions]]).astype(np.int64)


def _with_tail(entries: KeptEntries, num_head: np.ndarray, log_tail: np.ndarray) -> KeptEntries:
    num_tail = entries.counts - num_head
    log_tau = log_tail - np.log(np.maximum(num_tail, 1)).astype(np.float32)
    log_tau[num_tail == 0] = -np.inf
    split = KeptEntries(
        entries.offsets, entries.ids, entries.log_probs, num_head=num_head, tau=np.exp(log_tau)
    )
    log_probs = np.where(split.head_mask(), entries.log_probs, np.repeat(log_tau, entries.counts))
    return KeptEntries(entries.offsets, entries.ids, log_probs, num_head=num_head, tau=split.tau)
