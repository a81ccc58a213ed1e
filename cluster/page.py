"""What the pages of runs and sweeps have in common.

Invariant: every text of a run is escaped (tests/cluster/test_report.py, tests/cluster/sweep/test_report.py).
"""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from cluster import figures
from cluster.language import figures as language_figures
from cluster.language import report_charts as language_charts
from cluster.language.summary import find_language_student
from cluster.report_charts import draw_reliabilities, shade, strip_axis, strip_of
from cluster.summary import find_student


def page_environment() -> Environment:
    """Returns the environment of all pages: their templates, how figures are written, and their charts."""
    environment = Environment(
        loader=PackageLoader("cluster"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        name.removeprefix("format_"): function
        for module in (figures, language_figures)
        for name, function in vars(module).items()
        if name.startswith("format_")
    }
    environment.globals |= {
        "dropped_sentence": figures.dropped_sentence,
        "draw_reliabilities": draw_reliabilities,
        "find_student": find_student,
        "shade": shade,
        "strip_axis": strip_axis,
        "strip_of": strip_of,
        "absent": figures.ABSENT,
        "language": language_charts,
        "find_language_student": find_language_student,
        "position_noun": language_figures.position_noun,
    }
    return environment
