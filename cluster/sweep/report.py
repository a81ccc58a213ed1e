"""``report.html`` of a sweep: one self-contained page.

Invariants (tests/cluster/sweep/test_report.py):
    1. The page loads nothing, and runs nothing.
    2. Every text of the sweep, its rows' texts and errors included, is escaped.
    3. What a sweep does not have is said or left out; what is damaged raises.
    4. A training that several students share is drawn once, where it first occurs.
    5. At 360 pixels the page does not scroll sideways; wide tables do so in their own box
       (tests/cluster/sweep/test_browser.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from cluster.arms import UNTAUGHT_ARMS
from cluster.curves import Curve, order_curves, read_stage_curve
from cluster.figures import comparison_sentence, format_bytes, format_seconds
from cluster.model_outputs import student_name
from cluster.page import page_environment
from cluster.report_charts import CurveGroup, draw_curves
from cluster.summary import summarise
from cluster.sweep import figures, report_charts
from cluster.sweep.result_lines import ResultLine, further_comparisons, list_headlines, list_lines
from schemas.digest import replace_file
from schemas.evaluation import Comparison, CorpusEvaluation
from schemas.sweep_evaluation import (
    SWEEP_EVALUATION_FILE,
    DisagreedRow,
    PointEvaluation,
    SweepCost,
    SweepEvaluation,
    read_sweep_evaluation,
)

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class CorpusView:
    """One corpus of a point, as its section shows it."""

    corpus: CorpusEvaluation
    lines: tuple[ResultLine, ...]
    published: tuple[str, ...]
    further: tuple[str, ...]
    gains: report_charts.GainPanel | None
    speeds: Markup | None


@dataclass(frozen=True)
class PointView:
    """One point of the grid, as its section shows it.

    Attributes:
        title: Empty where there is one point.
        curve_groups: Of trainings that no earlier point has shown.
        disagreements: Rows by who is right.
    """

    title: str
    point: PointEvaluation
    corpora: tuple[CorpusView, ...]
    curve_groups: tuple[CurveGroup, ...]
    disagreements: tuple[tuple[str, tuple[DisagreedRow, ...]], ...]


@dataclass(frozen=True)
class HeadlineView:
    """A line of the table of all points, and how its arm moved against the first point."""

    title: str
    line: ResultLine | None
    change: Comparison | None


def write_sweep_report(sweep_dir: Path) -> Path:
    """Writes ``report.html`` into a sweep's directory.

    Args:
        sweep_dir: ``<out>/<sweep>``, with ``sweep.json``.

    Returns:
        The page's path.

    Raises:
        DataError: ``sweep.json`` is missing or damaged.
    """
    sweep = read_sweep_evaluation(sweep_dir / SWEEP_EVALUATION_FILE)
    titles = figures.point_titles(sweep)
    environment = page_environment()
    environment.filters |= {
        name.removeprefix("format_"): function
        for name, function in vars(figures).items()
        if name.startswith("format_")
    }
    environment.globals |= {"charts": report_charts, "missing_sentence": figures.missing_sentence}
    page = environment.get_template("sweep.html.j2").render(
        sweep=sweep,
        summary=_summarise(sweep),
        facts=_list_facts(sweep),
        failures=[figures.failure_sentence(student, titles) for student in sweep.failures],
        headlines=_list_headlines(sweep) if titles else [],
        headline_scale=report_charts.headline_scale(sweep),
        axes=report_charts.draw_axes(sweep),
        published=figures.published_sentences(sweep.published),
        points=_view_points(sweep, sweep_dir),
        cost=figures.cost_sentence(sweep.cost),
        costs=_list_costs(sweep.cost),
    )
    path = sweep_dir / REPORT_FILE
    replace_file(path, page.encode())
    return path


def _summarise(sweep: SweepEvaluation) -> list[str]:
    """Returns sentences about the first point, and about who is missing."""
    first = next((point for point in sweep.points if point.evaluation), None)
    if first is None or first.evaluation is None:
        return []
    sentences = summarise(first.evaluation)
    if len(sweep.points) > 1:
        sentences = [f"{len(sweep.points)} points; of the one at {first.point.title}:", *sentences]
    return sentences


def _list_facts(sweep: SweepEvaluation) -> list[str]:
    size = f", size {sweep.size}" if sweep.size else ""
    facts = [f"recipe {sweep.recipe}{size}"]
    facts += [f"seeds {', '.join(map(str, sweep.seeds))}"] if sweep.seeds else []
    facts += [f"folds {', '.join(map(str, sweep.folds))}"] if sweep.folds else []
    return [*facts, f"compared with {sweep.baseline}"]


def _list_headlines(sweep: SweepEvaluation) -> list[HeadlineView]:
    across: dict[tuple[str, str], Comparison] = {(one.point, one.arm): one.comparison for one in sweep.across}
    found = []
    for point in sweep.points:
        lines: Sequence[ResultLine | None] = list_headlines(sweep, point) or [None]
        for position, line in enumerate(lines):
            change = across.get((point.point.name, line.name)) if line else None
            found.append(HeadlineView("" if position else point.point.title, line, change))
    return found


def _view_points(sweep: SweepEvaluation, sweep_dir: Path) -> list[PointView]:
    titles = figures.point_titles(sweep)
    drawn: set[Path] = set()
    return [
        PointView(
            title=titles.get(point.point.name, ""),
            point=point,
            corpora=_view_corpora(sweep, point),
            curve_groups=tuple(_draw_curves(sweep, point, sweep_dir, drawn)),
            disagreements=tuple(_group_disagreements(point.disagreements)),
        )
        for point in sweep.points
    ]


def _view_corpora(sweep: SweepEvaluation, point: PointEvaluation) -> tuple[CorpusView, ...]:
    views = []
    for position, corpus in enumerate(point.evaluation.corpora if point.evaluation else ()):
        lines = list_lines(sweep, point, corpus)
        views.append(
            CorpusView(
                corpus=corpus,
                lines=tuple(lines),
                published=() if position else tuple(figures.published_sentences(sweep.published)),
                further=tuple(comparison_sentence(one) for one in further_comparisons(sweep, corpus)),
                gains=report_charts.draw_gain_panel(lines),
                speeds=report_charts.draw_speeds(corpus, point.main_arm, sweep.baseline),
            )
        )
    return tuple(views)


def _draw_curves(
    sweep: SweepEvaluation, point: PointEvaluation, sweep_dir: Path, drawn: set[Path]
) -> list[CurveGroup]:
    """Draws the trainings of a point's students; adds them to those that are drawn."""
    curves: list[Curve] = []
    for student in sweep.students:
        if student.point != point.point.name:
            continue
        fold = "" if student.fold is None else f"-{student.fold}"
        for stage in (sweep_dir / one for one in student.stages):
            if stage.resolve() in drawn:
                continue
            drawn.add(stage.resolve())
            model = student_name(student.arm, student.teacher)
            curve = read_stage_curve(stage, model=model, seed=f"{student.seed}{fold}")
            curves += [curve] if curve is not None else []
    return draw_curves(order_curves(curves), point.main_arm, UNTAUGHT_ARMS)


def _group_disagreements(rows: Sequence[DisagreedRow]) -> list[tuple[str, tuple[DisagreedRow, ...]]]:
    groups: dict[str, list[DisagreedRow]] = {
        "The student is right": [],
        "The teachers are right": [],
        "Both are wrong": [],
    }
    titles = list(groups)
    for row in rows:
        is_students, is_teachers = (one[0] == row.golden for one in (row.student, row.teachers))
        groups[titles[0 if is_students else 1 if is_teachers else 2]].append(row)
    return [(title, tuple(members)) for title, members in groups.items() if members]


def _list_costs(cost: SweepCost) -> list[tuple[str, str]]:
    """Lists what was measured, name and figure."""
    costs = []
    if cost.num_stores:
        costs += [
            ("teachers", str(cost.num_teachers)),
            ("training of teachers, once each", format_seconds(cost.teacher_training_s)),
            ("passes of teachers, once each", format_seconds(cost.teacher_forward_s)),
            ("stores", f"{cost.num_stores}, {format_bytes(cost.store_bytes)}"),
        ]
    costs += [
        ("students", f"{cost.num_students}, {cost.num_taught} of them taught"),
        ("training of students, each once", format_seconds(cost.student_s)),
    ]
    if cost.resident_s is not None:
        costs.append(
            ("passes of teachers, were they in each student's loop", format_seconds(cost.resident_s))
        )
    return [*costs, ("by the clock", format_seconds(cost.elapsed_s))]
