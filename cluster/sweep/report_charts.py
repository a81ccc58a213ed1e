"""Which of a sweep's figures go into which drawing of its page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from cluster.charts import Scale, draw_interval, draw_interval_axis, interval_scale
from cluster.sweep.charts import (
    Mark,
    Series,
    draw_axis_values,
    draw_gain_axis,
    draw_gains,
    draw_scatter,
    gain_scale,
    order_values,
)
from cluster.sweep.figures import format_gain, format_gain_range
from cluster.sweep.result_lines import ResultLine, list_headlines
from schemas.evaluation import CorpusEvaluation, Interval, ModelRow
from schemas.sweep_evaluation import PointEvaluation, SweepEvaluation


@dataclass(frozen=True)
class GainLine:
    """An arm's gain beside the publication's."""

    line: ResultLine
    drawing: Markup


@dataclass(frozen=True)
class GainPanel:
    """The arms whose gain both have, on one scale."""

    axis: Markup
    lines: tuple[GainLine, ...]


@dataclass(frozen=True)
class AxisPanel:
    """Accuracy over one axis of the grid.

    Attributes:
        axis: Its name.
        title: What the other axes are at; empty where there are none.
        arms: (class of its colour, name) of each arm shown.
    """

    axis: str
    title: str
    arms: tuple[tuple[str, str], ...]
    drawing: Markup


def draw_gain_panel(lines: Sequence[ResultLine]) -> GainPanel | None:
    """Draws the gains that both we and the publication have; None where there is none."""
    both = [
        (line, line.gain, line.published_gain)
        for line in lines
        if line.gain is not None and line.published_gain is not None
    ]
    if not both:
        return None
    bounds = [bound for line, ours, theirs in both for bound in (ours, theirs, *(_interval(line) or ()))]
    axis = gain_scale(bounds)
    drawn = []
    for line, ours, theirs in both:
        bounds_of = format_gain_range(line.comparison.interval) if line.comparison else "unknown"
        label = (
            f"{line.name}: ours {format_gain(ours)}, interval {bounds_of}, published {format_gain(theirs)}"
        )
        drawn.append(GainLine(line, draw_gains(axis, ours, _interval(line), theirs, label=label)))
    return GainPanel(draw_gain_axis(axis), tuple(drawn))


def draw_speeds(corpus: CorpusEvaluation, main_arm: str, baseline: str) -> Markup | None:
    """Draws accuracy over examples a second of each line of its own; None where no speed was measured."""
    marks = [
        Mark(row.name, _kind_of(row, main_arm, baseline), row.examples_per_s, row.accuracy)
        for row in corpus.models
        if row.level == 0 and row.examples_per_s is not None
    ]
    return draw_scatter(marks) if marks else None


def draw_axes(sweep: SweepEvaluation) -> list[AxisPanel]:
    """Draws a chart for each axis of the grid and each choice of the other axes' values."""
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], dict[str, PointEvaluation]] = defaultdict(dict)
    for point in sweep.points:
        coordinates = point.point.coordinates
        for axis, value in coordinates.items():
            others = tuple(item for item in coordinates.items() if item[0] != axis)
            groups[axis, others][value] = point
    panels = (_draw_axis(sweep, axis, others, points) for (axis, others), points in groups.items())
    return [panel for panel in panels if panel is not None]


def headline_scale(sweep: SweepEvaluation) -> Scale | None:
    """Returns the scale of accuracy that the lines of all points share; None where there is none."""
    rows = [line.row for point in sweep.points for line in list_headlines(sweep, point) if line.row]
    if not rows:
        return None
    low = min(min(row.accuracy_interval.low, row.accuracy) for row in rows)
    high = max(max(row.accuracy_interval.high, row.accuracy) for row in rows)
    return interval_scale(low, high)


def draw_headline_axis(scale: Scale) -> Markup:
    """Draws the axis above the lines of all points."""
    return draw_interval_axis(scale, label="accuracy in percent", factor=100.0)


def draw_headline(scale: Scale, line: ResultLine) -> Markup:
    """Draws one line's accuracy with its interval, or nothing where it has none."""
    if line.row is None:
        return Markup("")
    interval = line.row.accuracy_interval
    label = (
        f"{100 * line.row.accuracy:.1f} %, interval {100 * interval.low:.1f} to {100 * interval.high:.1f} %"
    )
    bounds = (interval.low, interval.high)
    return draw_interval(line.row.accuracy, bounds, axis=scale, guide=None, dots=(), label=label)


def _draw_axis(
    sweep: SweepEvaluation,
    axis: str,
    others: Sequence[tuple[str, str]],
    points: dict[str, PointEvaluation],
) -> AxisPanel | None:
    values = order_values(list(points))
    if len(values) < 2:
        return None
    found: dict[tuple[str, str], list[tuple[float, tuple[float, float]] | None]] = {}
    for place, value in enumerate(values):
        for line in list_headlines(sweep, points[value]):
            key = ("main" if line.is_main else "golden", line.name)
            if line.row is not None:
                bounds = (line.row.accuracy_interval.low, line.row.accuracy_interval.high)
                found.setdefault(key, [None] * len(values))[place] = (line.row.accuracy, bounds)
    if not found:
        return None
    series = [Series(name, kind, tuple(measured)) for (kind, name), measured in found.items()]
    title = ", ".join(f"{_last_step(name)} {value}" for name, value in others)
    label = f"accuracy over {axis}" + (f" at {title}" if title else "")
    return AxisPanel(_last_step(axis), title, tuple(found), draw_axis_values(values, series, label=label))


def _last_step(axis: str) -> str:
    """Returns the last step of a dotted path that is a name, as the points' titles do."""
    steps = [step for step in axis.split(".") if not step.isdigit()]
    return steps[-1] if steps else axis


def _interval(line: ResultLine) -> tuple[float, float] | None:
    interval: Interval | None = line.comparison.interval if line.comparison else None
    return (interval.low, interval.high) if interval else None


def _kind_of(row: ModelRow, main_arm: str, baseline: str) -> str:
    if row.kind != "student":
        return row.kind
    return "main" if row.arm == main_arm else "golden" if row.arm == baseline else "student"
