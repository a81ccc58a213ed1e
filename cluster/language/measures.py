"""Scores of positions to the rows of ``evaluation.json``: perplexity, calibration, agreement, differences.

Shapes: R chunks, P positions, K models, B bootstrap resamples, S seeds.

Invariants (tests/cluster/language/test_measures.py):
    1. Every model is measured on the same positions, and bootstrapped on the same resamples of chunks.
    2. A mean row averages measures; it is never an ensemble.
    3. Assembly is a pure function: no clock, no file, fixed bootstrap seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

import numpy as np
import numpy.typing as npt

from cluster.language.evaluated_text import EvaluatedText
from cluster.language.scoring import PositionScores
from cluster.reliability_bins import list_bins, pool_bins
from cluster.resampling import ROW_SEED, interval_of
from distill.metrics import (
    Bools,
    Floats,
    Ints,
    Reliability,
    agreement,
    bin_confidences,
    bootstrap_means,
)
from schemas.errors import DataError
from schemas.evaluation import NUM_RELIABILITY_BINS, Interval
from schemas.language_evaluation import (
    LanguageCorpusEvaluation,
    LanguageModelRow,
    NllComparison,
    SeedDifference,
)

SMALL_SET_CHUNKS = 100


@dataclass(frozen=True, slots=True, eq=False)
class LanguageOutput:
    """One model and its scores on one corpus.

    Attributes:
        name: A teacher's name, or a student's arm.
        seed: None for teachers.
        teachers: Of a student: those that it learnt from.
    """

    name: str
    kind: Literal["teacher", "student"]
    scores: PositionScores
    seed: int | None = None
    teachers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredModel:
    """One model with its measures.

    Attributes:
        nll: Mean negative log-likelihood; infinite where a token has no probability.
        nll_B: The same on each resample of the chunks.
        row: Its row of the table, as if it were alone in its arm.
    """

    output: LanguageOutput
    nll: float
    nll_B: Floats
    bins: Reliability
    row: LanguageModelRow


def measure_models(
    text: EvaluatedText,
    outputs: Sequence[LanguageOutput],
    *,
    main_arm: str | None = None,
    notes: Sequence[str] = (),
) -> LanguageCorpusEvaluation:
    """Measures all models on one corpus.

    Args:
        text: The chunks.
        outputs: At least one: teachers, then students, the seeds of an arm one after another.
        main_arm: The arm of the run's own student.
        notes: What else a reader must know.

    Raises:
        DataError: A model's logits are not numbers where the corpus lets none be left out, or no chunk
            is left.
    """
    is_kept_R = _find_usable(text, outputs)
    counts_R = np.diff(text.bounds)
    is_kept_P = np.repeat(is_kept_R, counts_R)
    measured = _measure(
        [_take(output, is_kept_P) for output in outputs], text.targets_P[is_kept_P], counts_R[is_kept_R]
    )
    num_chunks = int(is_kept_R.sum())
    return LanguageCorpusEvaluation(
        corpus=text.corpus,
        num_chunks=num_chunks,
        num_positions=int(is_kept_P.sum()),
        num_excluded=len(is_kept_R) - num_chunks,
        max_length=text.spec.max_length,
        models=tuple(row for members in _group(measured) for row in _build_rows(members)),
        comparisons=tuple(_compare_students(measured, main_arm)),
        notes=(*_note_small_set(num_chunks), *notes),
    )


def _find_usable(text: EvaluatedText, outputs: Sequence[LanguageOutput]) -> Bools:
    """Returns which chunks count, bool[R]: those for which every model has numbers."""
    is_kept_R = np.ones(len(text.bounds) - 1, np.bool_)
    for output in outputs:
        is_finite_R = np.logical_and.reduceat(output.scores.is_finite_P, text.bounds[:-1])
        if text.on_bad_row == "fail" and not is_finite_R.all():
            first = text.rows.example_ids[int(np.argmin(is_finite_R))]
            raise DataError(
                f"evaluation corpus {text.corpus}: {_describe(output)} gives logits that are not numbers for "
                f"chunk {first}; on_bad_row: exclude leaves such chunks out for every model"
            )
        is_kept_R &= is_finite_R
    if not is_kept_R.any():
        raise DataError(f"evaluation corpus {text.corpus}: no chunk has logits that are numbers")
    return is_kept_R


def _describe(output: LanguageOutput) -> str:
    return f"{output.kind} {output.name}" + ("" if output.seed is None else f" of seed {output.seed}")


def _take(output: LanguageOutput, is_kept_P: Bools) -> LanguageOutput:
    scores = output.scores
    kept = PositionScores(
        target_logprob_P=scores.target_logprob_P[is_kept_P],
        top_logprob_P=scores.top_logprob_P[is_kept_P],
        top_id_P=scores.top_id_P[is_kept_P],
        is_finite_P=scores.is_finite_P[is_kept_P],
        num_parameters=scores.num_parameters,
    )
    return LanguageOutput(output.name, output.kind, kept, output.seed, output.teachers)


def _measure(
    outputs: Sequence[LanguageOutput], targets_P: npt.NDArray[np.int32], counts_R: Ints
) -> list[MeasuredModel]:
    starts_R = np.cumsum(counts_R) - counts_R
    # Rounding may take the logarithm of a certain token a little above 0.
    sums_KR = np.stack(
        [
            np.add.reduceat(np.maximum(-output.scores.target_logprob_P.astype(np.float64), 0.0), starts_R)
            for output in outputs
        ]
    )
    nlls = sums_KR.sum(axis=1) / len(targets_P)
    nll_BK = _resample(sums_KR, counts_R)
    teachers = {output.name: output.scores.top_id_P for output in outputs if output.kind == "teacher"}
    names = _name_models(outputs)
    measured = []
    for place, output in enumerate(outputs):
        scores = output.scores
        hits_P = scores.top_id_P == targets_P
        confidence_P = np.exp(scores.top_logprob_P.astype(np.float64))
        bins = bin_confidences(confidence_P, hits_P, NUM_RELIABILITY_BINS)
        row = LanguageModelRow(
            name=names[output.kind, output.name],
            kind=output.kind,
            arm=output.name if output.kind == "student" else None,
            teachers=output.teachers,
            seeds=() if output.seed is None else (output.seed,),
            nll=_finite(nlls[place]),
            perplexity=_perplexity(nlls[place]),
            perplexity_interval=_perplexity_interval(nll_BK[:, [place]]),
            accuracy=float(hits_P.mean()),
            ece=bins.ece(),
            agreement={
                name: agreement(scores.top_id_P, top_id_P)
                for name, top_id_P in teachers.items()
                if (output.kind, output.name) != ("teacher", name)
            },
            num_parameters=scores.num_parameters,
            reliability=list_bins(bins),
        )
        measured.append(MeasuredModel(output, float(nlls[place]), nll_BK[:, place], bins, row))
    return measured


def _resample(sums_KR: Floats, counts_R: Ints) -> Floats:
    """Returns each model's mean negative log-likelihood on each resample of the chunks, ``[B, K]``."""
    is_finite_K = np.isfinite(sums_KR.sum(axis=1))
    values_KR = np.where(is_finite_K[:, None], sums_KR, 0.0)
    means_BK = bootstrap_means(np.vstack([counts_R.astype(np.float64)[None, :], values_KR]), ROW_SEED)
    # Chunks have different numbers of positions: a resample's mean is over its positions.
    nll_BK: Floats = means_BK[:, 1:] / means_BK[:, :1]
    nll_BK[:, ~is_finite_K] = np.inf
    return nll_BK


def _name_models(outputs: Sequence[LanguageOutput]) -> dict[tuple[str, str], str]:
    """Returns the name of each kind and name's row; an arm may be called like a teacher."""
    teachers = {output.name for output in outputs if output.kind == "teacher"}
    return {
        (output.kind, output.name): f"student {output.name}"
        if output.kind == "student" and output.name in teachers
        else output.name
        for output in outputs
    }


def _group(measured: Sequence[MeasuredModel]) -> list[list[MeasuredModel]]:
    groups: dict[str, list[MeasuredModel]] = {}
    for one in measured:
        groups.setdefault(one.row.name, []).append(one)
    return sorted(groups.values(), key=lambda members: members[0].row.kind == "student")


def _build_rows(members: Sequence[MeasuredModel]) -> list[LanguageModelRow]:
    """Returns an arm's line, and below it those of its seeds where there are several."""
    if len(members) == 1:
        return [members[0].row]
    singles = [
        one.row.model_copy(update={"level": 1, "name": f"{one.row.name}/seed-{one.output.seed}"})
        for one in members
    ]
    return [_average(members), *singles]


def _average(members: Sequence[MeasuredModel]) -> LanguageModelRow:
    rows = [one.row for one in members]
    first = rows[0]
    nll, nll_std = _spread(rows, lambda row: row.nll)
    perplexity, perplexity_std = _spread(rows, lambda row: row.perplexity)
    _, accuracy_std = _spread(rows, lambda row: row.accuracy)
    _, ece_std = _spread(rows, lambda row: row.ece)
    return LanguageModelRow(
        name=first.name,
        kind=first.kind,
        arm=first.arm,
        teachers=first.teachers,
        seeds=tuple(seed for row in rows for seed in row.seeds),
        nll=nll,
        nll_std=nll_std,
        perplexity=perplexity,
        perplexity_interval=_perplexity_interval(np.stack([one.nll_B for one in members], axis=1)),
        perplexity_std=perplexity_std,
        accuracy=fmean(row.accuracy for row in rows),
        accuracy_std=accuracy_std,
        ece=fmean(row.ece for row in rows),
        ece_std=ece_std,
        agreement={name: fmean(row.agreement[name] for row in rows) for name in first.agreement},
        num_parameters=round(fmean(row.num_parameters for row in rows)),
        reliability=list_bins(pool_bins([one.bins for one in members])),
    )


def _spread(
    rows: Sequence[LanguageModelRow], read: Callable[[LanguageModelRow], float | None]
) -> tuple[float | None, float | None]:
    """Returns mean and sample standard deviation of a measure, or None where a row lacks it."""
    values = [value for row in rows if (value := read(row)) is not None]
    return (fmean(values), stdev(values)) if len(values) == len(rows) else (None, None)


def _compare_students(measured: Sequence[MeasuredModel], main_arm: str | None) -> list[NllComparison]:
    """Compares each arm with the first one without teachers, or else with the run's own; the latter first."""
    students = [members for members in _group(measured) if members[0].row.kind == "student"]
    untaught = [members for members in students if not members[0].row.teachers]
    own = [members for members in students if members[0].row.arm == main_arm]
    baseline = next(iter(untaught or own), None)
    if baseline is None:
        return []
    found = [_compare(members, baseline, main_arm) for members in students if members is not baseline]
    return sorted((one for one in found if one), key=lambda one: not one.is_main)


def _compare(
    members: Sequence[MeasuredModel], baseline: Sequence[MeasuredModel], main_arm: str | None
) -> NllComparison | None:
    """Returns None where no seed is common, or a token has no probability."""
    by_seed = {one.output.seed: one for one in baseline}
    pairs = [(one, by_seed[one.output.seed]) for one in members if one.output.seed in by_seed]
    if not pairs or not all(math.isfinite(one.nll) for pair in pairs for one in pair):
        return None
    seeds = tuple(
        SeedDifference(seed=student.output.seed or 0, difference=student.nll - other.nll)
        for student, other in pairs
    )
    return NllComparison(
        student=members[0].row.name,
        baseline=baseline[0].row.name,
        is_main=main_arm is not None and members[0].row.arm == main_arm,
        seeds=seeds,
        mean_difference=fmean(one.difference for one in seeds),
        interval=interval_of(np.stack([student.nll_B - other.nll_B for student, other in pairs], axis=1)),
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _perplexity(nll: float) -> float | None:
    with np.errstate(over="ignore"):
        return _finite(float(np.exp(nll)))


def _perplexity_interval(nll_BS: Floats) -> Interval | None:
    with np.errstate(over="ignore"):
        perplexities_BS = np.exp(nll_BS)
    return interval_of(perplexities_BS) if np.isfinite(perplexities_BS).all() else None


def _note_small_set(num_chunks: int) -> tuple[str, ...]:
    if num_chunks >= SMALL_SET_CHUNKS:
        return ()
    return (f"only {num_chunks:,} chunks: judge differences by their interval, and that with caution",)
