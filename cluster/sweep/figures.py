"""How a sweep's findings are said to people, the same in the terminal and in the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

from cluster.figures import (
    ABSENT,
    format_difference,
    format_percent,
    format_points,
    format_rate,
    format_seconds,
)
from schemas.evaluation import Comparison, Interval, ModelRow
from schemas.sweep import Published
from schemas.sweep_evaluation import SweepCost, SweepEvaluation, SweepStudent


def format_accuracy(row: ModelRow | None) -> str:
    """Formats the accuracy, with its standard deviation over seeds where there are several."""
    if row is None:
        return ABSENT
    spread = "" if row.accuracy_std is None else f" ±{format_points(row.accuracy_std)}"
    return f"{format_percent(row.accuracy)}{spread}"


def format_range(interval: Interval | None) -> str:
    """Formats an interval of shares in percent: ``79.1 to 82.4``."""
    if interval is None:
        return ABSENT
    return f"{format_percent(interval.low)} to {format_percent(interval.high)}"


def format_gain(gain: float | None) -> str:
    """Formats a gain in points, or its absence."""
    return ABSENT if gain is None else format_difference(gain)


def format_gain_range(interval: Interval | None) -> str:
    """Formats an interval of differences in points: ``+0.4 to +2.6``."""
    if interval is None:
        return ABSENT
    return f"{format_difference(interval.low)} to {format_difference(interval.high)}"


def format_test(comparison: Comparison | None) -> str:
    """Formats the test of a comparison: McNemar's p of one seed, or else how many seeds are better."""
    if comparison is None:
        return ABSENT
    if len(comparison.seeds) == 1:
        return f"p {comparison.seeds[0].p_value:.2g}"
    return f"{sum(one.difference > 0 for one in comparison.seeds)}/{len(comparison.seeds)}"


def published_stderr(published: Published) -> float | None:
    """Returns the standard error of one published accuracy as a share, if its rows are known.

    Source: that of a binomial share, sqrt(p (1 - p) / n), at the mean p of the published accuracies.
    """
    if published.num_rows is None or not published.accuracy:
        return None
    share = fmean(published.accuracy.values()) / 100
    return math.sqrt(share * (1 - share) / published.num_rows)


def published_sentences(published: Published | None) -> list[str]:
    """Says whose figures stand beside ours, and how far they can be trusted."""
    if published is None:
        return []
    sentences = [f"published: {published.source}"]
    stderr = published_stderr(published)
    if stderr is not None:
        sentences.append(
            f"published figures are on {published.num_rows:,} rows: one accuracy has a standard error of "
            f"about {format_points(stderr)} points"
        )
    if published.examples_per_s:
        rates = ", ".join(f"{name} {format_rate(rate)}" for name, rate in published.examples_per_s.items())
        sentences.append(f"published examples/s, on other hardware: {rates}")
    return sentences + ([published.note] if published.note else [])


def cost_sentence(cost: SweepCost) -> str:
    """Says what the sweep cost, and what it would have cost with the teachers in the loop."""
    parts = []
    if cost.num_stores:
        seconds = {"training": cost.teacher_training_s, "forward": cost.teacher_forward_s}
        shares = ", ".join(f"{name} {format_seconds(value)}" for name, value in seconds.items() if value)
        detail = f" ({shares})" if shares else ""
        parts.append(f"teachers ran once for {format_seconds(sum(seconds.values()))}{detail}")
    parts.append(f"students {format_seconds(cost.student_s)}")
    source = f" from {_count(cost.num_stores, 'store')}" if cost.num_stores else ""
    sentence = f"{_count(cost.num_students, 'student')}{source}: {', '.join(parts)}"
    if cost.resident_s is None:
        return sentence
    return (
        f"{sentence}; with teachers in the loop of each student their forward passes alone would have cost "
        f"{format_seconds(cost.resident_s)}"
    )


def failure_sentence(student: SweepStudent, titles: Mapping[str, str]) -> str:
    """Names a student that has no result, and says why.

    Args:
        student: Which.
        titles: From the points' names to their titles; empty where there is one point.
    """
    teacher = f"/{student.teacher}" if student.teacher else ""
    parts = [f"{student.arm}{teacher}", f"seed {student.seed}"]
    parts += [] if student.fold is None else [f"fold {student.fold}"]
    parts += [titles[student.point]] if student.point in titles else []
    verb = "failed" if student.state == "failed" else "was not run"
    return f"{', '.join(parts)} {verb}: {student.error or 'no reason was recorded'}"


def missing_sentence(name: str, seeds: tuple[int, ...]) -> str:
    """Says which seeds an arm's line lacks."""
    noun = "seed" if len(seeds) == 1 else "seeds"
    return f"{name} lacks {noun} {', '.join(map(str, seeds))}: a student failed"


def point_titles(sweep: SweepEvaluation) -> dict[str, str]:
    """Returns the titles of the points by their names; empty where there is one point."""
    if len(sweep.points) < 2:
        return {}
    return {one.point.name: one.point.title for one in sweep.points}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
