"""Bins of confidence as the evaluation lists them, and those of several models together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill.metrics import Reliability
from schemas.evaluation import ReliabilityBin


def pool_bins(bins: Sequence[Reliability]) -> Reliability:
    """Returns the bins of all predictions of several models."""
    return Reliability(
        counts_M=np.sum([one.counts_M for one in bins], axis=0),
        confidence_sum_M=np.sum([one.confidence_sum_M for one in bins], axis=0),
        correct_M=np.sum([one.correct_M for one in bins], axis=0),
    )


def list_bins(bins: Reliability) -> tuple[ReliabilityBin, ...]:
    """Returns the bins as ``evaluation.json`` has them."""
    num_bins = len(bins.counts_M)
    listed = []
    for position in range(num_bins):
        count = int(bins.counts_M[position])
        listed.append(
            ReliabilityBin(
                low=position / num_bins,
                high=(position + 1) / num_bins,
                num_rows=count,
                # A sum of confidences of 1.0 may round to a mean above 1.
                mean_confidence=min(float(bins.confidence_sum_M[position]) / count, 1.0) if count else None,
                accuracy=int(bins.correct_M[position]) / count if count else None,
            )
        )
    return tuple(listed)
