"""The learning rate's schedule: a linear warm-up, then linear, cosine or constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from schemas.training import Optimisation

# From the fraction of the steps after the warm-up that is done, in [0, 1], to a factor in [0, 1].
_DECAYS: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        "linear": lambda done: 1.0 - done,
        "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
        "constant": lambda _done: 1.0,
    }
)


def rate_factor(training: Optimisation, step: int, total_steps: int) -> float:
    """Returns the factor of the peak learning rate in step ``step``.

    Args:
        training: Warm-up fraction and schedule.
        step: 0-based optimizer step.
        total_steps: Steps of the whole stage.

    Returns:
        A factor in [0, 1]; it is above 0 in every step below ``total_steps``, so that no step is lost.
    """
    num_warmup = round(training.warmup * total_steps)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    done = (step - num_warmup) / max(1, total_steps - num_warmup)
    return _DECAYS[training.schedule](min(1.0, done))
