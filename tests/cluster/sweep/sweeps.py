"""Made-up sweeps for the tests of the table and the page, scored by the real evaluation."""

from __future__ import annotations

from functools import cache

import numpy as np

from cluster.evaluation import evaluate_models
from cluster.model_outputs import EvaluatedRows, ModelOutput, student_name
from schemas.evaluation import Comparison, DroppedRows, Interval, RunEvaluation, SeedComparison
from schemas.recipe import Arm
from schemas.sweep import GridPoint, Published
from schemas.sweep_evaluation import (
    DisagreedRow,
    PointComparison,
    PointEvaluation,
    SweepCost,
    SweepEvaluation,
    SweepStudent,
)
from tests.cluster.evaluations import predictions

NUM_ROWS = 600
TEACHERS = ("teacher-a", "teacher-b", "teacher-c")
SKILLS: dict[Arm, float] = {
    "tmkd": 0.80,
    "golden": 0.76,
    "golden-long": 0.77,
    "1-o-1": 0.775,
    "1avg-o-1": 0.78,
    "m-o-1": 0.785,
}
PUBLISHED = Published(
    source="Yang et al., WSDM 2020, table 4",
    num_rows=277,
    accuracy={
        "teacher": 68.23,
        "golden": 57.42,
        "1-o-1": 55.23,
        "m-o-m": 57.40,
        "m-o-1": 59.92,
        "tmkd": 66.64,
        "TMKD large": 67.50,
    },
    examples_per_s={"teacher": 16, "tmkd": 217},
    note="their student has three layers of BERT",
)
COST = SweepCost(
    num_teachers=3,
    teacher_training_s=541.0,
    teacher_forward_s=128.0,
    num_stores=6,
    store_bytes=1_234_567,
    student_s=3930.0,
    num_students=24,
    num_taught=18,
    resident_s=9800.0,
    elapsed_s=4711.0,
)


def alpha_point(alpha: float | str) -> GridPoint:
    return GridPoint(coordinates={"stages.1.alpha": str(alpha)}, overrides={"stages.1.alpha": alpha})


@cache
def score_point(
    *,
    teachers: tuple[str, ...] = TEACHERS,
    seeds: tuple[int, ...] = (1, 2, 3),
    boost: float = 0.0,
    has_speed: bool = True,
    lost: tuple[tuple[Arm, int], ...] = (),
) -> RunEvaluation:
    """Scores teachers at about 0.85 and students of every arm on 600 rows.

    Args:
        teachers: Their names.
        seeds: Of every arm.
        boost: Added to the taught arms' skill.
        has_speed: Whether speeds were measured.
        lost: Students that failed.
    """
    rng = np.random.default_rng(0)
    golden = rng.integers(0, 2, NUM_ROWS)
    difficulty = rng.random(NUM_ROWS)
    outputs = [
        ModelOutput(
            name=name,
            kind="teacher",
            teacher=name,
            probabilities_NC=predictions(rng, golden, difficulty, 0.84 + 0.01 * position),
            num_parameters=110_000_000,
            examples_per_s=95.0 + position if has_speed else None,
        )
        for position, name in enumerate(teachers)
    ]
    for arm, skill in SKILLS.items():
        skill += 0.0 if arm.startswith("golden") else boost
        for teacher in teachers if arm == "1-o-1" else (None,):
            outputs += [
                ModelOutput(
                    name=student_name(arm, teacher),
                    kind="student",
                    arm=arm,
                    teacher=teacher,
                    seed=seed,
                    probabilities_NC=predictions(rng, golden, difficulty, skill),
                    num_parameters=12_065_282,
                    examples_per_s=780.0 if has_speed else None,
                )
                for seed in seeds
                if (arm, seed) not in lost
            ]
    rows = EvaluatedRows("dev", ("entailment", "not_entailment"), golden)
    corpus = evaluate_models(rows, outputs, main_arm="tmkd")
    dropped = (DroppedRows(corpus="train", num_rows=9000, num_dropped=12),)
    return RunEvaluation(run="example", main_arm="tmkd", corpora=(corpus,), dropped=dropped)


def list_students(
    point: GridPoint, seeds: tuple[int, ...], lost: tuple[tuple[Arm, int], ...]
) -> list[SweepStudent]:
    """Lists the students of ``score_point``; the first stage of tmkd is shared between points."""
    students = []
    for arm in SKILLS:
        for teacher in TEACHERS if arm == "1-o-1" else (None,):
            for seed in seeds:
                is_lost = (arm, seed) in lost
                directory = f"students/{point.name}/{student_name(arm, teacher)}/seed-{seed}"
                stages = [f"{directory}/stage-1-finetune"]
                if arm == "tmkd":
                    stages = [
                        f"students/shared/seed-{seed}/stage-1-pretrain",
                        f"{directory}/stage-2-finetune",
                    ]
                students.append(
                    SweepStudent(
                        point=point.name,
                        arm=arm,
                        teacher=teacher,
                        seed=seed,
                        state="failed" if is_lost else "trained",
                        error="out of memory [red]here[/red] <b>" if is_lost else None,
                        stages=tuple(stages),
                        seconds=60.0,
                        fingerprint=f"{point.name}{arm}{teacher}{seed}",
                    )
                )
    return students


def list_disagreements() -> tuple[DisagreedRow, ...]:
    """Lists rows of all three kinds, with a hostile and a long text."""
    return (
        DisagreedRow(
            example_id="dev/17",
            texts=("A man [red]is[/red] here. <script>alert(1)</script>", "Somebody is here."),
            golden="entailment",
            teachers=("not_entailment", 0.97),
            student=("entailment", 0.88),
        ),
        DisagreedRow(
            example_id="dev/21",
            texts=("The river runs through the town. " * 40, "w" * 300),
            golden="entailment",
            teachers=("entailment", 0.99),
            student=("not_entailment", 0.61),
        ),
        DisagreedRow(
            example_id="dev/33",
            texts=("Of three labels both are wrong.",),
            golden="neither",
            teachers=("entailment", 0.55),
            student=("not_entailment", 0.7),
        ),
    )


def compare_points(reference: GridPoint, point: GridPoint, arm: Arm, gain: float) -> PointComparison:
    seeds = tuple(
        SeedComparison(seed=seed, only_student=30, only_baseline=20, p_value=0.2, difference=gain)
        for seed in (1, 2, 3)
    )
    comparison = Comparison(
        student=arm,
        baseline=arm,
        is_main=False,
        seeds=seeds,
        mean_difference=gain,
        interval=Interval(low=gain - 0.013, high=gain + 0.011),
    )
    return PointComparison(arm=arm, point=point.name, reference=reference.name, comparison=comparison)


def make_sweep(
    *,
    teachers: tuple[str, ...] = TEACHERS,
    seeds: tuple[int, ...] = (1, 2, 3),
    alphas: tuple[float, ...] = (),
    has_speed: bool = True,
    published: Published | None = PUBLISHED,
    lost: tuple[tuple[Arm, int], ...] = (),
) -> SweepEvaluation:
    """Returns a sweep of one point, or of one per alpha; of the last point the students ``lost`` failed."""
    grid = [alpha_point(alpha) for alpha in alphas] or [GridPoint()]
    points, students = [], []
    for position, point in enumerate(grid):
        failed = lost if point is grid[-1] else ()
        evaluation = score_point(
            teachers=teachers, seeds=seeds, boost=0.01 * position, has_speed=has_speed, lost=failed
        )
        missing: dict[str, tuple[int, ...]] = {}
        for arm, seed in failed:
            missing[arm] = (*missing.get(arm, ()), seed)
        points.append(
            PointEvaluation(
                point=point,
                main_arm="tmkd",
                evaluation=evaluation,
                disagreements=list_disagreements(),
                missing_seeds=missing,
            )
        )
        students += list_students(point, seeds, failed)
    across = [
        compare_points(grid[0], point, arm, 0.012 * position if arm == "tmkd" else 0.0)
        for position, point in enumerate(grid)
        for arm in ("tmkd", "golden")
        if position
    ]
    return SweepEvaluation(
        sweep="example",
        recipe="rte.yaml",
        size="smoke",
        seeds=seeds,
        baseline="golden",
        points=tuple(points),
        across=tuple(across),
        students=tuple(students),
        cost=COST,
        published=published,
    )
