"""The record of a training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.metrics_log import MetricsLog, cut_lines, read_lines


def step_line(step: int) -> dict[str, object]:
    return {"kind": "step", "step": step, "total_steps": 30, "loss": 1 / step}


def write(root: Path, steps: range, resume_step: int) -> None:
    log = MetricsLog(root / "metrics.jsonl", root / "tensorboard", resume_step)
    for step in steps:
        log.write(step_line(step))
    log.close()


def test_a_resume_leaves_each_step_once(tmp_path: Path) -> None:
    write(tmp_path, range(1, 16), 0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    write(tmp_path, range(11, 31), 10)
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    assert lines == [step_line(step) for step in range(1, 31)]


def test_a_fresh_start_forgets_what_was_there(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4), 0)
    write(tmp_path, range(1, 3), 0)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_lines_are_there_at_once_and_strict_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", 0)
    log.write(step_line(1))
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == step_line(1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write({"kind": "step", "step": 2, "total_steps": 3, "loss": float("nan")})
    log.close()


def test_tensorboard_holds_the_same_values(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, range(1, 31), 0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("step/loss")}
    assert found == pytest.approx({10: 1 / 10, 20: 1 / 20, 30: 1 / 30})


def test_cutting_what_is_absent_does_nothing(tmp_path: Path) -> None:
    cut_lines(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []
