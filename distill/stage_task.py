"""What a stage trains: the part of a training that differs between kinds of models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from torch import Tensor, nn

from distill.engine import Engine, StepPlan
from distill.loader import Counted, StepSource

TaskBatch = TypeVar("TaskBatch", bound=Counted)


@dataclass(frozen=True, slots=True)
class StepLosses:
    """Sums over what counts of a batch; scalars.

    Attributes:
        total: What is minimised, with its graph.
        parts: Detached further sums by name, which the record shows divided by the step's count; None for
            what is not trained. Every batch of a stage has the same names in the same order.
    """

    total: Tensor
    parts: Mapping[str, Tensor | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StageFrame(Generic[TaskBatch]):
    """What a trainer drives.

    Attributes:
        module: The model, float32.
        source: Its training data.
        plan: Number and cut of the steps.
        evaluates: Whether there are rows to select on.
        counts: What ``real_count_in_step`` counts, for the speed in the record.
    """

    module: nn.Module
    source: StepSource[TaskBatch]
    plan: StepPlan
    evaluates: bool
    counts: Literal["rows", "tokens"] = "rows"


class StageTask(Protocol[TaskBatch]):
    """A model, its data and its losses."""

    @property
    def frame(self) -> StageFrame[TaskBatch]:
        """What the trainer drives."""

    def sum_losses(self, engine: Engine, batch: TaskBatch) -> StepLosses:
        """Puts a micro-batch through the model."""

    def measure(self, engine: Engine) -> dict[str, float]:
        """Returns measures on the held-out rows; every rank must call it, without gradients."""

    def save(self, directory: Path, weights: dict[str, Tensor]) -> None:
        """Writes the model in the layout of ``save_pretrained``.

        Args:
            directory: A new one.
            weights: The module's state dict, gathered on the CPU.
        """


AnyTask = StageTask[Any]
