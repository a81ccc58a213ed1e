"""How figures are written for people, the same in the terminal and in the report."""

from __future__ import annotations

from schemas.evaluation import Comparison, DroppedRows

ABSENT = "\N{EN DASH}"


def format_percent(share: float | None) -> str:
    """Formats a share as percent with one decimal: 0.8437 -> ``84.4``."""
    return ABSENT if share is None else f"{100 * share:.1f}"


def format_points(share: float | None) -> str:
    """Formats an error or spread in percentage points: 0.0123 -> ``1.2``."""
    return format_percent(share)


def format_difference(share: float) -> str:
    """Formats a signed difference in points: 0.012 -> ``+1.2``; a minus is a real one, zero has a plus."""
    points = round(100 * share, 1) + 0.0
    return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}")


def format_count(count: int | None) -> str:
    """Formats a count with three digits: 22713216 -> ``22.7M``."""
    if count is None:
        return ABSENT
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{_three_digits(count / size)}{unit}"
    return str(count)


def format_bytes(count: int) -> str:
    """Formats bytes in decimal units: 1234567 -> ``1.23 MB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{_three_digits(count / size)} {unit}"
    return f"{count} B"


def format_rate(rate: float | None) -> str:
    """Formats a rate: 1234.5 -> ``1,234``; below 10 with one decimal."""
    if rate is None:
        return ABSENT
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def format_ratio(ratio: float | None) -> str:
    """Formats a ratio: 11.96 -> 12.0 and a multiplication sign."""
    return ABSENT if ratio is None else f"{_three_digits(ratio)}\N{MULTIPLICATION SIGN}"


def format_seconds(seconds: float) -> str:
    """Formats a duration: 0.4 -> ``0.4 s``, 75 -> ``1 min 15 s``, 3700 -> ``1 h 2 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def comparison_sentence(comparison: Comparison) -> str:
    """Says how a student compares with the one without distillation."""
    interval = (
        f"{format_difference(comparison.interval.low)} to {format_difference(comparison.interval.high)}"
    )
    seeds = len(comparison.seeds)
    won = sum(one.difference > 0 for one in comparison.seeds)
    noun = "students" if any(one.teacher for one in comparison.seeds) else "seeds"
    if seeds > 1:
        detail = f"{seeds} {noun}, {won} of them better; 95 % interval {interval}"
    else:
        detail = f"95 % interval {interval}, McNemar p = {comparison.seeds[0].p_value:.2g}"
    difference = format_difference(comparison.mean_difference)
    return f"{comparison.student} against {comparison.baseline}: {difference} points ({detail})"


def dropped_sentence(dropped: DroppedRows) -> str:
    """Says how many training rows were left out."""
    return (
        f"{dropped.corpus}: {dropped.num_dropped:,} of {dropped.num_rows:,} rows left out of training, "
        "they share a text with an evaluation split"
    )


def _three_digits(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
