"""What a language run found, in a few sentences that claim no more than the numbers do."""

from __future__ import annotations

import math
from statistics import fmean

from cluster.figures import format_count, format_percent
from cluster.language.figures import format_interval, format_nats, format_perplexity, position_noun
from schemas.language import MAIN_ARM
from schemas.language_evaluation import (
    LanguageCorpusEvaluation,
    LanguageModelRow,
    LanguageRunEvaluation,
    NllComparison,
)

# Nats a token below which a share of the gap between teacher and untaught student says nothing.
_MIN_GAP = 0.01
# Nats a token that would be written as 0.000.
_MIN_DIFFERENCE = 0.0005


def summarise_language(evaluation: LanguageRunEvaluation) -> list[str]:
    """Returns sentences about the main corpus: the student, the untaught one, the teachers, its size."""
    if not evaluation.corpora:
        return []
    corpus = evaluation.corpora[0]
    where = f"On {corpus.corpus} ({corpus.num_positions:,} {position_noun(evaluation.objective)})"
    student = find_language_student(corpus, evaluation.main_arm)
    if student is None:
        return [f"{where} no student was evaluated."]
    comparison = next((one for one in corpus.comparisons if one.student == student.name), None)
    return [
        _describe_student(where, student),
        *([_describe_gain(corpus, comparison)] if comparison else []),
        *_describe_teachers(corpus, student),
        *_describe_size(corpus, student),
    ]


def find_language_student(corpus: LanguageCorpusEvaluation, main_arm: str | None) -> LanguageModelRow | None:
    """Returns the row of the run's own student, or else of the first one."""
    students = [row for row in corpus.models if row.kind == "student" and row.level == 0]
    return next((row for row in students if row.arm == main_arm), students[0] if students else None)


def untaught_arms(evaluation: LanguageRunEvaluation) -> frozenset[str]:
    """Returns the arms that learnt from the text alone."""
    return frozenset(
        row.arm for corpus in evaluation.corpora for row in corpus.models if row.arm and not row.teachers
    )


def _describe_student(where: str, student: LanguageModelRow) -> str:
    seeds = f", the mean of {len(student.seeds)} seeds" if len(student.seeds) > 1 else ""
    interval = (
        f"95 % interval {format_interval(student.perplexity_interval)}"
        if student.perplexity_interval
        else "beyond what a number holds"
    )
    learnt = "" if student.teachers else ", which learnt from the text alone,"
    # The run's own arm is called so.
    name = "" if student.name == MAIN_ARM else f" {student.name}"
    return (
        f"{where} the student{name}{learnt} has a perplexity of "
        f"{format_perplexity(student.perplexity)} ({interval}{seeds})."
    )


def _describe_gain(corpus: LanguageCorpusEvaluation, comparison: NllComparison) -> str:
    baseline = next(row for row in corpus.models if row.name == comparison.baseline)
    interval = comparison.interval
    difference = format_nats(comparison.mean_difference)
    if abs(comparison.mean_difference) < _MIN_DIFFERENCE:
        verdict = "which is next to nothing"
    elif interval.high < 0:
        verdict = "so distillation helped here"
    elif interval.low > 0:
        verdict = "so distillation did harm here"
    else:
        verdict = "which includes zero, so this run shows no effect of distillation"
    return (
        f"The same student trained on the text alone ({baseline.name}) reaches "
        f"{format_perplexity(baseline.perplexity)}: a difference of {difference} "
        f"nats a token, with a 95 % interval from {format_nats(interval.low)} to "
        f"{format_nats(interval.high)}, {verdict}."
    )


def _describe_teachers(corpus: LanguageCorpusEvaluation, student: LanguageModelRow) -> list[str]:
    teachers = [row for row in corpus.models if row.kind == "teacher"]
    if not teachers:
        return []
    low, high = (format_perplexity(bound) for bound in _range_of(teachers))
    reach = low if low == high else f"{low} to {high}"
    verb = "teacher has" if len(teachers) == 1 else "teachers have"
    return [f"The {verb} {reach}{_describe_gap(corpus, student, teachers)}."]


def _range_of(rows: list[LanguageModelRow]) -> tuple[float | None, float | None]:
    """Returns the lowest and highest perplexity; None is infinity."""
    ordered = sorted((row.perplexity for row in rows), key=lambda value: math.inf if value is None else value)
    return ordered[0], ordered[-1]


def _describe_gap(
    corpus: LanguageCorpusEvaluation, student: LanguageModelRow, teachers: list[LanguageModelRow]
) -> str:
    untaught = next(
        (row for row in corpus.models if row.kind == "student" and row.level == 0 and not row.teachers), None
    )
    nlls = [row.nll for row in teachers if row.nll is not None]
    if untaught is None or untaught is student or untaught.nll is None or student.nll is None or not nlls:
        return ""
    gap = untaught.nll - fmean(nlls)
    share = (untaught.nll - student.nll) / gap if gap > _MIN_GAP else 0.0
    mean = "" if len(teachers) == 1 else "mean "
    closes = f"; the student closes {100 * share:.0f} % of the gap to the {mean}teacher in nats"
    return closes if share > 0 else ""


def _describe_size(corpus: LanguageCorpusEvaluation, student: LanguageModelRow) -> list[str]:
    sizes = [row.num_parameters for row in corpus.models if row.kind == "teacher"]
    mean = "" if len(sizes) == 1 else "mean "
    against = f" against the {mean}teacher's {format_count(round(fmean(sizes)))}" if sizes else ""
    agreement = ""
    if student.agreement:
        share = format_percent(fmean(student.agreement.values()))
        agreement = (
            f", and finds the same token most probable as the {mean}teacher at {share} % of the positions"
        )
    return [f"It has {format_count(student.num_parameters)} parameters{against}{agreement}."]
