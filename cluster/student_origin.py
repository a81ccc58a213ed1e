"""Where a student comes from: the run, or the sweep's point, that trained it.

Invariants (tests/cluster/test_student_origin.py):
    1. A sweep's student is known by its fingerprint, whatever the point that it was first trained for.
    2. A sweep's document that cannot be read holds no student, and is no error: another may.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cluster.arms import MODEL_DIRECTORY, StudentRun, student_runs
from cluster.recipe_file import load_recipe
from cluster.run_directory import RunDirectory
from cluster.student_task import StudentTask, read_task
from cluster.sweep.points import CELLS_DIRECTORY, cell_name
from schemas.errors import DataError, RecipeError
from schemas.evaluation import RunEvaluation, read_evaluation
from schemas.recipe import Recipe
from schemas.sweep_evaluation import SWEEP_EVALUATION_FILE, read_sweep_evaluation


@dataclass(frozen=True, slots=True)
class StudentOrigin:
    """The run, or the point of a sweep, that a student belongs to.

    Attributes:
        name: ``quickstart``, or ``qnli-table/layers=2`` of a sweep.
        recipe: Resolved.
        directory: With locks and predictions.
        student: Which of its students.
        evaluation: None: there is none (yet).
    """

    name: str
    recipe: Recipe
    directory: RunDirectory
    student: StudentRun
    evaluation: RunEvaluation | None


def find_origin(student: Path) -> StudentOrigin | None:
    """Finds the run or the sweep of a student's directory; None where it lies in none.

    Args:
        student: ``<out>/<run>/student``, or ``<out>/students/<fingerprint>/model`` of a sweep.

    Raises:
        DataError: The student's task, or its run's evaluation, is damaged.
        RecipeError: Its run's recipe cannot be read.
    """
    student = student.absolute()
    task = read_task(student)
    if student.name == MODEL_DIRECTORY and student.parent.parent.name == "students":
        return None if task is None else _find_in_sweeps(student.parent.parent.parent, task)
    return _find_in_run(student.parent, task)


def _find_in_run(run: Path, task: StudentTask | None) -> StudentOrigin | None:
    path = run / "recipe.yaml"
    if not path.is_file():
        return None
    recipe = load_recipe(str(path), out=str(run.parent))
    if not isinstance(recipe, Recipe):
        return None
    directory = RunDirectory.of(recipe)
    evaluation = read_evaluation(directory.evaluation) if directory.evaluation.exists() else None
    return StudentOrigin(recipe.name, recipe, directory, _student_run(recipe, task), evaluation)


def _student_run(recipe: Recipe, task: StudentTask | None) -> StudentRun:
    final = student_runs(recipe)[0]
    if task is None or task.arm is None or (task.arm, task.seed) == (final.arm, final.seed):
        return final
    return StudentRun(task.arm, recipe.seed if task.seed is None else task.seed)


def _find_in_sweeps(out: Path, task: StudentTask) -> StudentOrigin | None:
    for path in sorted(out.glob(f"*/{SWEEP_EVALUATION_FILE}")):
        try:
            sweep = read_sweep_evaluation(path)
        except DataError:
            continue
        for one in sweep.students:
            if one.fingerprint != task.fingerprint or one.state != "trained":
                continue
            cell = path.parent / CELLS_DIRECTORY / cell_name(one.point, one.fold)
            try:
                recipe = load_recipe(str(cell / "recipe.yaml"), out=str(out))
            except RecipeError:
                continue
            if not isinstance(recipe, Recipe):
                continue
            point = next((point for point in sweep.points if point.point.name == one.point), None)
            return StudentOrigin(
                f"{sweep.sweep}/{cell_name(one.point, one.fold)}",
                recipe,
                replace(RunDirectory.of(recipe), run=cell),
                StudentRun(one.arm, one.seed, one.teacher),
                None if point is None else point.evaluation,
            )
    return None
