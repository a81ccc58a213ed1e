"""The bootstrap of an evaluation: fixed seeds, so that the document is a function of the predictions.

Shapes: B bootstrap resamples, S seeds.
"""

from __future__ import annotations

from typing import Final

from distill.metrics import Floats, percentile_interval, resample_seeds
from schemas.evaluation import Interval

ROW_SEED: Final = 20_200_203
_SEED_SEED: Final = 1_910_083


def interval_of(means_BS: Floats) -> Interval:
    """Returns the 95 % interval of a mean over rows and, where S > 1, over seeds."""
    low, high = percentile_interval(resample_seeds(means_BS, _SEED_SEED))
    return Interval(low=low, high=high)
