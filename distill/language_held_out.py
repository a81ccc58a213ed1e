"""Measures of a language model on held-out rows, summed over ranks.

Shapes: N positions, L loss terms, S = 3 sums, B = 15 bins of confidence.

Invariants (tests/distill/test_language_held_out.py):
    1. The measures do not depend on the number of ranks or the size of batches.
    2. ECE is the usual one over equally wide bins, of the most probable token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distill.fused_head import FusedLosses

NUM_BINS = 15


@dataclass
class LanguageSums:
    """Running sums over positions, float64.

    Attributes:
        terms_L: Sums of each term.
        total: Sum of the weighted terms.
        bins_SB: Positions, hits and confidences by bin of confidence.
    """

    terms_L: Tensor
    total: Tensor
    bins_SB: Tensor

    @classmethod
    def empty(cls, num_terms: int, device: torch.device) -> LanguageSums:
        """Returns sums over no positions."""
        zeros = torch.zeros(num_terms, dtype=torch.float64, device=device)
        return cls(zeros, zeros.new_zeros(()), zeros.new_zeros(3, NUM_BINS))

    def add(self, losses: FusedLosses, weights_N: Tensor) -> None:
        """Adds a batch; positions of weight 0 are padding."""
        self.total += losses.total.double()
        self.terms_L += (losses.terms_LN.double() * weights_N.double()).sum(dim=1)
        if losses.top_log_prob_N is None:
            raise ValueError("calibration needs a term at temperature 1")
        counts = weights_N > 0
        confidence_N = losses.top_log_prob_N.double().exp()[counts]
        bins_N = (confidence_N * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        hits_N = losses.hits_N[counts].double()
        for row, values_N in enumerate((torch.ones_like(hits_N), hits_N, confidence_N)):
            self.bins_SB[row].index_add_(0, bins_N, values_N)

    def share(self) -> None:
        """Adds up the sums of all ranks; every rank must call it."""
        for sums in (self.terms_L, self.total, self.bins_SB):
            dist.all_reduce(sums)

    def measures(self, names: Sequence[str], cross_entropy: int) -> dict[str, float]:
        """Returns ``loss``, each term, ``perplexity``, ``accuracy`` and ``ece``.

        Args:
            names: Of the terms that are reported; the first ones.
            cross_entropy: Which term is the target's cross-entropy at temperature 1.
        """
        counts_B, hits_B, confidences_B = self.bins_SB
        count = float(counts_B.sum())
        found = {"loss": float(self.total) / count}
        found |= {name: float(value) / count for name, value in zip(names, self.terms_L, strict=False)}
        nats = float(self.terms_L[cross_entropy]) / count
        # A model that has learnt nothing of a huge vocabulary may have more than a float holds.
        found["perplexity"] = math.exp(min(nats, 700.0))
        found["accuracy"] = float(hits_B.sum()) / count
        found["ece"] = float((hits_B - confidences_B).abs().sum()) / count
        return found
