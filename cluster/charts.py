"""Small SVG charts, drawn by hand: no script, no style of their own beyond class names, scalable.

Colours come from the page's CSS through classes, so that one drawing serves light and dark.

Invariant: every text is escaped (tests/cluster/test_report.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from schemas.evaluation import ReliabilityBin

_WIDTH, _HEIGHT = 260, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 22
_STRIP_WIDTH, _STRIP_HEIGHT, _STRIP_MARGIN = 160, 18, 8
_SQUARE = 190

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map from data to pixels.

    Attributes:
        low, high: Of the data; different.
        start, stop: Pixels at ``low`` and ``high``.
    """

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """Returns the pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Returns about ``count`` round numbers that lie in [low, high]."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= min((factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= count), default=10)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [position * step for position in range(first, last + 1)]


def span(values: Sequence[float], margin: float = 0.06) -> tuple[float, float]:
    """Returns bounds a little wider than the values; never of width 0."""
    low, high = min(values), max(values)
    room = (high - low) * margin or abs(high) * margin or 1.0
    return low - room, high + room


def draw_lines(
    series: Sequence[Points], *, label: str, bounds: tuple[float, float] | None = None, marks: Points = ()
) -> Markup:
    """Draws lines over steps: one per seed, in one colour.

    Args:
        series: Points of each line; at least one line with a point.
        label: What the chart shows, for a screen reader.
        bounds: Of the vertical axis; by default those of the points.
        marks: Points that are marked, such as the best steps.
    """
    points = [point for line in series for point in line]
    x = Scale(0, max(*(step for step, _ in points), 1), _LEFT, _WIDTH - _RIGHT)
    low, high = bounds or span([value for _, value in points])
    y = Scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    parts = [_axis_y(y, tick) for tick in nice_ticks(low, high)]
    last = x.high
    parts.append(_text(_LEFT, _HEIGHT - 6, "0", "axis"))
    parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 6, f"step {last:,.0f}", "axis end"))
    for line in series:
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line)
        if len(line) == 1:
            parts.append(_circle(x(line[0][0]), y(line[0][1]), 2, "mark"))
        parts.append(Markup('<polyline class="line" points="{}"/>').format(path))
    parts += [_circle(x(step), y(value), 3, "mark") for step, value in marks]
    return _svg(_WIDTH, _HEIGHT, label, parts)


def draw_interval(
    value: float, low: float, high: float, *, axis: Scale, guide: float | None, dots: Sequence[float]
) -> Markup:
    """Draws one line of a dot plot: value, its interval, a guide at the baseline, and seeds as dots."""
    middle = _STRIP_HEIGHT / 2
    parts = []
    if guide is not None:
        parts.append(_line(axis(guide), 0, axis(guide), _STRIP_HEIGHT, "guide"))
    parts.append(_line(axis(low), middle, axis(high), middle, "interval"))
    parts += [_circle(axis(dot), middle, 2, "seed") for dot in dots]
    parts.append(_circle(axis(value), middle, 3.5, "mark"))
    label = f"{100 * value:.1f} %, interval {100 * low:.1f} to {100 * high:.1f} %"
    return _svg(_STRIP_WIDTH, _STRIP_HEIGHT, label, parts)


def draw_interval_axis(axis: Scale) -> Markup:
    """Draws the axis above the lines of a dot plot, in percent."""
    ticks = nice_ticks(axis.low * 100, axis.high * 100, 5)
    parts = [_text(axis(tick / 100), 12, f"{tick:g}", "axis middle") for tick in ticks]
    return _svg(_STRIP_WIDTH, 16, "accuracy in percent", parts)


def interval_scale(low: float, high: float) -> Scale:
    """Returns the horizontal scale that all lines of a dot plot share."""
    low, high = span([low, high])
    return Scale(max(low, 0.0), min(high, 1.0), _STRIP_MARGIN, _STRIP_WIDTH - _STRIP_MARGIN)


def draw_reliability(bins: Sequence[ReliabilityBin], lowest: float, *, label: str) -> Markup:
    """Draws accuracy over confidence, with the area of a dot as its share of the rows.

    Args:
        bins: The bins.
        lowest: Smallest possible confidence, one over the number of labels.
        label: What the chart shows, for a screen reader.
    """
    start = math.floor(lowest * 10) / 10
    x = Scale(start, 1.0, 30, _SQUARE - 8)
    y = Scale(0.0, 1.0, _SQUARE - 22, 8)
    total = sum(one.num_rows for one in bins) or 1
    parts = [_line(x(start), y(tick), x(1), y(tick), "grid") for tick in (0.0, 0.5, 1.0)]
    parts += [_text(26, y(tick) + 3, f"{100 * tick:.0f}", "axis end") for tick in (0.0, 0.5, 1.0)]
    parts += [
        _text(x(start), _SQUARE - 6, f"{100 * start:.0f}", "axis"),
        _text(x(1), _SQUARE - 6, "100", "axis end"),
        _line(x(start), y(start), x(1), y(1), "guide"),
    ]
    filled = [one for one in bins if one.mean_confidence is not None and one.accuracy is not None]
    for one in filled:
        radius = 1.2 + 11 * math.sqrt(one.num_rows / total)
        title = f"{one.num_rows:,} rows: confidence {100 * (one.mean_confidence or 0):.1f} %, "
        title += f"accuracy {100 * (one.accuracy or 0):.1f} %"
        parts.append(_circle(x(one.mean_confidence or 0), y(one.accuracy or 0), radius, "bubble", title))
    return _svg(_SQUARE, _SQUARE, label, parts)


def _axis_y(y: Scale, tick: float) -> Markup:
    position = y(tick)
    return _line(_LEFT, position, _WIDTH - _RIGHT, position, "grid") + _text(
        _LEFT - 5, position + 3, f"{tick:.4g}", "axis end"
    )


def _svg(width: float, height: float, label: str, parts: Sequence[Markup]) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">')
    return head.format(width, height, width, height, label) + Markup("").join(parts) + Markup("</svg>")


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        kind, x1, y1, x2, y2
    )


def _circle(x: float, y: float, radius: float, kind: str, title: str = "") -> Markup:
    inside = Markup("<title>{}</title>").format(title) if title else Markup("")
    return (
        Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{:.1f}">').format(kind, x, y, radius)
        + inside
        + Markup("</circle>")
    )


def _text(x: float, y: float, text: str, kind: str) -> Markup:
    # Markup.format escapes its arguments.
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(kind, x, y, text)
