"""The report's charts: which series go into which drawing, on which shared scales."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

_METRIC_NAMES = {
    "accuracy": "held-out accuracy",
    "macro_f1": "held-out macro-F1",
    "soft_loss": "held-out soft loss",
    "loss": "held-out loss",
}


@dataclass(frozen=True)
class CurvePanel:
    """The curves of one model in one group, all seeds in one chart.

    Attributes:
        loss: Training loss over steps, or None.
        metric: The held-out measure over steps, or None.
        metric_name: Of the latter.
        best: Mean of the seeds' best values, or None.
    """

    model: str
    num_seeds: int
    loss: Markup | None
    metric: Markup | None
    metric_name: str
    best: float | None


@dataclass(frozen=True)
class CurveGroup:
    """Models trained side by side; the held-out measure has one scale for all of them."""

    title: str
    panels: tuple[CurvePanel, ...]


@dataclass(frozen=True)
class ReliabilityPanel:
    """One model's reliability diagram."""

    row: ModelRow
    drawing: Markup


def draw_curves(curves: Sequence[Curve], main_arm: str | None = None) -> list[CurveGroup]:
    """Draws small multiples: a group per stage, a panel per model (the main arm first), a line per seed."""
    titles = [curve.group for curve in curves]
    groups: dict[str, dict[str, list[Curve]]] = defaultdict(lambda: defaultdict(list))
    for curve in sorted(curves, key=lambda curve: curve.model.split("/")[0] != main_arm):
        groups[curve.group][curve.model].append(curve)
    return [
        CurveGroup(title, tuple(_draw_panel(model, models) for model in models))
        for title, models in sorted(groups.items(), key=lambda item: titles.index(item[0]))
    ]


def draw_reliabilities(corpus: CorpusEvaluation) -> list[ReliabilityPanel]:
    """Draws a diagram for each teacher, the ensemble, and each arm."""
    lowest = 1 / len(corpus.labels)
    return [
        ReliabilityPanel(row, draw_reliability(row.reliability, lowest, label=f"reliability of {row.name}"))
        for row in corpus.models
        if row.level == 0
    ]


def strip_axis(corpus: CorpusEvaluation) -> Markup:
    """Draws the axis that the lines of ``strip_of`` share."""
    return draw_interval_axis(_strip_scale(corpus))


def strip_of(corpus: CorpusEvaluation, row: ModelRow) -> Markup:
    """Draws a row's accuracy with its interval; the guide is the student without distillation."""
    golden = next((one for one in corpus.models if one.arm == "golden" and one.level == 0), None)
    seeds = [
        one.accuracy
        for one in corpus.models
        if one.level == 2 and row.level < 2 and one.name.startswith(f"{row.name}/seed-")
    ]
    return draw_interval(
        row.accuracy,
        row.accuracy_interval.low,
        row.accuracy_interval.high,
        axis=_strip_scale(corpus),
        guide=golden.accuracy if golden else None,
        dots=seeds,
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
    return interval_scale(low, high)


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
    if metric not in ("accuracy", "macro_f1"):
        return None
    curves = [curve for seeds in models.values() for curve in seeds if curve.metric == metric]
    return span([value for curve in curves for _, value in curve.values])
