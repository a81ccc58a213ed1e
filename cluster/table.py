"""The evaluation as a table for a terminal; plain text elsewhere.

Invariant: names come from users and are never read as markup (tests/cluster/test_table.py).
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.figures import (
    comparison_sentence,
    dropped_sentence,
    format_count,
    format_percent,
    format_points,
    format_rate,
    format_ratio,
)
from cluster.language.table import print_language_evaluation
from cluster.table_layout import PLAIN_WIDTH, agreement_cells, agreement_names, fit_table, new_table
from schemas.evaluation import CorpusEvaluation, ModelRow
from schemas.language_evaluation import AnyEvaluation, LanguageRunEvaluation


def print_evaluation(evaluation: AnyEvaluation, console: Console | None = None) -> None:
    """Writes the evaluation to standard output; 100 columns wide where there is no terminal."""
    if console is None:
        width = None if sys.stdout.isatty() else PLAIN_WIDTH
        console = Console(width=width, highlight=False)
    if isinstance(evaluation, LanguageRunEvaluation):
        print_language_evaluation(evaluation, console)
        return
    for corpus in evaluation.corpora:
        console.print()
        console.print(describe_corpus(corpus))
        console.print(build_table(corpus, evaluation.main_arm, console))
        for line in _remarks(corpus):
            console.print(Text(line, style="dim"))
    for dropped in evaluation.dropped:
        console.print(Text(dropped_sentence(dropped), style="dim"))


def format_evaluation(evaluation: AnyEvaluation, width: int = PLAIN_WIDTH) -> str:
    """Returns the evaluation as plain text of at most ``width`` columns."""
    stream = io.StringIO()
    print_evaluation(evaluation, Console(file=stream, width=width, color_system=None, highlight=False))
    return stream.getvalue()


def build_table(corpus: CorpusEvaluation, main_arm: str | None, console: Console) -> Table:
    """Builds the table of one corpus: a line per teacher, ensemble and arm, and per teacher of an arm.

    Args:
        corpus: What to show.
        main_arm: The arm whose line is in bold.
        console: Where it will be shown: if a column of agreement for each teacher is too wide for it,
            one column holds the mean.
    """
    return fit_table(console, lambda each_teacher, gap: _lay_out(corpus, main_arm, each_teacher, gap))


def _lay_out(corpus: CorpusEvaluation, main_arm: str | None, each_teacher: bool, gap: int) -> Table:
    teachers = [row.name for row in corpus.models if row.kind == "teacher"]
    is_ranked = any(row.ranking for row in corpus.models)
    measures = ["acc. %", "F1", "ECE", *(("MRR", "AUC") if is_ranked else ())]
    measures += agreement_names(teachers, each_teacher=each_teacher)
    table = new_table([*measures, "params", "ex/s", "speed"], gap)
    for row in corpus.models:
        if row.level < 2:
            is_main = main_arm is not None and row.arm == main_arm and row.level == 0
            agreement = agreement_cells(row.agreement, teachers, each_teacher=each_teacher)
            cells = _cells(row, agreement, is_ranked=is_ranked)
            # Text, not markup: names come from users.
            table.add_row(*(Text(cell) for cell in cells), style="bold" if is_main else "")
    return table


def _cells(row: ModelRow, agreement: Sequence[str], *, is_ranked: bool) -> list[str]:
    ranked = (row.ranking.mrr, row.ranking.auc) if row.ranking else (None, None)
    return [
        f"  {row.teacher}" if row.level == 1 else row.name,
        f"{format_percent(row.accuracy)} ±{format_points(row.accuracy_stderr)}",
        format_percent(row.macro_f1),
        format_percent(row.ece),
        *(map(format_percent, ranked) if is_ranked else ()),
        *agreement,
        format_count(row.num_parameters),
        format_rate(row.examples_per_s),
        format_ratio(row.speed_ratio),
    ]


def describe_corpus(corpus: CorpusEvaluation) -> Text:
    """Returns the title of a corpus's table: its name, its rows, and its largest class."""
    facts = [f"{corpus.num_rows:,} rows", f"majority {format_percent(corpus.majority_share)} %"]
    facts += [f"{corpus.num_excluded:,} excluded"] if corpus.num_excluded else []
    facts += [f"{corpus.num_unlabelled:,} unlabelled"] if corpus.num_unlabelled else []
    return Text.assemble((corpus.corpus, "bold"), f"  {', '.join(facts)}")


def _remarks(corpus: CorpusEvaluation) -> list[str]:
    lines = [
        "in %: accuracy ± standard error of sampling rows, macro-F1, ECE (15 bins), "
        "=t: agreement with teacher t; speed: to the mean teacher's"
    ]
    spread = [row for row in corpus.models if row.level == 0 and row.accuracy_std is not None]
    if spread:
        deviations = ", ".join(f"{row.name} {format_points(row.accuracy_std)}" for row in spread)
        lines.append(f"standard deviation of the accuracy over {len(spread[0].seeds)} seeds: {deviations}")
    lines += [comparison_sentence(one) for one in corpus.comparisons]
    return lines + [f"note: {note}" for note in corpus.notes]
