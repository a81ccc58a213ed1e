"""The steps of a classifier's run, for ``cluster.commands``: plan, teachers, stores, students, evaluation.

Each step finds what an earlier start finished. ``distill`` and what follows read ``stores.lock.json``
and never open a teacher, apart from the speed measurement of a whole run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.arms import Inputs, recipe_arms, student_runs, used_teachers
from cluster.console import say
from cluster.planning import PlannedCorpus, plan_corpora
from cluster.run_context import Run
from cluster.run_directory import RunDirectory, read_lock
from cluster.stores_lock import check_locked, check_made, write_lock
from schemas.evaluation import RunEvaluation
from schemas.recipe import Recipe
from schemas.records import StoresLock

if TYPE_CHECKING:
    from cluster.scoring import FinishedStudent
    from cluster.teacher_model import TeacherModel

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
    """What students are trained from.

    Attributes:
        planned: All corpora.
        lock: Corpora and stores.
        models: Of the teachers that have one; none where the stores were there.
    """

    planned: Mapping[str, PlannedCorpus]
    lock: StoresLock
    models: Mapping[str, TeacherModel] = field(default_factory=dict)


def make_stores(run: Run) -> Made:
    """Plans, trains the teachers that want it, and makes the stores that the recipe's students need."""
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
    return Made(planned, lock, models)


def read_stores(run: Run) -> Made:
    """Finds the stores that precompute locked; no teacher is opened."""
    lock = read_lock(run.directory)
    check_made(run.recipe, lock)
    with run.steps.step("plan"):
        planned = plan_corpora(run.recipe, run.directory)
        check_locked({name: corpus.parts for name, corpus in planned.items()}, lock)
    return Made(planned, lock)


def train(run: Run, made: Made) -> tuple[FinishedStudent, ...]:
    """Trains the students; the first one is the run's final student."""
    from cluster.student_step import train_students

    return train_students(run, make_inputs(run, made))


def publish(run: Run, student: FinishedStudent, _made: Made) -> Path:
    """Puts the final student to its place."""
    from cluster.student_step import publish_student

    return publish_student(run, student)


def evaluate(run: Run, made: Made, students: Sequence[FinishedStudent]) -> RunEvaluation:
    """Scores teachers and students over the evaluation corpora."""
    from cluster.evaluation_step import evaluate_students

    return evaluate_students(run, made.planned, made.lock, students, teachers=made.models)


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


def make_inputs(run: Run, made: Made) -> Inputs:
    """Collects what the students' jobs read, and hashes their initial weights."""
    from precompute.generation import hash_model
    from schemas.model_ref import resolve_model
    from schemas.recipe import LayersInit

    init = run.recipe.student.init
    init_hash = None
    if isinstance(init, LayersInit):
        path = resolve_model(init.model, field="student.init.model")
        init_hash = hash_model(path, init.revision, run.directory.hash_cache)
    dropped = {name: corpus.dropped_rows for name, corpus in made.planned.items() if corpus.dropped_rows}
    return Inputs(made.lock, dropped, init_hash, run.num_threads)
