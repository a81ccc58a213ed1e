"""Which students a language recipe has, and the stage jobs of each: pure functions of recipe and lock.

The recipe's own student is the arm ``student``; every arm of ``compare`` goes through the same stages with
teachers and losses of its own.

Invariants (tests/cluster/language/test_arms.py):
    1. Each stage but the first starts from the one before; a job names no teacher's model.
    2. Two arms with the same losses and stores have jobs of the same fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.arms import MODEL_DIRECTORY, part_sources
from schemas.chunks import ChunkSpec
from schemas.errors import DataError
from schemas.job import LanguageJob, StudentInit, TokenTeacher
from schemas.language import (
    MAIN_ARM,
    LanguageConfigInit,
    LanguageLayersInit,
    LanguageRecipe,
    LanguageStage,
)
from schemas.records import LockedPart, StoresLock


@dataclass(frozen=True)
class LanguageRun:
    """One student to train: an arm and a seed."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        """``student/seed-17``."""
        return f"{self.arm}/seed-{self.seed}"


@dataclass(frozen=True)
class FinishedLanguageStudent:
    """A student whose last stage is complete.

    Attributes:
        directory: Of its model, in the layout of plain transformers, tokenizer included.
        fingerprint: Of its last stage's job.
    """

    run: LanguageRun
    directory: Path
    fingerprint: str


@dataclass(frozen=True)
class LanguageInputs:
    """What the jobs read, as the planning found it.

    Attributes:
        lock: Corpora and stores.
        chunks: What made the chunks of each corpus.
        dropped_rows: From corpus name to the file of its dropped rows.
        init: The student's, its models as directories.
        init_hash: Of the initial weights.
        threads: CPU threads of one rank.
    """

    lock: StoresLock
    chunks: Mapping[str, ChunkSpec]
    dropped_rows: Mapping[str, str]
    init: LanguageLayersInit | LanguageConfigInit
    init_hash: str | None
    threads: int


def student_runs(recipe: LanguageRecipe) -> tuple[LanguageRun, ...]:
    """Lists the students to train; the first is the run's final student."""
    arms = (MAIN_ARM, *(arm.name for arm in recipe.compare.arms))
    seeds = recipe.compare.seeds or (recipe.seed,)
    return tuple(LanguageRun(arm, seed) for arm in arms for seed in seeds)


def stages_of(recipe: LanguageRecipe, arm: str) -> tuple[LanguageStage, ...]:
    """Returns the stages that the students of an arm go through, with its teachers and losses."""
    if arm == MAIN_ARM:
        return recipe.stages
    changes = next(each for each in recipe.compare.arms if each.name == arm)
    return tuple(
        stage.model_copy(update={"teachers": changes.teachers, "losses": changes.losses})
        for stage in recipe.stages
    )


def used_teachers(recipe: LanguageRecipe) -> dict[str, tuple[str, ...]]:
    """Returns, for each teacher that some student uses, the corpora whose stores that needs."""
    found: dict[str, dict[str, None]] = {}
    for arm in dict.fromkeys(run.arm for run in student_runs(recipe)):
        for stage in stages_of(recipe, arm):
            for name in stage.teachers:
                found.setdefault(name, {})[stage.corpus] = None
    return {name: tuple(corpora) for name, corpora in found.items()}


def stage_jobs(
    recipe: LanguageRecipe, run: LanguageRun, inputs: LanguageInputs, students: Path
) -> tuple[LanguageJob, ...]:
    """Makes the jobs of one student, stage after stage.

    Args:
        recipe: The recipe.
        run: The student.
        inputs: What planning found.
        students: Directory of all students.

    Raises:
        DataError: A corpus or a store is not in the lock.
    """
    jobs: list[LanguageJob] = []
    for position, stage in enumerate(stages_of(recipe, run.arm), start=1):
        parts = inputs.lock.corpora.get(stage.corpus, ())
        if not parts:
            raise DataError(
                f"corpus {stage.corpus} is not in the run's lock; run `tmkd precompute` with this recipe "
                "first"
            )
        chunks = inputs.chunks[stage.corpus]
        jobs.append(
            LanguageJob(
                name=f"{run.name}/stage-{position}",
                output=str(students / run.name / f"stage-{position}"),
                init=_continue_from(jobs[-1]) if jobs else inputs.init,
                init_hash=None if jobs else inputs.init_hash,
                objective=recipe.objective,
                tokenizer=chunks.tokenizer,
                vocab=chunks.vocab,
                max_length=recipe.student.max_length,
                pack=recipe.student.pack,
                parts=part_sources(parts),
                dropped_rows=inputs.dropped_rows.get(stage.corpus),
                teachers=_token_teachers(recipe, stage, parts),
                training=stage,
                selection_seed=recipe.seed,
                seed=run.seed,
                deepspeed=recipe.deepspeed,
                threads=inputs.threads,
            )
        )
    return tuple(jobs)


def finish(run: LanguageRun, job: LanguageJob) -> FinishedLanguageStudent:
    """Says where the student of a last stage's job lies."""
    return FinishedLanguageStudent(run, Path(job.output) / MODEL_DIRECTORY, job.fingerprint())


def _token_teachers(
    recipe: LanguageRecipe, stage: LanguageStage, parts: tuple[LockedPart, ...]
) -> tuple[TokenTeacher, ...]:
    for part in parts:
        missing = [name for name in stage.teachers if name not in part.stores]
        if missing:
            raise DataError(
                f"there is no store of teacher {missing[0]} over {stage.corpus}/{part.part}; run "
                "`tmkd precompute` with this recipe first"
            )
    return tuple(
        TokenTeacher(
            name=name,
            weight=recipe.teacher(name).weight,
            stores=tuple(part.stores[name] for part in parts),
        )
        for name in stage.teachers
    )


def _continue_from(job: LanguageJob) -> StudentInit:
    return StudentInit(
        kind="student", path=str(Path(job.output) / MODEL_DIRECTORY), fingerprint=job.fingerprint()
    )
