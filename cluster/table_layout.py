"""The layout that the tables of all evaluations share: plain lines, right-aligned measures, agreement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.figures import format_percent

PLAIN_WIDTH = 100
_MIN_NAME_WIDTH = 12
_UNBOUNDED = 1000


def fit_table(console: Console, lay_out: Callable[[bool, int], Table]) -> Table:
    """Returns the roomiest layout that fits.

    Args:
        console: Where it will be shown.
        lay_out: Makes the table, given whether each teacher has a column of agreement (or else one column
            holds the mean), and the gap between columns.
    """
    layouts = ((True, 2), (True, 1), (False, 2), (False, 1))
    return fit_layout(console, [lay_out(each_teacher, gap) for each_teacher, gap in layouts])


def fit_layout(console: Console, tables: Sequence[Table]) -> Table:
    """Returns the first of several layouts that fits the console, or else the last."""
    options = console.options.update(width=_UNBOUNDED)
    fitting = (table for table in tables if console.measure(table, options=options).maximum <= console.width)
    return next(fitting, tables[-1])


def new_table(measures: Sequence[str], gap: int) -> Table:
    """Returns an empty table of models and measures."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.padding = (0, gap - 1, 0, 0)
    table.add_column("model", overflow="fold", min_width=_MIN_NAME_WIDTH)
    for name in measures:
        table.add_column(Text(name), justify="right", no_wrap=True)
    return table


def agreement_names(teachers: Sequence[str], *, each_teacher: bool) -> list[str]:
    """Returns the titles of the columns of agreement."""
    if not teachers:
        return []
    return [f"={name}" for name in teachers] if each_teacher else ["=mean"]


def agreement_cells(
    agreement: Mapping[str, float], teachers: Sequence[str], *, each_teacher: bool
) -> list[str]:
    """Returns a model's cells below ``agreement_names``."""
    if each_teacher or not teachers:
        return [format_percent(agreement.get(name)) for name in teachers]
    return [format_percent(fmean(agreement.values()) if agreement else None)]
