"""The steps of a language run, in order: plan, stores, students, evaluation, report.

Each step finds what an earlier start finished. ``distill`` reads ``stores.lock.json`` and never opens a
teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.language.arms import LanguageInputs, student_runs, used_teachers
from cluster.language.models import find_init, find_teachers
from cluster.language.planning import PlannedText, plan_chunks, say_dropped
from cluster.run_context import RunOf, RunOptions, RunResult, start_run
from cluster.run_directory import RunDirectory, read_lock
from cluster.stores_lock import check_locked, check_made, write_lock
from schemas.errors import RecipeError
from schemas.language import LanguageRecipe
from schemas.records import StoresLock


def run_recipe(recipe: LanguageRecipe, options: RunOptions) -> RunResult:
    """Runs all steps.

    Raises:
        TmkdError: A step failed; what is finished is kept.
    """
    from cluster.language.evaluation import evaluate_students
    from cluster.language.students import publish_student, train_students
    from cluster.report import write_report

    with start_run(recipe, options) as run:
        planned, lock = _make_stores(run)
        inputs = make_inputs(run, planned, lock)
        with run.steps.step("students"):
            students = train_students(run, inputs)
        student = publish_student(run, students[0], inputs)
        evaluation = None
        if recipe.evaluation.corpora:
            teachers = find_teachers(recipe, run.directory, used_teachers(recipe))
            with run.steps.step("evaluation"):
                evaluation = evaluate_students(run, planned, students, teachers)
        report = write_report(run.directory.run)
    return RunResult(run.directory.run, student, report, evaluation)


def precompute_recipe(recipe: LanguageRecipe, options: RunOptions) -> StoresLock:
    """Makes the stores that a recipe's students need."""
    used = used_teachers(recipe)
    unused = [name for name in options.teachers if name not in used]
    if unused:
        raise RecipeError(
            f"--teacher: no student uses a teacher named {unused[0]}; there are {', '.join(used) or 'none'}"
        )
    with start_run(recipe, options) as run:
        return _make_stores(run)[1]


def distill_recipe(recipe: LanguageRecipe, options: RunOptions) -> Path:
    """Trains the students from the run's locked stores and returns the final one's directory."""
    from cluster.language.students import publish_student, train_students

    with start_run(recipe, options) as run:
        lock = read_lock(run.directory)
        check_made(recipe, lock)
        with run.steps.step("plan"):
            planned = plan_chunks(recipe, run.directory)
            check_locked({name: corpus.parts for name, corpus in planned.items()}, lock)
        inputs = make_inputs(run, planned, lock)
        with run.steps.step("students"):
            students = train_students(run, inputs)
        return publish_student(run, students[0], inputs)


def describe_plan(recipe: LanguageRecipe) -> dict[str, Any]:
    """Says what a run would do, with no model run; corpora are materialised."""
    directory = RunDirectory.of(recipe)
    directory.run.mkdir(parents=True, exist_ok=True)
    planned = plan_chunks(recipe, directory)
    parts = {
        name: {
            part.part: {
                "documents": part.documents.num_rows,
                "empty_documents": len(part.documents.excluded),
                "chunks": part.num_rows,
                "tokens": part.num_tokens,
                "positions": part.num_positions,
                "pieces_dropped": part.num_dropped,
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
        "dropped_chunks": {name: corpus.num_dropped for name, corpus in planned.items()},
        "teachers": {name: list(corpora) for name, corpora in used_teachers(recipe).items()},
        "arms": list(dict.fromkeys(run.arm for run in student_runs(recipe))),
        "students": [run.name for run in student_runs(recipe)],
    }


def make_inputs(
    run: RunOf[LanguageRecipe], planned: Mapping[str, PlannedText], lock: StoresLock
) -> LanguageInputs:
    """Collects what the students' jobs read, and hashes their initial weights."""
    init, init_hash = find_init(run.recipe, run.directory)
    dropped = {name: corpus.dropped_rows for name, corpus in planned.items() if corpus.dropped_rows}
    chunks = {name: corpus.spec for name, corpus in planned.items()}
    return LanguageInputs(lock, chunks, dropped, init, init_hash, run.num_threads)


def _make_stores(run: RunOf[LanguageRecipe]) -> tuple[dict[str, PlannedText], StoresLock]:
    from cluster.language.stores import store_requests
    from cluster.store_step import make_run_stores

    with run.steps.step("plan"):
        planned = plan_chunks(run.recipe, run.directory)
    say_dropped(planned)
    models = find_teachers(run.recipe, run.directory, used_teachers(run.recipe))
    stores = make_run_stores(run, store_requests(run, planned, models))
    lock = write_lock(run, {name: corpus.parts for name, corpus in planned.items()}, stores)
    return planned, lock
