"""The report's charts of language models."""

from __future__ import annotations

from markupsafe import Markup

from cluster.charts import Scale, draw_interval, draw_interval_axis, interval_scale
from cluster.language.figures import format_interval, format_perplexity
from cluster.report_charts import ReliabilityPanel, draw_reliability_panels
from schemas.language_evaluation import LanguageCorpusEvaluation, LanguageModelRow


def draw_reliabilities(corpus: LanguageCorpusEvaluation) -> list[ReliabilityPanel]:
    """Draws a diagram for each teacher and each arm."""
    return draw_reliability_panels(corpus.models, 0.0, "positions")


def strip_axis(corpus: LanguageCorpusEvaluation) -> Markup:
    """Draws the axis that the lines of ``strip_of`` share; empty where no perplexity is defined."""
    axis = _strip_scale(corpus)
    return Markup("") if axis is None else draw_interval_axis(axis, label="perplexity")


def strip_of(corpus: LanguageCorpusEvaluation, row: LanguageModelRow) -> Markup:
    """Draws a row's perplexity with its interval; the guide is the student without teachers."""
    axis = _strip_scale(corpus)
    if axis is None or row.perplexity is None or row.perplexity_interval is None:
        return Markup("")
    guide = next(
        (one for one in corpus.models if one.kind == "student" and one.level == 0 and not one.teachers), None
    )
    seeds = [
        one.perplexity
        for one in corpus.models
        if one.level == 1 and row.level == 0 and one.arm == row.arm and one.perplexity is not None
    ]
    return draw_interval(
        row.perplexity,
        (row.perplexity_interval.low, row.perplexity_interval.high),
        axis=axis,
        guide=guide.perplexity if guide else None,
        dots=seeds,
        label=f"{format_perplexity(row.perplexity)}, interval {format_interval(row.perplexity_interval)}",
    )


def _strip_scale(corpus: LanguageCorpusEvaluation) -> Scale | None:
    values = [row.perplexity for row in corpus.models if row.perplexity is not None]
    intervals = [row.perplexity_interval for row in corpus.models if row.perplexity_interval]
    values += [bound for interval in intervals for bound in (interval.low, interval.high)]
    return interval_scale(min(values), max(values), is_log=True) if values else None
