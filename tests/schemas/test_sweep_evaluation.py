"""``sweep.json`` survives a round trip, and says when it was tampered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.errors import DataError
from schemas.sweep import GridPoint
from schemas.sweep_evaluation import (
    PointEvaluation,
    SweepCost,
    SweepEvaluation,
    SweepStudent,
    read_sweep_evaluation,
    write_sweep_evaluation,
)

POINT = GridPoint(coordinates={"a": "1"}, overrides={"a": 1})


def evaluation() -> SweepEvaluation:
    return SweepEvaluation(
        sweep="s",
        recipe="r.yaml",
        seeds=(1,),
        baseline="golden",
        points=(
            PointEvaluation(point=GridPoint(coordinates={"a": "1"}, overrides={"a": 1}), main_arm="tmkd"),
        ),
        students=(
            SweepStudent(point="a=1", arm="tmkd", seed=1, state="failed", error="no space"),
            SweepStudent(point="a=1", arm="golden", seed=1, state="trained", stages=("../students/x",)),
        ),
        cost=SweepCost(
            num_teachers=1,
            teacher_training_s=1.5,
            teacher_forward_s=2.0,
            num_stores=1,
            store_bytes=10,
            student_s=3.0,
            num_students=1,
            num_taught=0,
            elapsed_s=9.0,
        ),
    )


def test_a_round_trip_changes_nothing(tmp_path: Path) -> None:
    write_sweep_evaluation(tmp_path / "sweep.json", evaluation())
    assert read_sweep_evaluation(tmp_path / "sweep.json") == evaluation()


def test_the_failed_students_are_found() -> None:
    assert [student.error for student in evaluation().failures] == ["no space"]


def test_a_changed_figure_does_not_pass(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    write_sweep_evaluation(path, evaluation())
    path.write_text(path.read_text().replace("1.5", "0.5"))
    with pytest.raises(DataError, match="digest"):
        read_sweep_evaluation(path)
