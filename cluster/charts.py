"""Small SVG charts, drawn by hand: no script, no style of their own beyond class names, scalable.

Colours come from the page's CSS through classes, so that one drawing serves light and dark.

Invariant: every text is escaped (tests/cluster/test_report.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from cluster.svg import draw_circle, draw_line, draw_svg, draw_text
from schemas.evaluation import ReliabilityBin

_WIDTH, _HEIGHT = 260, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 22
_STRIP_WIDTH, _STRIP_HEIGHT, _STRIP_MARGIN = 160, 18, 8
_SQUARE = 190

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Scale:
    """A map from data to pixels.

    Attributes:
        low, high: Of the data; different.
        start, stop: Pixels at ``low`` and ``high``.
        is_log: Equal ratios are equally far apart; the data are above 0.
    """

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Returns the pixel of a value."""
        value, low, high = (
            map(math.log, (value, self.low, self.high)) if self.is_log else (value, self.low, self.high)
        )
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self, count: int = 4) -> list[float]:
        """Returns about ``count`` round numbers within the data's bounds."""
        return (log_ticks if self.is_log else nice_ticks)(self.low, self.high, count)


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Returns about ``count`` round numbers that lie in [low, high]."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= min((factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= count), default=10)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [position * step for position in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Returns round numbers above 0 in [low, high], at about equal ratios where the bounds lie far apart."""
    for factors in ((1, 2, 5), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= count + 1:
            break
    if len(ticks) < 2:
        return nice_ticks(low, high, count)
    return ticks[:: math.ceil(len(ticks) / (count + 1))]


def span(values: Sequence[float], margin: float = 0.06, *, is_log: bool = False) -> tuple[float, float]:
    """Returns bounds a little wider than the values; never of width 0."""
    if is_log:
        low, high = span([math.log(value) for value in values], margin)
        return math.exp(low), math.exp(high)
    low, high = min(values), max(values)
    room = (high - low) * margin or abs(high) * margin or 1.0
    return low - room, high + room


def draw_lines(
    series: Sequence[Points],
    *,
    label: str,
    bounds: tuple[float, float] | None = None,
    marks: Points = (),
    is_log: bool = False,
) -> Markup:
    """Draws lines over steps: one per seed, in one colour.

    Args:
        series: Points of each line; at least one line with a point.
        label: What the chart shows, for a screen reader.
        bounds: Of the vertical axis; by default those of the points.
        marks: Points that are marked, such as the best steps.
        is_log: Whether the vertical axis is logarithmic; values are above 0.
    """
    points = [point for line in series for point in line]
    x = Scale(0, max(*(step for step, _ in points), 1), _LEFT, _WIDTH - _RIGHT)
    low, high = bounds or span([value for _, value in points], is_log=is_log)
    y = Scale(low, high, _HEIGHT - _BOTTOM, _TOP, is_log)
    parts = [_axis_y(y, tick) for tick in y.ticks()]
    last = x.high
    parts.append(draw_text(_LEFT, _HEIGHT - 6, "0", "axis"))
    parts.append(draw_text(_WIDTH - _RIGHT, _HEIGHT - 6, f"step {last:,.0f}", "axis end"))
    for line in series:
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line)
        if len(line) == 1:
            parts.append(draw_circle(x(line[0][0]), y(line[0][1]), 2, "mark"))
        parts.append(Markup('<polyline class="line" points="{}"/>').format(path))
    parts += [draw_circle(x(step), y(value), 3, "mark") for step, value in marks]
    return draw_svg(_WIDTH, _HEIGHT, label, parts)


def draw_interval(
    value: float,
    interval: tuple[float, float],
    *,
    axis: Scale,
    guide: float | None,
    dots: Sequence[float],
    label: str,
) -> Markup:
    """Draws one line of a dot plot: value, its interval, a guide at the baseline, and seeds as dots."""
    middle = _STRIP_HEIGHT / 2
    low, high = interval
    parts = []
    if guide is not None:
        parts.append(draw_line(axis(guide), 0, axis(guide), _STRIP_HEIGHT, "guide"))
    parts.append(draw_line(axis(low), middle, axis(high), middle, "interval"))
    parts += [draw_circle(axis(dot), middle, 2, "seed") for dot in dots]
    parts.append(draw_circle(axis(value), middle, 3.5, "mark"))
    return draw_svg(_STRIP_WIDTH, _STRIP_HEIGHT, label, parts)


def draw_interval_axis(axis: Scale, *, label: str, factor: float = 1.0) -> Markup:
    """Draws the axis above the lines of a dot plot; its numbers are the data's times ``factor``."""
    shown = Scale(axis.low * factor, axis.high * factor, axis.start, axis.stop, axis.is_log)
    # Powers of ten are wide, and as many of them as of other numbers would run into each other.
    ticks = shown.ticks(2 if axis.is_log else 5)
    parts = [draw_text(shown(tick), 12, f"{tick:g}", "axis middle") for tick in ticks]
    return draw_svg(_STRIP_WIDTH, 16, label, parts)


def interval_scale(low: float, high: float, *, is_log: bool = False) -> Scale:
    """Returns the horizontal scale that all lines of a dot plot share."""
    low, high = span([low, high], is_log=is_log)
    return Scale(low, high, _STRIP_MARGIN, _STRIP_WIDTH - _STRIP_MARGIN, is_log)


def draw_reliability(
    bins: Sequence[ReliabilityBin], lowest: float, *, label: str, noun: str = "rows"
) -> Markup:
    """Draws accuracy over confidence, with the area of a dot as its share of the rows.

    Args:
        bins: The bins.
        lowest: Smallest possible confidence, one over the number of labels.
        label: What the chart shows, for a screen reader.
        noun: What a bin counts.
    """
    start = math.floor(lowest * 10) / 10
    x = Scale(start, 1.0, 30, _SQUARE - 8)
    y = Scale(0.0, 1.0, _SQUARE - 22, 8)
    total = sum(one.num_rows for one in bins) or 1
    parts = [draw_line(x(start), y(tick), x(1), y(tick), "grid") for tick in (0.0, 0.5, 1.0)]
    parts += [draw_text(26, y(tick) + 3, f"{100 * tick:.0f}", "axis end") for tick in (0.0, 0.5, 1.0)]
    parts += [
        draw_text(x(start), _SQUARE - 6, f"{100 * start:.0f}", "axis"),
        draw_text(x(1), _SQUARE - 6, "100", "axis end"),
        draw_line(x(start), y(start), x(1), y(1), "guide"),
    ]
    filled = [one for one in bins if one.mean_confidence is not None and one.accuracy is not None]
    for one in filled:
        radius = 1.2 + 11 * math.sqrt(one.num_rows / total)
        title = f"{one.num_rows:,} {noun}: confidence {100 * (one.mean_confidence or 0):.1f} %, "
        title += f"accuracy {100 * (one.accuracy or 0):.1f} %"
        parts.append(draw_circle(x(one.mean_confidence or 0), y(one.accuracy or 0), radius, "bubble", title))
    return draw_svg(_SQUARE, _SQUARE, label, parts)


def _axis_y(y: Scale, tick: float) -> Markup:
    position = y(tick)
    return draw_line(_LEFT, position, _WIDTH - _RIGHT, position, "grid") + draw_text(
        _LEFT - 5, position + 3, f"{tick:.4g}", "axis end"
    )
