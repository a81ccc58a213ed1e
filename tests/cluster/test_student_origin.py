"""Which run, or which point of a sweep, a student belongs to."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.arms import StudentRun
from cluster.recipe_file import write_recipe
from cluster.run_directory import RunDirectory
from cluster.student_origin import find_origin
from cluster.student_task import StudentTask, write_task
from schemas.errors import DataError
from schemas.evaluation import write_evaluation
from schemas.sweep_evaluation import SWEEP_EVALUATION_FILE, SweepEvaluation, SweepStudent
from tests.cluster.evaluations import make_evaluation
from tests.cluster.sweep.finished_sweep import make_directory
from tests.cluster.sweep.sweeps import make_sweep
from tests.cluster.test_model_card import LABELS, make_recipe


def add_sweep(out: Path, name: str, sweep: SweepEvaluation) -> SweepStudent:
    """Writes a finished sweep with its cells' recipes, and the model of its last student."""
    sweep = sweep.model_copy(update={"sweep": name})
    make_directory(out / name, sweep)
    for point in sweep.points:
        cell = out / name / "cells" / point.point.name
        cell.mkdir(parents=True)
        write_recipe(make_recipe(out), cell / "recipe.yaml")
    return sweep.students[-1]


def add_model(out: Path, fingerprint: str | None) -> Path:
    model = out / "students" / "0123456789abcdef" / "model"
    model.mkdir(parents=True)
    write_task(StudentTask(text=("q",), labels=LABELS, arm="golden", seed=1, fingerprint=fingerprint), model)
    return model


def test_a_sweeps_student_is_found_by_its_fingerprint(tmp_path: Path) -> None:
    make_directory(tmp_path / "another", make_sweep(seeds=(7,)))
    expected = add_sweep(tmp_path, "swept", make_sweep(alphas=(0.5, 0.9)))
    origin = find_origin(add_model(tmp_path, expected.fingerprint))
    assert origin is not None
    # As the sweep says, whatever the task was written for first.
    assert origin.student == StudentRun(expected.arm, expected.seed, expected.teacher)
    assert origin.name == f"swept/{expected.point}"
    assert origin.directory.lock == tmp_path / "swept" / "cells" / expected.point / "stores.lock.json"
    assert origin.directory.out == tmp_path
    assert origin.evaluation is not None
    assert {row.name for row in origin.evaluation.corpora[0].models} >= {"golden", "tmkd"}


@pytest.mark.parametrize("lost", ["fingerprint", "recipe", "failed"])
def test_a_student_that_no_sweep_has_belongs_to_none(tmp_path: Path, lost: str) -> None:
    sweep = make_sweep(alphas=(0.5,))
    if lost == "failed":
        gone = [one.model_copy(update={"state": "failed", "error": "lost"}) for one in sweep.students]
        sweep = sweep.model_copy(update={"students": tuple(gone)})
    student = add_sweep(tmp_path, "swept", sweep)
    if lost == "recipe":
        (tmp_path / "swept" / "cells" / student.point / "recipe.yaml").unlink()
    assert (
        find_origin(add_model(tmp_path, "f" * 64 if lost == "fingerprint" else student.fingerprint)) is None
    )


def test_a_damaged_sweep_hides_no_other(tmp_path: Path) -> None:
    expected = add_sweep(tmp_path, "swept", make_sweep(alphas=(0.5,)))
    (tmp_path / "a-damaged-one").mkdir()
    (tmp_path / "a-damaged-one" / SWEEP_EVALUATION_FILE).write_text("{")
    origin = find_origin(add_model(tmp_path, expected.fingerprint))
    assert origin is not None
    assert origin.name == f"swept/{expected.point}"


def test_a_runs_student_is_its_final_one_and_its_evaluation_may_be_missing(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    directory = RunDirectory.of(recipe)
    directory.student.mkdir(parents=True)
    assert find_origin(directory.student) is None
    write_recipe(recipe, directory.recipe)
    origin = find_origin(directory.student)
    assert origin is not None
    assert (origin.name, origin.directory, origin.evaluation) == ("run", directory, None)
    assert origin.student == StudentRun("tmkd", 17)
    write_evaluation(directory.evaluation, make_evaluation())
    again = find_origin(directory.student)
    assert again is not None
    assert again.evaluation == make_evaluation()
    directory.evaluation.write_text("{}")
    with pytest.raises(DataError):
        find_origin(directory.student)


def test_a_student_that_lies_anywhere_else_belongs_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "students" / "copied" / "model").mkdir(parents=True)
    assert find_origin(tmp_path / "students" / "copied" / "model") is None
    assert find_origin(tmp_path) is None
