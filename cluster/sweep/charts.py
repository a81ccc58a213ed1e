"""A sweep's drawings: gains as bars, accuracy against speed, accuracy over an axis of the grid.

Invariants (tests/cluster/sweep/test_charts.py):
    1. Labels of the scatter lie inside it, and neither on each other nor on a mark.
    2. Numbers along an axis of the grid are in their order, whatever the order of the points.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from cluster.charts import Scale, span
from cluster.figures import format_rate
from cluster.svg import draw_circle, draw_line, draw_svg, draw_text

_BAR_WIDTH, _BAR_HEIGHT, _BAR_MARGIN = 230, 30, 10
_PLOT_WIDTH, _PLOT_HEIGHT = 340, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 10, 10, 24
_LETTER, _LINE, _GAP = 5.9, 12.0, 8.0
_MAX_LABEL = 18
_SMALL_HEIGHT = 170

Range = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """A point of the scatter.

    Attributes:
        name: Its label.
        kind: Class of its colour: ``teacher``, ``ensemble``, ``student``, ``main`` or ``golden``.
        rate: Examples a second, above 0.
        accuracy: A share.
    """

    name: str
    kind: str
    rate: float
    accuracy: float


@dataclass(frozen=True)
class Series:
    """One arm over an axis of the grid.

    Attributes:
        name: The arm.
        kind: Class of its colour: ``main`` or ``golden``.
        values: Accuracy and its interval at each of the axis's values; None where there is none.
    """

    name: str
    kind: str
    values: tuple[tuple[float, Range] | None, ...]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Says whether the two have an area in common."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


@dataclass(frozen=True)
class Label:
    """A label of the scatter: where it lies, and how it is anchored."""

    text: str
    box: Box
    is_left: bool


def gain_scale(gains: Sequence[float]) -> Scale:
    """Returns the scale that all lines of gains share; it holds zero."""
    low, high = span([0.0, *gains])
    return Scale(low, high, _BAR_MARGIN, _BAR_WIDTH - _BAR_MARGIN)


def draw_gain_axis(axis: Scale) -> Markup:
    """Draws the axis above the lines of gains, in points."""
    shown = Scale(100 * axis.low, 100 * axis.high, axis.start, axis.stop)
    parts = [
        draw_text(shown(tick), 12, f"{tick:+g}" if tick else "0", "axis middle") for tick in shown.ticks(5)
    ]
    return draw_svg(_BAR_WIDTH, 16, "gain in points", parts)


def draw_gains(axis: Scale, ours: float, interval: Range | None, theirs: float, *, label: str) -> Markup:
    """Draws our gain with its interval as a bar, and the publication's as another below it."""
    upper, lower = 9.0, 22.0
    parts = [_bar(axis, ours, upper, "ours"), _bar(axis, theirs, lower, "theirs")]
    if interval is not None:
        low, high = interval
        parts.append(draw_line(axis(low), upper, axis(high), upper, "interval"))
        parts += [draw_line(axis(end), upper - 3, axis(end), upper + 3, "interval") for end in interval]
    parts.append(draw_line(axis(0.0), 0, axis(0.0), _BAR_HEIGHT, "zero"))
    return draw_svg(_BAR_WIDTH, _BAR_HEIGHT, label, parts)


def draw_scatter(marks: Sequence[Mark]) -> Markup:
    """Draws accuracy over examples a second, on a logarithmic axis; at least one mark."""
    x, y = _scatter_scales(marks)
    bottom = _PLOT_HEIGHT - _BOTTOM
    parts = []
    for tick in Scale(100 * y.low, 100 * y.high, y.start, y.stop).ticks(4):
        height = y(tick / 100)
        parts.append(draw_line(_LEFT, height, _PLOT_WIDTH - _RIGHT, height, "grid"))
        parts.append(draw_text(_LEFT - 5, height + 3, f"{tick:g}", "axis end"))
    for tick in x.ticks(4):
        parts.append(draw_line(x(tick), _TOP, x(tick), bottom, "grid"))
        parts.append(draw_text(x(tick), _PLOT_HEIGHT - 8, format_rate(tick), "axis middle"))
    for mark, label in zip(marks, place_labels(marks), strict=True):
        parts.append(_draw_mark(mark, x(mark.rate), y(mark.accuracy), label))
    return draw_svg(_PLOT_WIDTH, _PLOT_HEIGHT, "accuracy over examples a second", parts)


def place_labels(marks: Sequence[Mark]) -> list[Label | None]:
    """Finds a place for each label, the highest mark first; None where there is no room.

    The mark of such a label is named by its title alone.
    """
    x, y = _scatter_scales(marks)
    centres = [(x(mark.rate), y(mark.accuracy)) for mark in marks]
    taken = [Box(cx - 5, cy - 5, cx + 5, cy + 5) for cx, cy in centres]
    found: list[Label | None] = [None] * len(marks)
    for position in sorted(range(len(marks)), key=lambda position: centres[position][1]):
        text = _shorten(marks[position].name, _MAX_LABEL)
        free = (
            label
            for label in _label_places(text, *centres[position])
            if not any(label.box.overlaps(other) for other in taken)
        )
        found[position] = label = next(free, None)
        taken += [label.box] if label else []
    return found


def order_values(values: Sequence[str]) -> list[str]:
    """Puts numbers in their order; values of which one is no number stay as they are."""
    try:
        return sorted(values, key=float)
    except ValueError:
        return list(values)


def draw_axis_values(values: Sequence[str], series: Sequence[Series], *, label: str) -> Markup:
    """Draws accuracy with its interval over the values of an axis, which are equally far apart.

    Args:
        values: In order; at least one.
        series: Of at least one accuracy altogether.
        label: What the chart shows, for a screen reader.
    """
    shown = [one for line in series for one in line.values if one is not None]
    low, high = span([bound for value, interval in shown for bound in (value, *interval)])
    y = Scale(low, high, _SMALL_HEIGHT - 36, _TOP)
    parts = []
    for tick in Scale(100 * low, 100 * high, y.start, y.stop).ticks(4):
        parts.append(draw_line(_LEFT, y(tick / 100), _PLOT_WIDTH - _RIGHT, y(tick / 100), "grid"))
        parts.append(draw_text(_LEFT - 5, y(tick / 100) + 3, f"{tick:g}", "axis end"))
    slot = (_PLOT_WIDTH - _LEFT - _RIGHT) / len(values)
    parts += _value_labels(values, slot)
    for position, line in enumerate(series):
        # Beside each other, so that one interval does not hide another.
        shift = 5.0 * (position - (len(series) - 1) / 2)
        centres = [_LEFT + slot * (place + 0.5) + shift for place in range(len(values))]
        parts.append(_draw_series(line, centres, y))
    return draw_svg(_PLOT_WIDTH, _SMALL_HEIGHT, label, parts)


def _draw_series(line: Series, centres: Sequence[float], y: Scale) -> Markup:
    there = [(cx, *one) for cx, one in zip(centres, line.values, strict=True) if one is not None]
    path = " ".join(f"{cx:.1f},{y(value):.1f}" for cx, value, _ in there)
    parts = [Markup('<polyline class="line" points="{}"/>').format(path)]
    for cx, value, (low, high) in there:
        parts.append(draw_line(cx, y(low), cx, y(high), "interval"))
        title = f"{line.name}: {100 * value:.1f} %, interval {100 * low:.1f} to {100 * high:.1f} %"
        parts.append(draw_circle(cx, y(value), 3.5, "mark", title))
    return _group(line.kind, parts)


def _value_labels(values: Sequence[str], slot: float) -> Iterator[Markup]:
    """Writes the values below the axis, on two lines in turn where one is too long for its place."""
    longest = max(len(value) for value in values)
    is_staggered = longest * _LETTER > slot - 4 and len(values) > 1
    letters = max(3, int((2 * slot if is_staggered else slot + 20) / _LETTER))
    for position, value in enumerate(values):
        text = _shorten(value, letters)
        half = len(text) * _LETTER / 2
        centre = _LEFT + slot * (position + 0.5)
        centre = min(max(centre, half), _PLOT_WIDTH - half)
        height = _SMALL_HEIGHT - 20 + (_LINE if is_staggered and position % 2 else 0)
        yield draw_text(centre, height, text, "axis middle")


def _scatter_scales(marks: Sequence[Mark]) -> tuple[Scale, Scale]:
    rates = [mark.rate for mark in marks]
    low, high = span([mark.accuracy for mark in marks], 0.08)
    first, last = span(rates, 0.08, is_log=True)
    if last / first < 2:
        # A narrow range would get ticks that are hard to tell apart.
        middle = math.sqrt(first * last)
        first, last = middle / 1.5, middle * 1.5
    return (
        Scale(first, last, _LEFT + 6, _PLOT_WIDTH - _RIGHT - 6, is_log=True),
        Scale(max(low, 0.0), min(high, 1.02), _PLOT_HEIGHT - _BOTTOM, _TOP),
    )


def _label_places(text: str, cx: float, cy: float) -> Iterator[Label]:
    """Yields places for a label from near to far, on the side with more room first, inside the plot."""
    width = len(text) * _LETTER
    sides = (True, False) if cx > _PLOT_WIDTH / 2 else (False, True)
    steps = sorted(range(-16, 17), key=abs)
    for step, is_left in itertools.product(steps, sides):
        # What lies higher or lower stands further off, so that its line to the mark crosses no label.
        gap = _GAP + (6 if step else 0)
        start = cx - gap - width if is_left else cx + gap
        middle = cy + step * _LINE / 2
        box = Box(start, middle - _LINE / 2, start + width, middle + _LINE / 2)
        inside = box.left > _LEFT and box.right < _PLOT_WIDTH and box.top > 0
        if inside and box.bottom < _PLOT_HEIGHT - _BOTTOM:
            yield Label(text, box, is_left)


def _draw_mark(mark: Mark, cx: float, cy: float, label: Label | None) -> Markup:
    title = f"{mark.name}: {100 * mark.accuracy:.1f} %, {format_rate(mark.rate)} examples/s"
    parts = []
    if label is not None:
        middle = (label.box.top + label.box.bottom) / 2
        end = label.box.right if label.is_left else label.box.left
        if abs(middle - cy) > 1:
            parts.append(draw_line(cx, cy, end + (2 if label.is_left else -2), middle, "leader"))
        parts.append(draw_text(end, middle + 3.5, label.text, "name end" if label.is_left else "name"))
    parts.append(draw_circle(cx, cy, 4, "mark", title))
    return _group(mark.kind, parts)


def _bar(axis: Scale, value: float, middle: float, kind: str) -> Markup:
    left, right = sorted((axis(0.0), axis(value)))
    rect = Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>')
    return rect.format(kind, left, middle - 5, right - left, 10)


def _group(kind: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<g class="{}">').format(kind) + Markup("").join(parts) + Markup("</g>")


def _shorten(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[: letters - 1]}\N{HORIZONTAL ELLIPSIS}"
