"""Teachers that tmkd trains itself: with the student's trainer, on golden labels, found by fingerprint."""

from __future__ import annotations

from pathlib import Path

from cluster.arms import training_of
from cluster.run_directory import RunDirectory
from schemas.job import PartSource, StageJob
from schemas.recipe import LayersInit, Recipe, Teacher

TRAINED_MODEL = "model"
TRAINING_DIRECTORY = "train"


def teacher_job(
    recipe: Recipe,
    teacher: Teacher,
    parts: tuple[PartSource, ...],
    *,
    init_hash: str,
    directory: RunDirectory,
) -> StageJob:
    """Makes the job that fine-tunes a teacher; its output lies in a directory named by its fingerprint.

    Raises:
        ValueError: The teacher has no ``train`` block.
    """
    training = teacher.train
    if training is None or teacher.model is None:
        raise ValueError(f"teacher {teacher.name} is not trained by the recipe")
    job = StageJob(
        name=f"teachers/{teacher.name}",
        output="",
        init=LayersInit(
            kind="layers",
            model=teacher.model,
            revision=teacher.revision,
            layers=training.layers,
            overrides=training.overrides,
        ),
        init_hash=init_hash,
        max_length=teacher.max_length,
        labels=recipe.corpora[training.corpus].labels,
        parts=parts,
        alpha=0.0,
        training=training_of(training),
        selection_seed=recipe.seed,
        seed=recipe.seed if training.seed is None else training.seed,
        deepspeed=recipe.deepspeed,
    )
    output = directory.teachers / job.fingerprint()[:16] / TRAINING_DIRECTORY
    return job.model_copy(update={"output": str(output)})


def trained_model(job: StageJob) -> Path:
    """Returns where a trained teacher's single-head checkpoint lies."""
    return Path(job.output).parent / TRAINED_MODEL
