"""The plan of keep policies as tables for a terminal; plain text elsewhere.

Invariant: names come from users and are never read as markup (tests/cluster/language/test_keep_table.py).
"""

from __future__ import annotations

import io
import sys

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.figures import ABSENT, format_bytes, format_percent, format_rate
from cluster.language.figures import INFINITE, format_perplexity
from cluster.table_layout import PLAIN_WIDTH
from schemas.keep_trial import CandidateTrial, KeepPlan, KeepTrial, LossTrial, name_policy

_RENORMALISED = "support_kl"


def print_keep_plan(plan: KeepPlan, console: Console | None = None) -> None:
    """Writes a table for each teacher to standard output, and below it what its figures are."""
    if console is None:
        width = None if sys.stdout.isatty() else PLAIN_WIDTH
        console = Console(width=width, highlight=False)
    for trial in plan.trials:
        console.print()
        console.print(_title(trial))
        for codec in trial.codecs:
            if len(trial.codecs) > 1:
                console.print(Text(f"codec {codec}", style="dim"))
            console.print(build_table(trial, codec))
        for line in _remarks(trial, plan):
            console.print(Text(line, style="dim"))


def format_keep_plan(plan: KeepPlan, width: int = PLAIN_WIDTH) -> str:
    """Returns the plan as plain text of at most ``width`` columns."""
    stream = io.StringIO()
    print_keep_plan(plan, Console(file=stream, width=width, color_system=None, highlight=False))
    return stream.getvalue()


def build_table(trial: KeepTrial, codec: str) -> Table:
    """Builds the table of one teacher and codec: a line per policy and loss, the recipe's own in bold."""
    has_cost = any(one.cost is not None for one in trial.candidates)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.padding = (0, 1, 0, 0)
    table.add_column("keep", overflow="fold", min_width=14)
    measures = ["kept", "B/tok", "row B", "TV %", "KL", "angle", "ECE %", "codec TV", "store", "time"]
    for name in [*measures, *(["cost"] if has_cost else [])]:
        table.add_column(Text(name), justify="right", no_wrap=True)
    for one in trial.candidates:
        for position, loss in enumerate(one.losses if one.codec == codec else ()):
            cells = _cells(one, loss, is_first=position == 0, has_cost=has_cost)
            table.add_row(*(Text(cell) for cell in cells), style="bold" if one.is_recipe else "")
    return table


def _cells(one: CandidateTrial, loss: LossTrial, *, is_first: bool, has_cost: bool) -> list[str]:
    distances = [
        f"{100 * loss.total_variation:.2f}",
        _format_nats(loss.kl_to_full),
        ABSENT if loss.gradient_angle is None else f"{loss.gradient_angle:.1f}\N{DEGREE SIGN}",
        format_percent(loss.calibration_error),
    ]
    if not is_first:
        name = "  renormalised" if loss.loss == _RENORMALISED else f"  {loss.loss}"
        return [name, "", "", "", *distances, *([""] * (3 + has_cost))]
    cost = [ABSENT if one.cost is None else f"{one.cost:,.2f}"] if has_cost else []
    return [
        name_policy(one.policy),
        _format_number(one.mean_kept),
        _format_number(one.entry_bytes),
        _format_number(one.row_bytes),
        *distances,
        f"{100 * one.quantisation.total_variation:.3f}",
        format_bytes(one.store_bytes),
        _format_time(one.wall_s),
        *cost,
    ]


def _title(trial: KeepTrial) -> Text:
    corpora = ", ".join(trial.corpus_names)
    facts = [
        f"{trial.corpora.num_tokens:,} tokens of {corpora}",
        f"tried on {trial.sample.num_tokens:,}",
        *([f"codec {trial.codecs[0]}"] if len(trial.codecs) == 1 else []),
    ]
    return Text.assemble((trial.teacher, "bold"), f"  {', '.join(facts)}")


def _remarks(trial: KeepTrial, plan: KeepPlan) -> list[str]:
    threads = f"{trial.num_threads} thread{'s' if trial.num_threads > 1 else ''} of a CPU"
    device = "a GPU" if trial.device == "cuda" else threads
    actors = f"{trial.num_actors} actor{'s' if trial.num_actors > 1 else ''}"
    lines = [
        f"teacher: perplexity {format_perplexity(trial.perplexity)}, "
        f"ECE {format_percent(trial.calibration_error)} %, {format_rate(trial.tokens_per_s)} tokens/s on "
        f"{device}; time with {actors}, {trial.num_shards} shards",
        "B/tok: kept entries; row B: whole row; both a stored position. TV, KL: of what the loss uses to "
        "the whole distribution, before the codec",
        "codec TV: what its rounding adds, in %. ECE: of the teacher's most probable token, with the "
        "probability that is kept of it",
        f"angle: of the gradient to that of whole distributions ({trial.student or 'no student'}, "
        f"{trial.sample.num_positions:,} positions; draws average out with more)",
        "top: ghost_kl, and below it support_kl (renormalised); the others: unbiased_kl",
    ]
    if trial.gpus_per_actor and trial.device == "cpu":
        lines.append("note: there is no GPU here; time is that of a CPU, and GPU hours are not known")
    elif plan.gpu_hour_price is None and trial.gpus_per_actor:
        lines.append("note: give gpu_hour_price in the recipe to see what it costs")
    return lines


def _format_nats(nats: float | None) -> str:
    return INFINITE if nats is None else f"{nats:.3f}"


def _format_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _format_time(seconds: float) -> str:
    """Formats an estimate with two or three digits: ``41 s``, ``12 min``, ``2.3 h``, ``140 h``."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    return f"{seconds:.0f} s"
