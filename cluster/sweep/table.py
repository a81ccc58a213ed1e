"""A sweep's findings as tables for a terminal; plain text elsewhere.

Invariants (tests/cluster/sweep/test_table.py):
    1. Names and errors come from users and are never read as markup.
    2. The standard error of the publication's figures stands under every table that shows them.
    3. No line is wider than the console.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.figures import comparison_sentence, dropped_sentence, format_count, format_percent, format_rate
from cluster.sweep.figures import (
    cost_sentence,
    failure_sentence,
    format_accuracy,
    format_gain,
    format_gain_range,
    format_range,
    format_test,
    missing_sentence,
    point_titles,
    published_sentences,
)
from cluster.sweep.result_lines import ResultLine, further_comparisons, list_headlines, list_lines
from cluster.table import describe_corpus
from cluster.table_layout import PLAIN_WIDTH, fit_layout, new_table
from schemas.evaluation import Comparison, CorpusEvaluation
from schemas.sweep_evaluation import PointEvaluation, SweepEvaluation

_MISSING_MARK = " *"
# From the roomiest layout to the narrowest: the gap between columns, and what is left to the page.
_LAYOUTS = (
    (2, ()),
    (1, ()),
    (2, ("params", "ex/s")),
    (1, ("params", "ex/s")),
    (1, ("params", "ex/s", "range")),
)


def print_sweep(evaluation: SweepEvaluation, console: Console | None = None) -> None:
    """Writes a sweep's findings to standard output; 100 columns wide where there is no terminal."""
    if console is None:
        width = None if sys.stdout.isatty() else PLAIN_WIDTH
        console = Console(width=width, highlight=False)
    titles = point_titles(evaluation)
    for point in evaluation.points:
        _print_point(evaluation, point, titles, console)
    if titles:
        _print_points(evaluation, titles, console)
    if evaluation.failures:
        console.print()
        for student in evaluation.failures:
            console.print(Text(failure_sentence(student, titles), style="red"))
    console.print()
    console.print(Text(cost_sentence(evaluation.cost)))


def format_sweep(evaluation: SweepEvaluation, width: int = PLAIN_WIDTH) -> str:
    """Returns a sweep's findings as plain text of at most ``width`` columns."""
    stream = io.StringIO()
    print_sweep(evaluation, Console(file=stream, width=width, color_system=None, highlight=False))
    return stream.getvalue()


def _print_point(
    sweep: SweepEvaluation, point: PointEvaluation, titles: Mapping[str, str], console: Console
) -> None:
    title = titles.get(point.point.name)
    if point.evaluation is None or not point.evaluation.corpora:
        console.print()
        console.print(Text(f"{title or sweep.sweep}: no student was trained"))
        return
    for position, corpus in enumerate(point.evaluation.corpora):
        lines = list_lines(sweep, point, corpus)
        console.print()
        console.print(Text.assemble(f"{title}: " if title else "", describe_corpus(corpus)))
        console.print(fit_layout(console, [_lay_out(lines, *layout) for layout in _LAYOUTS]))
        for line in _remarks(sweep, corpus, lines, is_first=position == 0):
            console.print(Text(line, style="dim"))
    for dropped in point.evaluation.dropped:
        console.print(Text(dropped_sentence(dropped), style="dim"))


def _lay_out(lines: Sequence[ResultLine], gap: int, hidden: Sequence[str]) -> Table:
    is_published = any(line.published_accuracy is not None for line in lines)
    is_seeded = any(line.comparison and len(line.comparison.seeds) > 1 for line in lines)
    names = ["acc. %", "range", "gain", "gain range", "better" if is_seeded else "McNemar"]
    names += ["publ. %", "publ. gain"] if is_published else []
    names += ["params", "ex/s"]
    shown = [name for name in names if name not in hidden]
    headings = {"range": "95 %", "gain range": "95 %"}
    table = new_table([headings.get(name, name) for name in shown], gap)
    for line in lines:
        cells = _cells(line)
        style = "bold" if line.is_main else "dim" if line.is_published_only else ""
        indent = "  " if line.row is not None and line.row.level == 1 else ""
        mark = _MISSING_MARK if line.missing_seeds else ""
        # Text, not markup: names come from users.
        table.add_row(
            Text(f"{indent}{line.label}{mark}"), *(Text(cells[name]) for name in shown), style=style
        )
    return table


def _cells(line: ResultLine) -> dict[str, str]:
    row = line.row
    test = format_test(line.comparison)
    interval = line.comparison.interval if line.comparison else None
    return {
        "acc. %": format_accuracy(row),
        "range": format_range(row.accuracy_interval if row else None),
        "gain": format_gain(line.gain),
        "gain range": format_gain_range(interval),
        "better": test,
        "McNemar": test,
        "publ. %": format_percent(line.published_accuracy),
        "publ. gain": format_gain(line.published_gain),
        "params": format_count(row.num_parameters if row else None),
        "ex/s": format_rate(row.examples_per_s if row else None),
    }


def _remarks(
    sweep: SweepEvaluation, corpus: CorpusEvaluation, lines: Sequence[ResultLine], *, is_first: bool
) -> list[str]:
    seeds = max((len(line.row.seeds) for line in lines if line.row), default=0)
    spread = " ± standard deviation over seeds" if seeds > 1 else ""
    test = "McNemar's exact p" if seeds < 2 else "better: seeds that are better, of all"
    remarks = [
        f"accuracy{spread} with 95 % interval over rows{' and seeds' if seeds > 1 else ''}; "
        f"gain in points over {sweep.baseline}, same rows and seeds; {test}"
    ]
    remarks += [
        f"*{missing_sentence(f' {line.name}', line.missing_seeds)}" for line in lines if line.missing_seeds
    ]
    remarks += published_sentences(sweep.published) if is_first else []
    remarks += [comparison_sentence(one) for one in further_comparisons(sweep, corpus)]
    return remarks + [f"note: {note}" for note in corpus.notes]


def _print_points(sweep: SweepEvaluation, titles: Mapping[str, str], console: Console) -> None:
    """Prints one line per point for the main arm and one for the baseline."""
    console.print()
    console.print(Text("all points", style="bold"))
    console.print(fit_layout(console, [_lay_out_points(sweep, titles, *layout) for layout in _LAYOUTS]))
    first = next(iter(titles.values()))
    remarks = [f"gain in points over {sweep.baseline}"]
    remarks += [f"change: of the arm's accuracy against {first}, same seeds"] if sweep.across else []
    for line in ["; ".join(remarks), *published_sentences(sweep.published)]:
        console.print(Text(line, style="dim"))


def _lay_out_points(
    sweep: SweepEvaluation, titles: Mapping[str, str], gap: int, hidden: Sequence[str]
) -> Table:
    across: dict[tuple[str, str], Comparison] = {(one.point, one.arm): one.comparison for one in sweep.across}
    # Of the narrow layouts the last one leaves out the interval of the accuracy.
    has_range = "range" not in hidden
    headings = ["arm", "acc. %", *(["95 %"] if has_range else []), "gain", "95 %"]
    headings += ["change", "95 %"] if across else []
    table = new_table(headings, gap)
    table.columns[0].header = "point"
    table.columns[1].justify = "left"
    for point in sweep.points:
        lines = list_headlines(sweep, point)
        title = titles[point.point.name]
        if not lines:
            table.add_row(Text(title), Text("no student was trained"))
        for position, line in enumerate(lines):
            cells = _cells(line)
            moved = across.get((point.point.name, line.name))
            change = [format_gain(moved.mean_difference if moved else None)]
            change += [format_gain_range(moved.interval if moved else None)]
            mark = _MISSING_MARK if line.missing_seeds else ""
            shown = [f"{line.name}{mark}", cells["acc. %"], *([cells["range"]] if has_range else [])]
            shown += [cells["gain"], cells["gain range"], *(change if across else [])]
            style = "bold" if line.is_main else ""
            table.add_row(Text("" if position else title), *map(Text, shown), style=style)
    return table
