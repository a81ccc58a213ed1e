"""A made-up run for the tests of the table and the report."""

from __future__ import annotations

from functools import cache

import numpy as np

from cluster.evaluation import evaluate_models
from cluster.model_outputs import EvaluatedRows, ModelOutput, student_name
from schemas.evaluation import DroppedRows, RunEvaluation
from schemas.recipe import Arm

NUM_ROWS = 1200
TEACHERS = ("teacher-a", "teacher-b", "teacher-c")


@cache
def make_evaluation(
    *, teachers: tuple[str, ...] = TEACHERS, seeds: tuple[int, ...] = (1, 2, 3), num_labels: int = 2
) -> RunEvaluation:
    """Returns teachers at about 0.85, students at about 0.75 to 0.8, with questions of six rows."""
    rng = np.random.default_rng(0)
    golden = rng.integers(0, num_labels, NUM_ROWS)
    rows = EvaluatedRows(
        "dev", tuple("abcdefgh"[:num_labels]), golden, np.repeat(np.arange(NUM_ROWS // 6), 6), num_excluded=2
    )
    difficulty = rng.random(NUM_ROWS)
    outputs = [
        ModelOutput(
            name=name,
            kind="teacher",
            teacher=name,
            probabilities_NC=predictions(rng, golden, difficulty, 0.85),
            num_parameters=22_713_216,
            examples_per_s=95.0,
        )
        for name in teachers
    ]
    arms: list[tuple[Arm, str | None, float]] = [("tmkd", None, 0.80), ("golden", None, 0.77)]
    arms += [("1-o-1", name, 0.78) for name in teachers]
    for arm, teacher, skill in arms:
        for seed in seeds:
            outputs.append(
                ModelOutput(
                    name=student_name(arm, teacher),
                    kind="student",
                    arm=arm,
                    teacher=teacher,
                    seed=seed,
                    probabilities_NC=predictions(rng, golden, difficulty, skill),
                    num_parameters=12_065_282,
                    examples_per_s=310.0,
                )
            )
    corpus = evaluate_models(rows, outputs, main_arm="tmkd", notes=("a note <b>of</b> the test",))
    dropped = (DroppedRows(corpus="train", num_rows=9000, num_dropped=12),)
    return RunEvaluation(run="example", main_arm="tmkd", corpora=(corpus,), dropped=dropped)


def predictions(
    rng: np.random.Generator, golden: np.ndarray, difficulty: np.ndarray, skill: float
) -> np.ndarray:
    """Returns distributions that are right on about ``skill`` of the rows, mostly the easy ones."""
    num_labels = int(golden.max()) + 1
    right = difficulty + rng.normal(0, 0.1, len(golden)) < skill
    label = np.where(right, golden, (golden + 1) % num_labels)
    logits = rng.normal(0, 0.3, (len(golden), num_labels))
    logits[np.arange(len(golden)), label] += 1.5 + rng.random(len(golden)) * 2
    exponentials = np.exp(logits)
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))
