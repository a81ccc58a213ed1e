"""The evaluation of a language run as a table for a terminal; plain text elsewhere.

Invariant: names come from users and are never read as markup (tests/cluster/language/test_table.py).
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.figures import format_count, format_percent
from cluster.language.figures import (
    comparison_sentence,
    format_interval,
    format_perplexity,
    format_spread,
    position_noun,
)
from cluster.table_layout import agreement_cells, agreement_names, fit_table, new_table
from schemas.language_evaluation import LanguageCorpusEvaluation, LanguageRunEvaluation


def print_language_evaluation(evaluation: LanguageRunEvaluation, console: Console) -> None:
    """Writes a table for each corpus, and below it what its figures are."""
    for corpus in evaluation.corpora:
        console.print()
        console.print(_title(corpus, evaluation))
        console.print(build_table(corpus, evaluation.main_arm, console))
        for line in _remarks(corpus):
            console.print(Text(line, style="dim"))


def build_table(corpus: LanguageCorpusEvaluation, main_arm: str | None, console: Console) -> Table:
    """Builds the table of one corpus: a line per teacher and per arm, that of ``main_arm`` in bold."""
    return fit_table(console, lambda each_teacher, gap: _lay_out(corpus, main_arm, each_teacher, gap))


def _lay_out(corpus: LanguageCorpusEvaluation, main_arm: str | None, each_teacher: bool, gap: int) -> Table:
    teachers = [row.name for row in corpus.models if row.kind == "teacher"]
    has_seeds = any(row.perplexity_std is not None for row in corpus.models)
    measures = ["perplexity", *(["sd"] if has_seeds else []), "95 % interval", "top-1 %", "ECE"]
    measures += agreement_names(teachers, each_teacher=each_teacher)
    table = new_table([*measures, "params"], gap)
    for row in corpus.models:
        if row.level > 0:
            continue
        cells = [
            row.name,
            format_perplexity(row.perplexity),
            *([format_spread(row.perplexity_std)] if has_seeds else []),
            format_interval(row.perplexity_interval),
            format_percent(row.accuracy),
            format_percent(row.ece),
            *agreement_cells(row.agreement, teachers, each_teacher=each_teacher),
            format_count(row.num_parameters),
        ]
        is_main = row.arm is not None and row.arm == main_arm
        # Text, not markup: names come from users.
        table.add_row(*(Text(cell) for cell in cells), style="bold" if is_main else "")
    return table


def _title(corpus: LanguageCorpusEvaluation, evaluation: LanguageRunEvaluation) -> Text:
    facts = [
        f"{corpus.num_positions:,} {position_noun(evaluation.objective)}",
        f"{corpus.num_chunks:,} chunks of up to {corpus.max_length:,} tokens",
    ]
    facts += [f"{corpus.num_excluded:,} excluded"] if corpus.num_excluded else []
    return Text.assemble((corpus.corpus, "bold"), f"  {', '.join(facts)}")


def _remarks(corpus: LanguageCorpusEvaluation) -> list[str]:
    lines = [
        "top-1: the most probable token is the right one; ECE: 15 bins; =t: same most probable token as t"
    ]
    if any(row.perplexity_std is not None for row in corpus.models):
        lines.append("sd: over seeds, of which the line is the mean")
    lines += [comparison_sentence(one) for one in corpus.comparisons]
    return lines + [f"note: {note}" for note in corpus.notes]
