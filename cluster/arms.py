"""Which students an arm has, and the stage jobs of each: pure functions of the recipe and the lock.

Arms (DESIGN section 1): golden; 1-o-1 and tkd (one student per teacher); 1avg-o-1; m-o-1; tmkd.
tkd and tmkd have stage 1, the others start with stage 2. m-o-m trains nothing of its own. golden-long
is golden with as many steps as all stages of tmkd together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.step_count import count_steps
from schemas.errors import DataError
from schemas.job import PartSource, SoftTarget, StageJob, StudentInit
from schemas.recipe import Arm, FinetuneStage, PretrainStage, Recipe, Training
from schemas.records import LockedPart, StoresLock

AVERAGE_HEAD = "average"
MODEL_DIRECTORY = "model"
PER_TEACHER_ARMS: tuple[Arm, ...] = ("1-o-1", "tkd")
TWO_STAGE_ARMS: tuple[Arm, ...] = ("tkd", "tmkd")
UNTAUGHT_ARMS: tuple[Arm, ...] = ("golden", "golden-long")


@dataclass(frozen=True)
class StudentRun:
    """One student to train: an arm, a teacher where the arm has one student per teacher, a seed."""

    arm: Arm
    seed: int
    teacher: str | None = None

    @property
    def name(self) -> str:
        """``tmkd/seed-17`` or ``1-o-1/t1/seed-17``."""
        return "/".join(step for step in (self.arm, self.teacher, f"seed-{self.seed}") if step)


@dataclass(frozen=True)
class Inputs:
    """What the jobs read, as the planning found it.

    Attributes:
        lock: Corpora and stores.
        dropped_rows: From corpus name to the file of its dropped rows.
        init_hash: Of the student's initial weights.
        threads: CPU threads of one rank.
        count_steps: Returns the optimizer steps of a job.
    """

    lock: StoresLock
    dropped_rows: Mapping[str, str]
    init_hash: str | None
    threads: int
    count_steps: Callable[[StageJob], int] = count_steps


def recipe_arms(recipe: Recipe) -> tuple[Arm, ...]:
    """Returns the student's arm and the arms of the comparison, each once."""
    return tuple(dict.fromkeys((recipe.student.arm, *recipe.compare.arms)))


def recipe_seeds(recipe: Recipe) -> tuple[int, ...]:
    """Returns the seeds of every arm."""
    return recipe.compare.seeds or (recipe.seed,)


def student_runs(recipe: Recipe) -> tuple[StudentRun, ...]:
    """Lists the students to train; the first is the run's final student."""
    runs: list[StudentRun] = []
    for arm in recipe_arms(recipe):
        if arm == "m-o-m":
            continue
        teachers = recipe.compare.teachers.get(arm) or taught_by(recipe)
        for seed in recipe.compare.arm_seeds.get(arm) or recipe_seeds(recipe):
            per_teacher = teachers if arm in PER_TEACHER_ARMS else (None,)
            runs += [StudentRun(arm, seed, teacher) for teacher in per_teacher]
    return tuple(runs)


def taught_by(recipe: Recipe) -> tuple[str, ...]:
    """Returns the teachers of the last stage that names any."""
    return next((stage.teachers for stage in reversed(recipe.stages) if stage.teachers), ())


def stages_of(recipe: Recipe, run: StudentRun) -> tuple[PretrainStage | FinetuneStage, ...]:
    """Returns the stages that a student goes through: a stage 1 without its teacher is none."""
    if run.arm in TWO_STAGE_ARMS:
        return tuple(
            stage for stage in recipe.stages if isinstance(stage, FinetuneStage) or teachers_of(stage, run)
        )
    return tuple(stage for stage in recipe.stages if isinstance(stage, FinetuneStage))


def teachers_of(stage: PretrainStage | FinetuneStage, run: StudentRun) -> tuple[str, ...]:
    """Returns the teachers that a student has in a stage."""
    if run.arm in UNTAUGHT_ARMS:
        return ()
    if run.teacher is not None:
        return tuple(name for name in stage.teachers if name == run.teacher)
    return stage.teachers


def used_teachers(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """Returns, for each teacher that some student uses, the corpora whose stores that needs."""
    found: dict[str, dict[str, None]] = {}
    for run in student_runs(recipe):
        for stage in stages_of(recipe, run):
            for name in teachers_of(stage, run):
                found.setdefault(name, {})[stage.corpus] = None
    judged = [name for name in taught_by(recipe) if name in found]
    main = recipe.stages[-1].corpus
    for corpus in recipe.evaluation.corpora:
        if set(recipe.corpora[corpus].labels) == set(recipe.corpora[main].labels):
            for name in judged:
                found[name][corpus] = None
    return {name: tuple(corpora) for name, corpora in found.items()}


def stage_jobs(recipe: Recipe, run: StudentRun, inputs: Inputs, students: Path) -> tuple[StageJob, ...]:
    """Makes the jobs of one student, stage after stage; each but the first starts from the one before.

    Args:
        recipe: The recipe.
        run: The student.
        inputs: What planning found.
        students: Directory of all students.

    Raises:
        DataError: A corpus or a store is not in the lock.
    """
    if run.arm == "golden-long":
        return _lengthen(recipe, run, inputs, students)
    jobs: list[StageJob] = []
    directory = students / run.name
    for position, stage in enumerate(stages_of(recipe, run), start=1):
        init = recipe.student.init if not jobs else _continue_from(jobs[-1])
        teachers = teachers_of(stage, run)
        parts = _locked_parts(inputs.lock, stage.corpus)
        jobs.append(
            StageJob(
                name=f"{run.name}/stage-{position}",
                output=str(directory / f"stage-{position}-{stage.kind}"),
                init=init,
                init_hash=inputs.init_hash if not jobs else None,
                max_length=recipe.student.max_length,
                labels=recipe.corpora[stage.corpus].labels,
                parts=part_sources(parts),
                dropped_rows=inputs.dropped_rows.get(stage.corpus),
                soft_targets=_soft_targets(run.arm, teachers, stage.corpus, parts),
                label_maps={name: recipe.teacher(name).label_map for name in teachers},
                alpha=_alpha(stage, teachers),
                soft_loss=stage.soft_loss,
                temperature=stage.temperature,
                training=training_of(stage, teachers),
                selection_seed=recipe.seed,
                seed=run.seed,
                deepspeed=recipe.deepspeed if recipe.student.deepspeed is None else recipe.student.deepspeed,
                threads=inputs.threads,
            )
        )
    return tuple(jobs)


def _lengthen(recipe: Recipe, run: StudentRun, inputs: Inputs, students: Path) -> tuple[StageJob, ...]:
    """Gives the last stage of the untaught student the steps that it lacks against tmkd's."""
    reference = stage_jobs(recipe, replace(run, arm="tmkd"), inputs, students)
    jobs = stage_jobs(recipe, replace(run, arm="golden"), inputs, students)
    num_steps = sum(map(inputs.count_steps, reference)) - sum(map(inputs.count_steps, jobs[:-1]))
    training = jobs[-1].training.model_copy(update={"max_steps": num_steps})
    directory = students / run.name
    renamed: list[StageJob] = []
    for job in (*jobs[:-1], jobs[-1].model_copy(update={"training": training})):
        stage = job.name.rsplit("/", 1)[-1]
        changes = {"name": f"{run.name}/{stage}", "output": str(directory / Path(job.output).name)}
        init = {"init": _continue_from(renamed[-1])} if renamed else {}
        renamed.append(job.model_copy(update={**changes, **init}))
    return tuple(renamed)


def part_sources(parts: Sequence[LockedPart]) -> tuple[PartSource, ...]:
    """Turns locked parts into the trainer's."""
    return tuple(
        PartSource(
            rows=part.rows,
            fingerprint=part.fingerprint,
            plan_hash=part.plan_hash,
            num_rows=part.num_rows,
            labels_hash=part.labels_hash,
            shard_rows=part.shard_rows,
        )
        for part in parts
    )


def training_of(stage: Training, teachers: Sequence[str] = ()) -> Training:
    """Returns a stage's training fields alone.

    A student without teachers has no soft loss to select by; it takes the default metric.
    """
    fields = {name: getattr(stage, name) for name in Training.model_fields}
    if not teachers and stage.metric == "soft_loss":
        fields["metric"] = None
    return Training.model_validate(fields)


def _alpha(stage: PretrainStage | FinetuneStage, teachers: Sequence[str]) -> float:
    if not teachers:
        return 0.0
    return stage.alpha if isinstance(stage, FinetuneStage) else 1.0


def _locked_parts(lock: StoresLock, corpus: str) -> tuple[LockedPart, ...]:
    if corpus not in lock.corpora:
        raise DataError(
            f"corpus {corpus} is not in the run's lock; run `tmkd precompute` with this recipe first"
        )
    return lock.corpora[corpus]


def _soft_targets(
    arm: Arm, teachers: Sequence[str], corpus: str, parts: Sequence[LockedPart]
) -> tuple[SoftTarget, ...]:
    for part in parts:
        missing = [name for name in teachers if name not in part.stores]
        if missing:
            raise DataError(
                f"there is no store of teacher {missing[0]} over {corpus}/{part.part}; run `tmkd precompute` "
                "with this recipe first"
            )
    stores = {name: tuple(part.stores[name] for part in parts) for name in teachers}
    if arm == "1avg-o-1" and teachers:
        return (
            SoftTarget(
                head=AVERAGE_HEAD, teachers=tuple(teachers), stores=tuple(stores[name] for name in teachers)
            ),
        )
    return tuple(SoftTarget(head=name, teachers=(name,), stores=(stores[name],)) for name in teachers)


def _continue_from(job: StageJob) -> StudentInit:
    return StudentInit(
        kind="student", path=str(Path(job.output) / MODEL_DIRECTORY), fingerprint=job.fingerprint()
    )
