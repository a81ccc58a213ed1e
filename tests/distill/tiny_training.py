"""Training a tiny stage in this process, and comparing what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.stage_directory import StageDirectory
from distill.stop_request import StopRequest
from distill.trainer import run_rank
from schemas.job import StageJob
from tests.tiny_stage import no_launcher_environment, read_metrics


def train(job: StageJob, *, stop_after: int | None = None, keep: bool = False) -> str:
    """Trains in this process; asks to stop once ``stop_after`` steps are done."""
    directory = StageDirectory(Path(job.output))
    directory.create()
    stop: Any = StopRequest(directory) if stop_after is None else StopAfter(directory, stop_after)
    with no_launcher_environment():
        return run_rank(job, directory, stop, keep_checkpoints=keep)


class StopAfter(StopRequest):
    def __init__(self, directory: StageDirectory, steps: int) -> None:
        super().__init__(directory)
        self.steps_left = steps

    def is_set(self) -> bool:
        self.steps_left -= 1
        return self.steps_left <= 0


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        if tolerance == 0:
            assert torch.equal(value, theirs[name]), name
        elif not name.endswith("key.bias"):
            # Softmax cancels a key's bias, so its gradient is rounding alone, which Adam blows up.
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance, msg=name)


def assert_same_record(ours: Path, theirs: Path) -> None:
    for mine, other in zip(read_metrics(ours), read_metrics(theirs), strict=True):
        assert mine.pop("kind") == other.pop("kind")
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
