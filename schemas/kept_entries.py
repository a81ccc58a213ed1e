"""Kept entries: what a policy keeps of the distributions of N positions, and a codec carries.

Shapes: N positions (of one or several chunks), S kept entries of all of them, G temperatures of a grid.

Invariants (tests/schemas/test_kept_entries.py):
    1. ``weights`` are the probability mass that each entry stands for: their sum times f is what a loss
       takes for ``sum_v p_v f(v)``.
    2. ``widen`` changes dtypes and no value.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Offsets = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]
Integers = npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class Draws:
    """What ``sampled`` knows of its entries besides their probability.

    Attributes:
        counts: Draws of each entry, integer[S]; a position's add up to ``num_samples``.
        log_norm: ``log sum_v p_v^tau`` of each position, float32[N]; 0 for tau = 1.
        num_samples: Draws of a position.
        tau: Exponent of the proposal q = p^tau / exp(log_norm).
    """

    counts: Integers
    log_norm: npt.NDArray[np.float32]
    num_samples: int
    tau: float


@dataclass(frozen=True, slots=True)
class KeptEntries:
    """The kept entries of N positions.

    Attributes:
        offsets: int64[N + 1]: position n has the entries ``[offsets[n], offsets[n + 1])``.
        ids: Token ids in ``[0, V)``, integer[S] (int32 once widened), ascending within a position, or
            within each part of a hybrid one.
        log_probs: Log-softmax at T = 1 over the true vocabulary, not renormalised, float[S] (float32
            once widened). The sampled tail of ``hybrid`` has ``log(tau)`` here: its own are not kept.
        num_head: ``hybrid`` only: the first entries of each position that are exact, integer[N].
        tau: ``hybrid`` only: mass that each entry of a position's sampled tail stands for, float32[N].
        draws: ``sampled`` only.
    """

    offsets: Offsets
    ids: Integers
    log_probs: Floats
    num_head: Integers | None = None
    tau: npt.NDArray[np.float32] | None = None
    draws: Draws | None = None

    @property
    def num_positions(self) -> int:
        """N."""
        return len(self.offsets) - 1

    @property
    def counts(self) -> Offsets:
        """Entries of each position, int64[N]."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def weights(self) -> npt.NDArray[np.float32] | None:
        """Mass that each entry stands for, float32[S]; None for deterministic policies: p itself.

        ``sampled``: ``count / (num_samples q) p``, q = p^tau / sum p^tau. ``hybrid``: p in the head, tau
        in the tail. Both make sums over the entries unbiased.

        Source: Anshumann et al., ACL 2025, arXiv:2503.16870; Horvitz and Thompson, JASA 1952.
        """
        if self.draws is not None:
            scale = self.draws.counts.astype(np.float32) / np.float32(self.draws.num_samples)
            if self.draws.tau == 1:
                return scale
            norm = np.repeat(self.draws.log_norm, self.counts)
            power = np.float32(1 - self.draws.tau)
            return scale * np.exp(norm + power * self.log_probs.astype(np.float32))
        if self.num_head is not None:
            return np.exp(self.log_probs.astype(np.float32))
        return None

    def widen(self) -> KeptEntries:
        """Returns the same with int32 ids and float32 log-probabilities; what is wide is shared."""
        return dataclasses.replace(
            self,
            ids=self.ids.astype(np.int32, copy=False),
            log_probs=self.log_probs.astype(np.float32, copy=False),
        )

    def head_mask(self) -> npt.NDArray[np.bool_]:
        """Returns which entries are exact, bool[S]: all but a hybrid position's sampled tail."""
        if self.num_head is None:
            return np.ones(len(self.ids), np.bool_)
        head = self.num_head.astype(np.int64)
        return interleave_mask(head, self.counts - head)


@dataclass(frozen=True, slots=True)
class PositionStats:
    """What is stored of each position besides its kept entries; all float32, in nats.

    Attributes:
        log_tail: Log of the mass that no exact entry has, [N]: outside the kept entries, and for
            ``hybrid`` outside the head. -inf where nothing is missing.
        lse: Log-sum-exp of the logits at T = 1 over the true vocabulary, [N].
        entropy: Of the distribution at T = 1, [N].
        target_logprob: Log-probability of the token to predict, [N].
        lse_grid: Log-sum-exp of logits / T for each temperature of the grid, [N, G].
    """

    log_tail: npt.NDArray[np.float32]
    lse: npt.NDArray[np.float32]
    entropy: npt.NDArray[np.float32]
    target_logprob: npt.NDArray[np.float32]
    lse_grid: npt.NDArray[np.float32]


def interleave_mask(first: Offsets, second: Offsets) -> npt.NDArray[np.bool_]:
    """Returns for each position ``first[n]`` times True, then ``second[n]`` times False.

    Args:
        first: Counts, int64[N].
        second: Counts, int64[N].
    """
    counts = np.stack([first, second], axis=1).reshape(-1)
    return np.repeat(np.tile(np.array([True, False]), len(first)), counts)


def offsets_of(counts: Integers) -> Offsets:
    """Returns ``[0, c_0, c_0 + c_1, ...]``, int64[N + 1], of counts[N]."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets
