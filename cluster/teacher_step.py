"""The teachers of a run: those with a ``train`` block are fine-tuned first, once per fingerprint."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from cluster.arms import MODEL_DIRECTORY, part_sources, used_teachers
from cluster.cost_log import CostLog
from cluster.planning import PlannedCorpus
from cluster.run_context import Run
from cluster.run_directory import RunDirectory
from cluster.stores_lock import locked_parts
from cluster.student_step import make_launch
from cluster.students import run_job
from cluster.teacher_model import TeacherModel
from cluster.teachers import teacher_job, trained_model
from distill.export import export_single_head
from precompute.generation import hash_model
from schemas.job import StageJob
from schemas.model_ref import resolve_model
from schemas.recipe import Recipe, Teacher


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


def describe_training(
    recipe: Recipe, directory: RunDirectory, teacher: Teacher, path: str, corpus: PlannedCorpus
) -> tuple[StageJob, Path]:
    """Returns the job that trains a teacher, and where its exported model lies once that is done.

    Args:
        recipe: The recipe.
        directory: Of its run.
        teacher: A teacher with a ``train`` block.
        path: Its initial model.
        corpus: What it is trained on.
    """
    parts = part_sources(locked_parts(corpus.parts, recipe.store.shard_rows, {}))
    init_hash = hash_model(path, teacher.revision, directory.hash_cache)
    job = teacher_job(recipe, teacher, parts, init_hash=init_hash, directory=directory)
    return job, trained_model(job)


def _train(run: Run, teacher: Teacher, path: str, corpus: PlannedCorpus) -> tuple[Path, bool]:
    """Trains one teacher and exports it; returns its directory and whether it was there already."""
    job, target = describe_training(run.recipe, run.directory, teacher, path, corpus)
    if target.exists():
        return target, True
    began_s = time.monotonic()
    run_job(job.model_copy(update={"threads": run.num_threads}), make_launch(run))
    export_single_head(Path(job.output) / MODEL_DIRECTORY, target)
    CostLog.open(run.directory.costs).add("teachers", {target.parent.name: time.monotonic() - began_s})
    return target, False
