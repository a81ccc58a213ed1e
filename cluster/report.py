"""``report.html``: one self-contained page about a run, or about a sweep.

Invariants:
    1. The page loads nothing: no script, no link, no image, no font (tests/cluster/test_report.py).
    2. Every text of the run is escaped (tests/cluster/test_report.py).
    3. What a run does not have yet is shown as absent; what is damaged raises
       (tests/cluster/test_report.py).
    4. The page is a function of the run's files: it holds no time of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.curves import Curve, read_student_curves, read_teacher_curves
from cluster.language.summary import summarise_language, untaught_arms
from cluster.page import page_environment
from cluster.report_charts import CurveGroup, draw_curves
from cluster.report_stores import list_run_stores
from cluster.summary import summarise
from cluster.sweep.report import write_sweep_report
from schemas.digest import DocumentError, read_document, replace_file
from schemas.errors import DataError
from schemas.evaluation import EVALUATION_FILE, RunEvaluation
from schemas.language_evaluation import AnyEvaluation, LanguageRunEvaluation, read_any_evaluation
from schemas.sweep_evaluation import SWEEP_EVALUATION_FILE

REPORT_FILE = "report.html"
RECIPE_FILE = "recipe.yaml"
TIMINGS_FILE = "timings.json"


def write_report(run_dir: Path) -> Path:
    """Writes ``report.html`` into a run's directory, or into a sweep's.

    Args:
        run_dir: ``<out>/<name>``, with at least ``recipe.yaml``, or a sweep's with ``sweep.json``.

    Returns:
        The page's path.

    Raises:
        DataError: The directory is no run, or a file of it is damaged.
    """
    if (run_dir / SWEEP_EVALUATION_FILE).exists():
        return write_sweep_report(run_dir)
    recipe_text = _read_recipe(run_dir)
    evaluation = _read_evaluation(run_dir)
    is_language = isinstance(evaluation, LanguageRunEvaluation)
    stores = list_run_stores(run_dir)
    page = (
        page_environment()
        .get_template("report.html.j2")
        .render(
            run=run_dir.absolute().name,
            recipe_text=recipe_text,
            evaluation=evaluation,
            evaluation_template="language.html.j2" if is_language else "classification.html.j2",
            summary=_summarise(evaluation),
            curve_groups=_draw_curves(_read_curves(run_dir, recipe_text), evaluation),
            stores=stores,
            has_tokens=any(one.store.level == "token" for one in stores),
            dropped=evaluation.dropped if isinstance(evaluation, RunEvaluation) else (),
            timings=_read_timings(run_dir / TIMINGS_FILE),
        )
    )
    path = run_dir / REPORT_FILE
    replace_file(path, page.encode())
    return path


def _read_recipe(run_dir: Path) -> str:
    try:
        return (run_dir / RECIPE_FILE).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(
            f"{run_dir}: is no run, it has no {RECIPE_FILE}; name a directory such as runs/quickstart"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{run_dir / RECIPE_FILE}: cannot be read ({error})") from error


def _read_evaluation(run_dir: Path) -> AnyEvaluation | None:
    path = run_dir / EVALUATION_FILE
    return read_any_evaluation(path) if path.exists() else None


def _summarise(evaluation: AnyEvaluation | None) -> list[str]:
    if evaluation is None:
        return []
    if isinstance(evaluation, LanguageRunEvaluation):
        return summarise_language(evaluation)
    return summarise(evaluation)


def _draw_curves(curves: Sequence[Curve], evaluation: AnyEvaluation | None) -> list[CurveGroup]:
    if evaluation is None:
        return draw_curves(curves)
    if isinstance(evaluation, LanguageRunEvaluation):
        return draw_curves(curves, evaluation.main_arm, untaught_arms(evaluation))
    return draw_curves(curves, evaluation.main_arm)


def _read_curves(run_dir: Path, recipe_text: str) -> list[Curve]:
    try:
        recipe = yaml.safe_load(recipe_text)
    except yaml.YAMLError as error:
        raise DataError(f"{run_dir / RECIPE_FILE}: is not YAML ({' '.join(str(error).split())})") from error
    teachers = run_dir.absolute().parent / "teachers"
    known = recipe if isinstance(recipe, dict) else {}
    return read_teacher_curves(teachers, known) + read_student_curves(run_dir / "students")


def _read_timings(path: Path) -> list[dict[str, Any]]:
    """Reads the steps' seconds; what is no step is left out, it is only told to people."""
    try:
        steps = read_document(path).get("steps")
    except (OSError, DocumentError):
        return []
    found = list(_well_formed(steps if isinstance(steps, list) else []))
    longest = max((step["seconds"] for step in found), default=0.0)
    return [{**step, "share": step["seconds"] / longest if longest else 0.0} for step in found]


def _well_formed(steps: Iterable[object]) -> Iterable[dict[str, Any]]:
    for step in steps:
        if isinstance(step, dict) and isinstance(step.get("seconds"), int | float) and "step" in step:
            yield {
                "step": str(step["step"]),
                "seconds": float(step["seconds"]),
                "skipped": bool(step.get("skipped")),
            }
