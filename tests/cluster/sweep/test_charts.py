"""Tests of a sweep's drawings."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.sweep.charts import (
    Mark,
    Series,
    draw_axis_values,
    draw_gains,
    draw_scatter,
    gain_scale,
    order_values,
    place_labels,
)
from cluster.sweep.report_charts import draw_axes
from tests.cluster.sweep.sweeps import make_sweep

MARKS = st.lists(
    st.builds(
        Mark,
        name=st.sampled_from(["tmkd", "golden-long", "teacher-a", "a name that is much too long", "m-o-m"]),
        kind=st.just("student"),
        rate=st.floats(1.0, 5000.0),
        accuracy=st.floats(0.3, 0.95),
    ),
    min_size=1,
    max_size=14,
)


@given(MARKS)
def test_labels_lie_inside_and_neither_on_each_other_nor_on_a_mark(marks: list[Mark]) -> None:
    labels = [label for label in place_labels(marks) if label is not None]
    for one, other in itertools.combinations(labels, 2):
        assert not one.box.overlaps(other.box)
    for label in labels:
        assert 34 < label.box.left < label.box.right < 340
        assert 0 < label.box.top < label.box.bottom < 230 - 24
    drawn = draw_scatter(marks)
    centres = [(float(x), float(y)) for x, y in re.findall(r'<circle [^>]*cx="([^"]+)" cy="([^"]+)"', drawn)]
    assert len(centres) == len(marks)
    for (x, y), label in itertools.product(centres, labels):
        box = label.box
        assert not (box.left < x < box.right and box.top < y < box.bottom)


def test_students_of_one_speed_are_all_labelled() -> None:
    arms = ["golden", "golden-long", "1-o-1", "1avg-o-1", "m-o-1", "tkd", "tmkd"]
    marks = [Mark(arm, "student", 780.0, 0.77 + 0.002 * place) for place, arm in enumerate(arms)]
    marks += [Mark(f"teacher-{name}", "teacher", 95.0, 0.85) for name in "abc"]
    assert all(label is not None for label in place_labels(marks))


def test_a_bar_ends_at_its_gain_and_starts_at_zero() -> None:
    axis = gain_scale([-0.02, 0.08])
    drawn = draw_gains(axis, 0.04, None, -0.01, label="l")
    bars = re.findall(r'<rect class="(\w+)" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawn)
    ours, theirs = ((kind, float(x), float(width)) for kind, x, width in bars)
    assert ours[0] == "ours"
    assert ours[1] == pytest.approx(axis(0.0), abs=0.06)
    assert ours[1] + ours[2] == pytest.approx(axis(0.04), abs=0.11)
    assert theirs[1] == pytest.approx(axis(-0.01), abs=0.06)


def test_numbers_are_in_their_order_and_names_as_they_were_written() -> None:
    assert order_values(["10", "9", "0.5", "1e2"]) == ["0.5", "9", "10", "1e2"]
    assert order_values(["bert", "2", "1"]) == ["bert", "2", "1"]


def test_an_axis_of_the_grid_is_drawn_in_order_for_the_main_arm_and_the_baseline() -> None:
    (panel,) = draw_axes(make_sweep(alphas=(0.9, 0.1, 0.5)))
    assert (panel.axis, panel.title) == ("alpha", "")
    assert panel.arms == (("main", "tmkd"), ("golden", "golden"))
    assert re.findall(r'axis middle"[^>]*>([^<]*)<', panel.drawing) == ["0.1", "0.5", "0.9"]
    assert draw_axes(make_sweep()) == []


def test_a_value_without_a_result_leaves_a_gap() -> None:
    series = Series("tmkd", "main", ((0.8, (0.78, 0.82)), None, (0.7, (0.6, 0.75))))
    drawn = draw_axis_values(["a", "b" * 60, "c"], [series], label="l")
    assert drawn.count("<circle") == 2
    assert "b" * 60 not in drawn
