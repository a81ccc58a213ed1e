"""The report's charts: which series go into which drawing, on which shared scales."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from markupsafe import Markup

from cluster.charts import (
    Scale,
    draw_interval,
    draw_interval_axis,
    draw_lines,
    draw_reliability,
    interval_scale,
    span,
)
from cluster.curves import Curve
from schemas.evaluation import CorpusEvaluation, ModelRow
from schemas.language_evaluation import LanguageModelRow

_METRIC_NAMES = {
    "perplexity": "held-out perplexity",
    "accuracy": "held-out accuracy",
    "macro_f1": "held-out macro-F1",
    "soft_loss": "held-out soft loss",
    "loss": "held-out loss",
}
# Perplexities fall by orders of magnitude in the first steps.
_LOG_METRICS = ("perplexity",)


@dataclass(frozen=True)
class CurvePanel:
    """The curves of one model in one group, all seeds in one chart.

    Attributes:
        loss: Training loss over steps, or None.
        metric: The held-out measure over steps, or None.
        metric_name: Of the latter.
        best: Mean of the seeds' best values, or None.
        is_baseline: Whether it learns without a teacher.
    """

    model: str
    num_seeds: int
    loss: Markup | None
    metric: Markup | None
    metric_name: str
    best: float | None
    is_baseline: bool = False


@dataclass(frozen=True)
class CurveGroup:
    """Models trained side by side; the held-out measure has one scale for all of them."""

    title: str
    panels: tuple[CurvePanel, ...]


@dataclass(frozen=True)
class ReliabilityPanel:
    """One model's reliability diagram."""

    row: ModelRow | LanguageModelRow
    drawing: Markup


def draw_curves(
    curves: Sequence[Curve], main_arm: str | None = None, baselines: Collection[str] = ("golden",)
) -> list[CurveGroup]:
    """Draws small multiples: a group per stage, a panel per model (the main arm first), a line per seed.

    Args:
        curves: Of all trainings.
        main_arm: The arm of the run's own student.
        baselines: Arms that learn without a teacher.
    """
    titles = [curve.group for curve in curves]
    groups: dict[str, dict[str, list[Curve]]] = defaultdict(lambda: defaultdict(list))
    for curve in sorted(curves, key=lambda curve: curve.model.split("/")[0] != main_arm):
        groups[curve.group][curve.model].append(curve)
    return [
        CurveGroup(
            title,
            tuple(replace(_draw_panel(model, models), is_baseline=model in baselines) for model in models),
        )
        for title, models in sorted(groups.items(), key=lambda item: titles.index(item[0]))
    ]


def draw_reliabilities(corpus: CorpusEvaluation) -> list[ReliabilityPanel]:
    """Draws a diagram for each teacher, the ensemble, and each arm."""
    return draw_reliability_panels(corpus.models, 1 / len(corpus.labels), "rows")


def draw_reliability_panels(
    rows: Sequence[ModelRow | LanguageModelRow], lowest: float, noun: str
) -> list[ReliabilityPanel]:
    """Draws a diagram for each line of its own.

    Args:
        rows: Of the table.
        lowest: Smallest possible confidence.
        noun: What is counted.
    """
    return [
        ReliabilityPanel(
            row, draw_reliability(row.reliability, lowest, label=f"reliability of {row.name}", noun=noun)
        )
        for row in rows
        if row.level == 0
    ]


def strip_axis(corpus: CorpusEvaluation) -> Markup:
    """Draws the axis that the lines of ``strip_of`` share."""
    return draw_interval_axis(_strip_scale(corpus), label="accuracy in percent", factor=100.0)


def strip_of(corpus: CorpusEvaluation, row: ModelRow, baseline: str = "golden") -> Markup:
    """Draws a row's accuracy with its interval; the guide is the baseline's."""
    golden = next((one for one in corpus.models if one.arm == baseline and one.level == 0), None)
    seeds = [
        one.accuracy
        for one in corpus.models
        if one.level == 2 and row.level < 2 and one.name.startswith(f"{row.name}/seed-")
    ]
    interval = row.accuracy_interval
    return draw_interval(
        row.accuracy,
        (interval.low, interval.high),
        axis=_strip_scale(corpus),
        guide=golden.accuracy if golden else None,
        dots=seeds,
        label=f"{100 * row.accuracy:.1f} %, interval {100 * interval.low:.1f} to {100 * interval.high:.1f} %",
    )


def shade(value: float, corpus: CorpusEvaluation) -> int:
    """Returns how dark a cell of the agreement matrix is, 0 to 60 percent of the accent colour."""
    values = [value for row in corpus.agreement.values for value in row]
    low = min(values)
    return round(60 * (value - low) / (1 - low)) if low < 1 else 60


def _strip_scale(corpus: CorpusEvaluation) -> Scale:
    shown = [row for row in corpus.models if row.level < 2]
    low = min(min(row.accuracy_interval.low for row in shown), *(row.accuracy for row in corpus.models))
    high = max(max(row.accuracy_interval.high for row in shown), *(row.accuracy for row in corpus.models))
    axis = interval_scale(low, high)
    return replace(axis, low=max(axis.low, 0.0), high=min(axis.high, 1.0))


def _draw_panel(model: str, models: Mapping[str, Sequence[Curve]]) -> CurvePanel:
    seeds = models[model]
    losses = [curve.losses for curve in seeds if curve.losses]
    metric = next((curve.metric for curve in seeds if curve.metric), None)
    measured = [curve for curve in seeds if curve.metric == metric and curve.values]
    bests = [curve.best_value for curve in measured if curve.best_value is not None]
    name = _METRIC_NAMES.get(metric or "", "")
    drawing = None
    if measured:
        drawing = draw_lines(
            [curve.values for curve in measured],
            label=f"{name} of {model}",
            bounds=_shared_bounds(metric, models),
            marks=[point for curve in measured for point in curve.values if point[0] == curve.best_step],
            is_log=metric in _LOG_METRICS,
        )
    return CurvePanel(
        model=model,
        num_seeds=len(seeds),
        loss=draw_lines(losses, label=f"training loss of {model}") if losses else None,
        metric=drawing,
        metric_name=name,
        best=fmean(bests) if bests else None,
    )


def _shared_bounds(metric: str | None, models: Mapping[str, Sequence[Curve]]) -> tuple[float, float] | None:
    """Returns bounds for all models of a group; losses of different targets have no common scale."""
    if metric not in ("accuracy", "macro_f1", "perplexity"):
        return None
    curves = [curve for seeds in models.values() for curve in seeds if curve.metric == metric]
    return span([value for curve in curves for _, value in curve.values], is_log=metric in _LOG_METRICS)
