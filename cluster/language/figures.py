"""How the figures of language models are written for people, in the terminal and in the report."""

from __future__ import annotations

import math

from cluster.figures import ABSENT
from schemas.evaluation import Interval
from schemas.language import Objective
from schemas.language_evaluation import NllComparison

INFINITE = "\N{INFINITY}"


def format_perplexity(perplexity: float | None) -> str:
    """Formats a perplexity with three or four digits: 12.34, 123.4, 1,234; infinity where it is None."""
    return INFINITE if perplexity is None else _with_digits(perplexity)


def format_spread(spread: float | None) -> str:
    """Formats a standard deviation of perplexities; empty where there is none."""
    return "" if spread is None else _with_digits(spread)


def format_interval(interval: Interval | None) -> str:
    """Formats an interval of perplexities: ``11.8 to 12.9``."""
    if interval is None:
        return ABSENT
    return f"{format_perplexity(interval.low)} to {format_perplexity(interval.high)}"


def format_nats(difference: float) -> str:
    """Formats a signed difference in nats: -0.0123 -> ``-0.012`` with a real minus; zero has a plus."""
    return f"{round(difference, 3) + 0.0:+.3f}".replace("-", "\N{MINUS SIGN}")


def format_factor(difference: float) -> str:
    """Formats a difference in nats as a ratio of perplexities: -0.105 -> 0.900 and a multiplication sign."""
    return f"{math.exp(min(difference, 700.0)):.3f}\N{MULTIPLICATION SIGN}"


def position_noun(objective: Objective) -> str:
    """Returns what is predicted at a position."""
    return "tokens" if objective == "causal" else "hidden tokens"


def comparison_sentence(comparison: NllComparison) -> str:
    """Says how an arm compares with the other one."""
    interval = f"{format_nats(comparison.interval.low)} to {format_nats(comparison.interval.high)}"
    detail = f"95 % interval {interval}"
    if len(comparison.seeds) > 1:
        won = sum(one.difference < 0 for one in comparison.seeds)
        detail = f"{len(comparison.seeds)} seeds, {won} of them better; {detail}"
    difference = format_nats(comparison.mean_difference)
    return f"{comparison.student} against {comparison.baseline}: {difference} nats a token ({detail})"


def _with_digits(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}" if value < 1e7 else f"{value:.3g}"
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}"
