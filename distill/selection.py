"""Selection: which evaluated step is the best, and when to stop.

Invariants:
    1. Of equal values the earlier step is kept (tests/distill/test_selection.py).
    2. A value that is not a number is never the best (tests/distill/test_selection.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from schemas.job import AnyJob, LanguageJob

_LOWER_IS_BETTER = frozenset({"loss", "soft_loss", "perplexity"})


@dataclass
class Selection:
    """What selection has seen so far; it goes into checkpoints.

    Attributes:
        metric: Name of the measure that is compared.
        patience: Evaluations without a better value after which training stops; None: never.
        best_step: Step of the best value so far.
        best_value: That value.
        num_stale: Evaluations since then.
    """

    metric: str
    patience: int | None = None
    best_step: int | None = None
    best_value: float | None = None
    num_stale: int = 0

    def update(self, step: int, value: float) -> bool:
        """Takes in an evaluation and tells whether it is the best one so far."""
        sign = -1.0 if self.metric in _LOWER_IS_BETTER else 1.0
        # NaN compares as False.
        better = sign * value > (float("-inf") if self.best_value is None else sign * self.best_value)
        if better:
            self.best_step, self.best_value, self.num_stale = step, value, 0
        else:
            self.num_stale += 1
        return better

    @property
    def wants_stop(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.num_stale >= self.patience

    def to_json(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Selection:
        """Restores what ``to_json`` gave."""
        return cls(**state)


def selection_metric(job: AnyJob) -> str:
    """Returns the metric that a job selects by: the named one, else accuracy, soft loss or loss."""
    if job.training.metric is not None:
        return job.training.metric
    if isinstance(job, LanguageJob):
        return "loss"
    return "accuracy" if job.uses_golden else "soft_loss"
