"""The steps of a language run, for ``cluster.commands``: plan, stores, students, evaluation.

Each step finds what an earlier start finished. ``distill`` reads ``stores.lock.json`` and never opens a
teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.language.arms import LanguageInputs, student_runs, used_teachers
from cluster.language.models import find_init, find_teachers
from cluster.language.planning import PlannedText, plan_chunks, say_dropped
from cluster.run_context import RunOf
from cluster.run_directory import RunDirectory, read_lock
from cluster.stores_lock import check_locked, check_made, write_lock
from schemas.language import LanguageRecipe
from schemas.language_evaluation import LanguageRunEvaluation
from schemas.records import StoresLock

if TYPE_CHECKING:
    from cluster.language.arms import FinishedLanguageStudent

__all__ = [
    "Made",
    "describe_plan",
    "evaluate",
    "make_stores",
    "publish",
    "read_stores",
    "train",
    "used_teachers",
]


@dataclass(frozen=True)
class Made:
    """What students are trained from: all corpora, and the lock of corpora and stores."""

    planned: Mapping[str, PlannedText]
    lock: StoresLock


def make_stores(run: RunOf[LanguageRecipe]) -> Made:
    """Plans, and makes the stores that the recipe's students need."""
    from cluster.language.stores import store_requests
    from cluster.store_step import make_run_stores

    with run.steps.step("plan"):
        planned = plan_chunks(run.recipe, run.directory)
    say_dropped(planned)
    models = find_teachers(run.recipe, run.directory, used_teachers(run.recipe))
    stores = make_run_stores(run, store_requests(run, planned, models))
    lock = write_lock(run, {name: corpus.parts for name, corpus in planned.items()}, stores)
    return Made(planned, lock)


def read_stores(run: RunOf[LanguageRecipe]) -> Made:
    """Finds the stores that precompute locked; no teacher is opened."""
    lock = read_lock(run.directory)
    check_made(run.recipe, lock)
    with run.steps.step("plan"):
        planned = plan_chunks(run.recipe, run.directory)
        check_locked({name: corpus.parts for name, corpus in planned.items()}, lock)
    return Made(planned, lock)


def train(run: RunOf[LanguageRecipe], made: Made) -> tuple[FinishedLanguageStudent, ...]:
    """Trains the students; the first one is the run's final student."""
    from cluster.language.students import train_students

    init, init_hash = find_init(run.recipe, run.directory)
    dropped = {name: corpus.dropped_rows for name, corpus in made.planned.items() if corpus.dropped_rows}
    chunks = {name: corpus.spec for name, corpus in made.planned.items()}
    return train_students(run, LanguageInputs(made.lock, chunks, dropped, init, init_hash, run.num_threads))


def publish(run: RunOf[LanguageRecipe], student: FinishedLanguageStudent, made: Made) -> Path:
    """Puts the final student to its place."""
    from cluster.language.students import publish_student

    return publish_student(run, student, {name: corpus.spec for name, corpus in made.planned.items()})


def evaluate(
    run: RunOf[LanguageRecipe], made: Made, students: Sequence[FinishedLanguageStudent]
) -> LanguageRunEvaluation:
    """Measures teachers and students over the evaluation corpora."""
    from cluster.language.evaluation import evaluate_students

    teachers = find_teachers(run.recipe, run.directory, used_teachers(run.recipe))
    return evaluate_students(run, made.planned, students, teachers)


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
