"""Points of a sweep: folds pooled, points compared on the same rows, rows to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.model_outputs import EvaluatedRows, ModelOutput, student_name
from cluster.run_directory import RunDirectory
from cluster.scoring import EvaluationCorpus
from cluster.sweep.points import Cell
from cluster.sweep.scoring import (
    CellOutputs,
    PointOutputs,
    compare_points,
    list_disagreements,
    pool_folds,
    score_point,
)
from schemas.recipe import Arm
from schemas.sweep import GridPoint
from tests.cluster.test_arms import recipe
from tests.cluster.tiny_students import make_corpus

LABELS = ("yes", "no")


def model(arm: Arm | None, seed: int | None, *first: float, name: str | None = None) -> ModelOutput:
    return ModelOutput(
        name=name or (student_name(arm) if arm else "t"),
        kind="student" if arm else "teacher",
        probabilities_NC=np.array([[p, 1 - p] for p in first]),
        arm=arm,
        teacher=None if arm else name or "t",
        seed=seed,
    )


def cell(
    golden: list[int], *outputs: ModelOutput, fold: int | None = None, corpus: EvaluationCorpus | None = None
) -> CellOutputs:
    directory = RunDirectory(Path("/out"), Path("/out/s/cells/base"), "/out/stores")
    described = Cell(GridPoint(), fold, recipe(), directory)
    read: Any = corpus or EvaluationCorpus("dev", recipe().corpora["test"], ())
    rows = EvaluatedRows("dev", LABELS, np.array(golden), row_N=np.arange(len(golden)))
    return CellOutputs(described, read, rows, outputs)


def test_the_rows_of_all_folds_are_scored_together() -> None:
    # One of two rows right in the first fold, one of one in the second: 2/3, not the mean 3/4.
    point = pool_folds(
        [cell([0, 0], model("tmkd", 1, 0.9, 0.1), fold=0), cell([1], model("tmkd", 1, 0.2), fold=1)]
    )
    scored = score_point(point, "tmkd")
    assert scored.num_rows == 3
    assert scored.models[0].accuracy == pytest.approx(2 / 3)
    assert any("held-out rows of 2 folds" in note for note in scored.notes)


def test_a_model_that_one_fold_lacks_is_left_out_and_said_so() -> None:
    point = pool_folds(
        [
            cell([0, 1], model("tmkd", 1, 0.9, 0.1), model("golden", 1, 0.9, 0.1), fold=0),
            cell([1], model("golden", 1, 0.2), fold=1),
        ]
    )
    assert [output.name for output in point.outputs] == ["golden"]
    assert point.missing_seeds == {"tmkd": (1,)}


def points(**changes: Any) -> dict[str, PointOutputs]:
    here = cell([0, 0, 1, 1], model("tmkd", 1, 0.9, 0.1, 0.2, 0.1), model("golden", 1, 0.1, 0.1, 0.2, 0.1))
    there = cell(
        changes.get("golden", [0, 0, 1, 1]),
        model("tmkd", changes.get("seed", 1), 0.9, 0.9, 0.2, 0.1),
        model("tmkd", 2, 0.9, 0.9, 0.2, 0.1),
    )
    return {"base": pool_folds([here]), "alpha=1": pool_folds([there])}


def test_points_are_compared_seed_by_seed_with_the_first() -> None:
    (found,) = compare_points(points(), ["golden", "tmkd"])
    assert (found.arm, found.point, found.reference) == ("tmkd", "alpha=1", "base")
    # Three of four right at the first point, all four at the other; seed 2 has no partner.
    assert found.comparison.mean_difference == pytest.approx(0.25)
    assert [one.seed for one in found.comparison.seeds] == [1]
    assert (found.comparison.seeds[0].only_student, found.comparison.seeds[0].only_baseline) == (1, 0)


@pytest.mark.parametrize("changes", [{"golden": [1, 0, 1, 1]}, {"seed": 9}])
def test_other_rows_or_other_seeds_are_not_compared(changes: dict[str, Any]) -> None:
    found = points(**changes)
    if "seed" in changes:
        found["alpha=1"] = pool_folds([cell([0, 0, 1, 1], model("tmkd", 9, 0.9, 0.9, 0.2, 0.1))])
    assert compare_points(found, ["tmkd"]) == ()


def test_rows_to_read_are_those_on_which_student_and_teachers_differ(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    teachers = [model(None, None, 0.9, 0.8, 0.4, 0.1), model(None, None, 0.9, 0.8, 0.2, 0.1, name="u")]
    student = model("tmkd", 1, 0.8, 0.3, 0.9, 0.2)
    point = pool_folds([cell([0, 1, 1, 0], *teachers, student, corpus=corpus)])
    right, wrong = list_disagreements(point, "tmkd")
    # Row 1: the student has it (no), the teachers say yes at 0.8; row 2 the other way round, at 0.7.
    assert (right.example_id, right.texts) == ("train/1", ("what is a", "c d"))
    assert (right.golden, right.student, right.teachers) == ("no", ("no", 0.7), ("yes", pytest.approx(0.8)))
    assert wrong.texts == ("what is b", "e")
    assert (wrong.golden, wrong.student, wrong.teachers) == ("no", ("yes", 0.9), ("no", pytest.approx(0.7)))
