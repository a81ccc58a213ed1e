"""The teachers of a run: those with a ``train`` block are fine-tuned first, once per fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.arms import MODEL_DIRECTORY, part_sources, used_teachers
from cluster.planning import PlannedCorpus, locked_parts
from cluster.run_context import Run
from cluster.student_step import make_launch
from cluster.students import run_job
from cluster.teachers import teacher_job, trained_model
from distill.export import export_single_head
from precompute.generation import hash_model
from schemas.model_ref import resolve_model
from schemas.recipe import Teacher


@dataclass(frozen=True)
class TeacherModel:
    """A teacher that can be run.

    Attributes:
        path: What ``from_pretrained`` takes.
        revision: Commit on the hub, or None.
    """

    path: str
    revision: str | None = None


def train_teachers(run: Run, planned: Mapping[str, PlannedCorpus]) -> dict[str, TeacherModel]:
    """Returns the model of each teacher that some student uses, training those that want it.

    Raises:
        RecipeError: A model does not exist.
        TrainingError: A training failed.
    """
    models: dict[str, TeacherModel] = {}
    for name in used_teachers(run.recipe):
        teacher = run.recipe.teacher(name)
        if teacher.model is None or (run.options.teachers and name not in run.options.teachers):
            continue
        path = resolve_model(teacher.model, field=f"teachers.{name}.model")
        if teacher.train is None:
            models[name] = TeacherModel(path, teacher.revision)
            continue
        with run.steps.step(f"train teacher {name}") as step:
            trained, step.skipped = _train(run, teacher, path, planned[teacher.train.corpus])
            models[name] = TeacherModel(str(trained))
    return models


def _train(run: Run, teacher: Teacher, path: str, corpus: PlannedCorpus) -> tuple[Path, bool]:
    """Trains one teacher and exports it; returns its directory and whether it was there already."""
    parts = part_sources(locked_parts(corpus.parts, run.recipe.store.shard_rows, {}))
    init_hash = hash_model(path, teacher.revision, run.directory.hash_cache)
    job = teacher_job(run.recipe, teacher, parts, init_hash=init_hash, directory=run.directory)
    job = job.model_copy(update={"threads": run.num_threads})
    target = trained_model(job)
    if target.exists():
        return target, True
    run_job(job, make_launch(run))
    export_single_head(Path(job.output) / MODEL_DIRECTORY, target)
    return target, False
