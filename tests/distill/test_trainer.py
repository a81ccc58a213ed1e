"""The trainer, in this process over a group of one; kills and restarts in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.stage_directory import StageDirectory
from distill.stop_request import StopRequest
from distill.student import MultiHeadStudent
from distill.trainer import run_rank
from schemas.job import StageJob
from tests.tiny_stage import TinyStage, no_launcher_environment, read_metrics, read_weights

# torch's own compiler package, which DeepSpeed's ZeRO loads, decorates with what torch deprecates.
# DeepSpeed calls collectives by the names that they had before torch 2.13.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> TinyStage:
    return TinyStage(tmp_path_factory.mktemp("stage"))


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
        else:
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance)


def test_a_stage_leaves_a_model_a_record_and_a_complete_status(stage: TinyStage) -> None:
    job = stage.job("plain")
    assert train(job) == "complete"
    directory = StageDirectory(Path(job.output))
    status = directory.read_status()
    assert status is not None
    assert status.state == "complete"
    assert status.fingerprint == job.fingerprint()
    # 38 of 48 rows in steps of 8, twice.
    assert status.step == 10
    assert status.peak_rss_bytes is not None
    assert status.peak_rss_bytes > 10_000_000
    assert not directory.checkpoints.exists()
    student = MultiHeadStudent.from_pretrained(directory.model)
    assert student.layout.heads == ("golden", "first", "second")
    assert student.layout.max_length == 24
    lines = read_metrics(job.output)
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 11))
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [5, 10]
    first = lines[0]
    assert first["loss"] == pytest.approx(0.5 * first["golden_loss"] + 0.5 * first["soft_loss"], rel=1e-6)
    assert list((directory.path / "tensorboard").glob("events*"))
