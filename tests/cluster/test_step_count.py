"""The number of steps that a stage takes, known before it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.step_count import count_steps
from tests.distill.tiny_training import train
from tests.tiny_stage import TinyStage, no_launcher_environment, read_metrics

__all__ = ["no_launcher_environment"]


@pytest.mark.parametrize(
    "training",
    [
        {"epochs": 2, "global_batch": 4, "selection_fraction": 0.2},
        {"epochs": 1, "global_batch": 7, "selection_fraction": 0.0, "rows": {"kind": None}},
        {"epochs": 3, "global_batch": 4, "max_steps": 2},
    ],
)
def test_it_is_what_the_trainer_logs(tmp_path: Path, training: dict[str, object]) -> None:
    stage = TinyStage(tmp_path / "stage")
    job = stage.job("out")
    fields = {name: value for name, value in training.items() if name != "rows"}
    rows = {"rows": {"first": 9}} if "rows" in training else {}
    changed = type(job.training).model_validate(
        {**job.training.model_dump(), "max_steps": None, **fields, **rows}
    )
    job = job.model_copy(update={"training": changed})
    train(job)
    steps = [line for line in read_metrics(job.output) if line["kind"] == "step"]
    assert count_steps(job) == steps[0]["total_steps"] == len(steps)
