"""Models with their measures on one corpus, and the mean of several of them.

Legend of shapes: N rows, C labels, K models, B bootstrap resamples, S seeds.

Invariants:
    1. All models of a corpus are bootstrapped on the same resamples, so that differences are paired
       (tests/cluster/test_evaluation.py).
    2. A mean row averages measures; it is never an ensemble (tests/cluster/test_evaluation.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np

from cluster.model_outputs import EvaluatedRows, ModelOutput
from cluster.reliability_bins import list_bins, pool_bins
from cluster.resampling import ROW_SEED, interval_of
from distill.metrics import (
    Bools,
    Floats,
    Ints,
    Reliability,
    accuracy,
    agreement,
    area_under_curve,
    bootstrap_means,
    macro_f1,
    mean_reciprocal_rank,
    predict,
    reliability,
)
from schemas.evaluation import NUM_RELIABILITY_BINS, Interval, ModelRow, Over, Ranking


@dataclass(frozen=True, slots=True, eq=False)
class ScoredModel:
    """One model with its measures.

    Attributes:
        predicted_N: Most probable label of each row.
        correct_N: Whether that is the golden one.
        means_B: Accuracy on each resample of the rows.
        row: Its row of the table, as if it were alone in its arm.
    """

    output: ModelOutput
    predicted_N: Ints
    correct_N: Bools
    means_B: Floats
    bins: Reliability
    row: ModelRow


def score_models(rows: EvaluatedRows, models: Sequence[ModelOutput]) -> list[ScoredModel]:
    """Measures every model on the same rows, all of them labelled."""
    predicted = [predict(model.probabilities_NC) for model in models]
    correct = [predicted_N == rows.golden_N for predicted_N in predicted]
    means_BK = bootstrap_means(np.array(correct, dtype=np.float64), ROW_SEED)
    teachers = {
        model.name: predicted_N
        for model, predicted_N in zip(models, predicted, strict=True)
        if model.kind == "teacher"
    }
    seconds = [
        1 / model.examples_per_s for model in models if model.kind == "teacher" and model.examples_per_s
    ]
    teacher_seconds = fmean(seconds) if seconds else None
    scored = []
    for position, model in enumerate(models):
        bins = reliability(model.probabilities_NC, rows.golden_N, NUM_RELIABILITY_BINS)
        row = _make_row(rows, model, predicted[position], bins).model_copy(
            update={
                "accuracy_interval": interval_of(means_BK[:, [position]]),
                "agreement": _agree_with(teachers, model, predicted[position]),
                "speed_ratio": _divide(model.examples_per_s, teacher_seconds),
            }
        )
        scored.append(
            ScoredModel(model, predicted[position], correct[position], means_BK[:, position], bins, row)
        )
    return scored


def average_row(
    members: Sequence[ScoredModel], *, name: str, over: tuple[Over, ...], level: Literal[0, 1]
) -> ModelRow:
    """Returns the mean of several models' measures.

    Args:
        members: Models of one arm, which differ by seed, by teacher, or both.
        name: Of the row.
        over: What they differ by.
        level: Of the row in the table.
    """
    by_seed: dict[int | None, list[ScoredModel]] = defaultdict(list)
    for one in members:
        by_seed[one.output.seed].append(one)
    value, stderr = accuracy(np.mean([one.correct_N for one in members], axis=0))
    per_seed = [fmean(one.row.accuracy for one in same) for same in by_seed.values()]
    means_SB = [np.mean([one.means_B for one in same], axis=0) for same in by_seed.values()]
    rows = [one.row for one in members]
    first = rows[0]
    parameters = _mean_of(rows, lambda row: row.num_parameters)
    return ModelRow(
        name=name,
        kind=first.kind,
        arm=first.arm,
        teacher=None if "teachers" in over else first.teacher,
        seeds=tuple(seed for seed in by_seed if seed is not None),
        over=over,
        level=level,
        accuracy=value,
        accuracy_stderr=stderr,
        accuracy_interval=interval_of(np.stack(means_SB, axis=1)),
        accuracy_std=float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 else None,
        macro_f1=fmean(row.macro_f1 for row in rows),
        ece=fmean(row.ece for row in rows),
        agreement={teacher: fmean(row.agreement[teacher] for row in rows) for teacher in first.agreement},
        num_parameters=None if parameters is None else round(parameters),
        examples_per_s=_mean_rate(rows, lambda row: row.examples_per_s),
        speed_ratio=_mean_rate(rows, lambda row: row.speed_ratio),
        ranking=_average_ranking([row.ranking for row in rows if row.ranking is not None]),
        reliability=list_bins(pool_bins([one.bins for one in members])),
    )


def _make_row(rows: EvaluatedRows, model: ModelOutput, predicted_N: Ints, bins: Reliability) -> ModelRow:
    value, stderr = accuracy(predicted_N == rows.golden_N)
    return ModelRow(
        name=model.name,
        kind=model.kind,
        arm=model.arm,
        teacher=model.teacher,
        seeds=() if model.seed is None else (model.seed,),
        accuracy=value,
        accuracy_stderr=stderr,
        accuracy_interval=Interval(low=value, high=value),
        macro_f1=macro_f1(rows.golden_N, predicted_N, len(rows.labels)),
        ece=bins.ece(),
        num_parameters=model.num_parameters,
        examples_per_s=model.examples_per_s,
        ranking=_rank(rows, model.probabilities_NC),
        reliability=list_bins(bins),
    )


def _agree_with(teachers: Mapping[str, Ints], model: ModelOutput, predicted_N: Ints) -> dict[str, float]:
    """Compares with every teacher but the model itself."""
    return {
        name: agreement(predicted_N, teacher_N)
        for name, teacher_N in teachers.items()
        if not (model.kind == "teacher" and model.name == name)
    }


def _rank(rows: EvaluatedRows, probabilities_NC: Floats) -> Ranking | None:
    if rows.question_N is None:
        return None
    relevant_N = rows.golden_N == 0
    scores_N = probabilities_NC[:, 0]
    mrr, num_questions = mean_reciprocal_rank(scores_N, relevant_N, rows.question_N)
    return Ranking(mrr=mrr, auc=area_under_curve(scores_N, relevant_N), num_questions=num_questions)


def _average_ranking(rankings: Sequence[Ranking]) -> Ranking | None:
    if not rankings:
        return None
    mrrs = [one.mrr for one in rankings if one.mrr is not None]
    aucs = [one.auc for one in rankings if one.auc is not None]
    return Ranking(
        mrr=fmean(mrrs) if mrrs else None,
        auc=fmean(aucs) if aucs else None,
        num_questions=rankings[0].num_questions,
    )


def _mean_of(rows: Sequence[ModelRow], read: Callable[[ModelRow], float | None]) -> float | None:
    """Averages a measure, or returns None where a row lacks it."""
    present = [value for row in rows if (value := read(row)) is not None]
    return fmean(present) if len(present) == len(rows) else None


def _mean_rate(rows: Sequence[ModelRow], read: Callable[[ModelRow], float | None]) -> float | None:
    """Averages a rate over time: the inverse of the mean of the inverses."""
    inverse = _mean_of(rows, lambda row: None if (rate := read(row)) is None else 1 / rate)
    return None if inverse is None else 1 / inverse


def _divide(examples_per_s: float | None, teacher_seconds: float | None) -> float | None:
    """Returns the teachers' mean seconds per example over the model's."""
    if examples_per_s is None or teacher_seconds is None:
        return None
    return teacher_seconds * examples_per_s
