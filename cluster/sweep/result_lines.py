"""The lines of a sweep's results on one corpus: ours, each with the publication's beside it, and its own.

Invariants (tests/cluster/sweep/test_table.py):
    1. Every figure of the publication occurs exactly once: beside our line of its name, or on its own.
    2. An arm whose students all failed has a line nevertheless.
    3. A gain has an interval only where the evaluation compared the two on the same rows and seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from schemas.evaluation import Comparison, CorpusEvaluation, ModelRow
from schemas.sweep import Published
from schemas.sweep_evaluation import PointEvaluation, SweepEvaluation

PUBLISHED_TEACHER = "teacher"


@dataclass(frozen=True)
class ResultLine:
    """One line of the results.

    Attributes:
        name: A model's, an arm's, or the publication's own.
        label: As it is shown: below its arm, a teacher's student has the teacher's name alone.
        row: Our measures; None where only the publication has some, or all students failed.
        comparison: With the baseline; None where there is none.
        gain: Accuracy over the baseline's, as a share; None where the two cannot be compared.
        published_accuracy: As a share.
        published_gain: Over the publication's own baseline, as a share.
        missing_seeds: Seeds that the line lacks, since a student failed.
        is_main: Whether it is the recipe's own student.
        is_baseline: Whether it is the baseline.
    """

    name: str
    label: str
    row: ModelRow | None = None
    comparison: Comparison | None = None
    gain: float | None = None
    published_accuracy: float | None = None
    published_gain: float | None = None
    missing_seeds: tuple[int, ...] = ()
    is_main: bool = False
    is_baseline: bool = False

    @property
    def is_published_only(self) -> bool:
        """Whether nothing of ours stands on it."""
        return self.row is None and not self.missing_seeds


def list_lines(sweep: SweepEvaluation, point: PointEvaluation, corpus: CorpusEvaluation) -> list[ResultLine]:
    """Lists teachers, the publication's teacher, the ensemble, the arms, and the publication's own lines.

    Args:
        sweep: The whole.
        point: Of whose evaluation ``corpus`` is one.
        corpus: What to show; the publication's figures are about the first one of the point.
    """
    is_main_corpus = point.evaluation is not None and corpus.corpus == point.evaluation.corpora[0].corpus
    published = sweep.published if is_main_corpus else None
    ours = _list_ours(sweep, point, corpus, published)
    if published is None:
        return ours
    beside = {line.name for line in ours if line.published_accuracy is not None}
    theirs = [
        _published_line(name, sweep.baseline, published) for name in published.accuracy if name not in beside
    ]
    teachers = sum(line.row is not None and line.row.kind == "teacher" for line in ours)
    first = [line for line in theirs if line.name == PUBLISHED_TEACHER]
    last = [line for line in theirs if line.name != PUBLISHED_TEACHER]
    return [*ours[:teachers], *first, *ours[teachers:], *last]


def list_headlines(sweep: SweepEvaluation, point: PointEvaluation) -> list[ResultLine]:
    """Lists the main arm's line and the baseline's on the main corpus; empty where there is no result."""
    if point.evaluation is None or not point.evaluation.corpora:
        return []
    lines = list_lines(sweep, point, point.evaluation.corpora[0])
    chosen = [line for line in lines if line.is_main or line.is_baseline]
    return sorted(chosen, key=lambda line: line.is_baseline and not line.is_main)


def further_comparisons(sweep: SweepEvaluation, corpus: CorpusEvaluation) -> list[Comparison]:
    """Lists the comparisons with another arm than the sweep's baseline, such as the longer training."""
    return [one for one in corpus.comparisons if one.baseline != sweep.baseline]


def _list_ours(
    sweep: SweepEvaluation, point: PointEvaluation, corpus: CorpusEvaluation, published: Published | None
) -> list[ResultLine]:
    comparisons = {one.student: one for one in corpus.comparisons if one.baseline == sweep.baseline}
    baseline = next((row for row in corpus.models if row.arm == sweep.baseline and row.level == 0), None)
    lines = []
    for row in corpus.models:
        if row.level == 2:
            continue
        comparison = comparisons.get(row.name)
        line = ResultLine(
            name=row.name,
            label=row.teacher if row.level == 1 and row.teacher else row.name,
            row=row,
            comparison=comparison,
            gain=comparison.mean_difference if comparison else None,
            is_main=row.level == 0 and row.arm == point.main_arm,
            is_baseline=row is baseline,
        )
        lines.append(_with_published(line, sweep.baseline, published) if row.level == 0 else line)
    return list(_mark_missing(lines, point, sweep.baseline, published))


def _mark_missing(
    lines: Sequence[ResultLine], point: PointEvaluation, baseline: str, published: Published | None
) -> Iterator[ResultLine]:
    missing: Mapping[str, tuple[int, ...]] = {
        arm: seeds for arm, seeds in point.missing_seeds.items() if seeds
    }
    for line in lines:
        is_arm = line.row is not None and line.row.level == 0
        yield replace(line, missing_seeds=missing.get(line.name, ())) if is_arm else line
    shown = {line.name for line in lines}
    for arm, seeds in missing.items():
        if arm not in shown:
            lost = ResultLine(
                arm,
                arm,
                missing_seeds=seeds,
                is_main=arm == point.main_arm,
                is_baseline=arm == baseline,
            )
            yield _with_published(lost, baseline, published)


def _with_published(line: ResultLine, baseline: str, published: Published | None) -> ResultLine:
    if published is None or line.name not in published.accuracy:
        return line
    theirs = _published_line(line.name, baseline, published)
    return replace(line, published_accuracy=theirs.published_accuracy, published_gain=theirs.published_gain)


def _published_line(name: str, baseline: str, published: Published) -> ResultLine:
    reference = published.accuracy.get(baseline)
    accuracy = published.accuracy[name]
    has_gain = reference is not None and name not in (baseline, PUBLISHED_TEACHER)
    return ResultLine(
        name,
        name,
        published_accuracy=accuracy / 100,
        published_gain=(accuracy - reference) / 100 if has_gain and reference is not None else None,
    )
