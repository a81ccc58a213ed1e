"""The steps of a run, in order: plan, teachers, stores, students, evaluation, report.

Each step finds what an earlier start finished. ``distill`` and what follows read ``stores.lock.json``
and never open a teacher, apart from the speed measurement of a whole run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.arms import Inputs, recipe_arms, student_runs, used_teachers
from cluster.console import say
from cluster.planning import PlannedCorpus, plan_corpora
from cluster.run_context import Run, RunOptions, RunResult, start_run
from cluster.run_directory import RunDirectory, read_lock
from cluster.stores_lock import check_locked, check_made, write_lock
from schemas.errors import RecipeError
from schemas.recipe import Recipe
from schemas.records import StoresLock

if TYPE_CHECKING:
    from cluster.teacher_model import TeacherModel


def run_recipe(recipe: Recipe, options: RunOptions) -> RunResult:
    """Runs all steps.

    Raises:
        TmkdError: A step failed; what is finished is kept.
    """
    from cluster.evaluation_step import evaluate_students
    from cluster.report import write_report
    from cluster.student_step import publish_student, train_students

    with start_run(recipe, options) as run:
        planned, lock, teachers = _make_stores(run)
        inputs = make_inputs(run, planned, lock)
        with run.steps.step("students"):
            students = train_students(run, inputs)
        student = publish_student(run, students[0])
        evaluation = None
        if recipe.evaluation.corpora:
            with run.steps.step("evaluation"):
                evaluation = evaluate_students(run, planned, lock, students, teachers=teachers)
        report = write_report(run.directory.run)
    return RunResult(run.directory.run, student, report, evaluation)


def precompute_recipe(recipe: Recipe, options: RunOptions) -> StoresLock:
    """Makes the stores that a recipe's students need."""
    used = used_teachers(recipe)
    unused = [name for name in options.teachers if name not in used]
    if unused:
        raise RecipeError(
            f"--teacher: no student uses a teacher named {unused[0]}; there are {', '.join(used) or 'none'}"
        )
    with start_run(recipe, options) as run:
        return _make_stores(run)[1]


def distill_recipe(recipe: Recipe, options: RunOptions) -> Path:
    """Trains the students from the run's locked stores and returns the final one's directory."""
    from cluster.student_step import publish_student, train_students

    with start_run(recipe, options) as run:
        lock = read_lock(run.directory)
        check_made(recipe, lock)
        with run.steps.step("plan"):
            planned = plan_corpora(recipe, run.directory)
            check_locked({name: corpus.parts for name, corpus in planned.items()}, lock)
        with run.steps.step("students"):
            students = train_students(run, make_inputs(run, planned, lock))
        return publish_student(run, students[0])


def describe_plan(recipe: Recipe) -> dict[str, Any]:
    """Says what a run would do, with no model loaded; corpora are materialised."""
    directory = RunDirectory.of(recipe)
    directory.run.mkdir(parents=True, exist_ok=True)
    planned = plan_corpora(recipe, directory)
    parts = {
        name: {
            part.part: {
                "rows": part.num_rows,
                "labelled": part.num_labelled,
                "excluded": len(part.excluded),
                "shards": -(-part.num_rows // recipe.store.shard_rows),
                "fingerprint": part.fingerprint[:16],
            }
            for part in corpus.parts
        }
        for name, corpus in planned.items()
    }
    return {
        "run": str(directory.run),
        "corpora": parts,
        "dropped_rows": {name: corpus.num_dropped for name, corpus in planned.items()},
        "teachers": {name: list(corpora) for name, corpora in used_teachers(recipe).items()},
        "arms": list(recipe_arms(recipe)),
        "students": [run.name for run in student_runs(recipe)],
    }


def make_inputs(run: Run, planned: dict[str, PlannedCorpus], lock: StoresLock) -> Inputs:
    """Collects what the students' jobs read, and hashes their initial weights."""
    from precompute.generation import hash_model
    from schemas.model_ref import resolve_model
    from schemas.recipe import LayersInit

    init = run.recipe.student.init
    init_hash = None
    if isinstance(init, LayersInit):
        path = resolve_model(init.model, field="student.init.model")
        init_hash = hash_model(path, init.revision, run.directory.hash_cache)
    dropped = {name: corpus.dropped_rows for name, corpus in planned.items() if corpus.dropped_rows}
    return Inputs(lock, dropped, init_hash, run.num_threads)


def _make_stores(run: Run) -> tuple[dict[str, PlannedCorpus], StoresLock, dict[str, TeacherModel]]:
    from cluster.store_step import make_run_stores, store_requests
    from cluster.teacher_step import train_teachers

    with run.steps.step("plan"):
        planned = plan_corpora(run.recipe, run.directory)
    for name, corpus in planned.items():
        if corpus.num_dropped:
            dropped = f"{corpus.num_dropped} unlabelled rows that share a text with an evaluation set"
            say(f"  {name}: dropped {dropped}")
    models = train_teachers(run, planned)
    stores = make_run_stores(run, store_requests(run, planned, models))
    lock = write_lock(run, {name: corpus.parts for name, corpus in planned.items()}, stores)
    return planned, lock, models
