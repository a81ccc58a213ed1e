"""``report.html``: one self-contained page about a run.

Invariants:
    1. The page loads nothing: no script, no link, no image, no font (tests/cluster/test_report.py).
    2. Every text of the run is escaped (tests/cluster/test_report.py).
    3. What a run does not have yet is shown as absent; what is damaged raises
       (tests/cluster/test_report.py).
    4. The page is a function of the run's files: it holds no time of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from cluster import figures
from cluster.curves import Curve, read_student_curves, read_teacher_curves
from cluster.report_charts import draw_curves, draw_reliabilities, shade, strip_axis, strip_of
from cluster.run_directory import read_lock_file
from cluster.store_listing import ListedStore, list_stores
from cluster.summary import find_student, summarise
from schemas.digest import DocumentError, read_document, replace_file
from schemas.errors import DataError, ResourceError
from schemas.evaluation import EVALUATION_FILE, RunEvaluation, read_evaluation
from schemas.records import LOCK_FILE

REPORT_FILE = "report.html"
RECIPE_FILE = "recipe.yaml"
TIMINGS_FILE = "timings.json"


def write_report(run_dir: Path) -> Path:
    """Writes ``report.html`` into a run's directory.

    Args:
        run_dir: ``<out>/<name>``, with at least ``recipe.yaml``.

    Returns:
        The page's path.

    Raises:
        DataError: The directory is no run, or a file of it is damaged.
    """
    recipe_text = _read_recipe(run_dir)
    evaluation = _read_evaluation(run_dir)
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            run=run_dir.absolute().name,
            recipe_text=recipe_text,
            evaluation=evaluation,
            summary=summarise(evaluation) if evaluation else [],
            curve_groups=draw_curves(
                _read_curves(run_dir, recipe_text), evaluation.main_arm if evaluation else None
            ),
            stores=_list_run_stores(run_dir),
            timings=_read_timings(run_dir / TIMINGS_FILE),
        )
    )
    path = run_dir / REPORT_FILE
    replace_file(path, page.encode())
    return path


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("cluster"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        name.removeprefix("format_"): function
        for name, function in vars(figures).items()
        if name.startswith("format_")
    }
    environment.globals |= {
        "comparison_sentence": figures.comparison_sentence,
        "dropped_sentence": figures.dropped_sentence,
        "draw_reliabilities": draw_reliabilities,
        "find_student": find_student,
        "shade": shade,
        "strip_axis": strip_axis,
        "strip_of": strip_of,
        "absent": figures.ABSENT,
    }
    return environment


def _read_recipe(run_dir: Path) -> str:
    try:
        return (run_dir / RECIPE_FILE).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(
            f"{run_dir}: is no run, it has no {RECIPE_FILE}; name a directory such as runs/quickstart"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{run_dir / RECIPE_FILE}: cannot be read ({error})") from error


def _read_evaluation(run_dir: Path) -> RunEvaluation | None:
    path = run_dir / EVALUATION_FILE
    return read_evaluation(path) if path.exists() else None


def _read_curves(run_dir: Path, recipe_text: str) -> list[Curve]:
    try:
        recipe = yaml.safe_load(recipe_text)
    except yaml.YAMLError as error:
        raise DataError(f"{run_dir / RECIPE_FILE}: is not YAML ({' '.join(str(error).split())})") from error
    teachers = run_dir.absolute().parent / "teachers"
    known = recipe if isinstance(recipe, dict) else {}
    return read_teacher_curves(teachers, known) + read_student_curves(run_dir / "students")


def _list_run_stores(run_dir: Path) -> list[ListedStore]:
    """Lists the stores that the run's lock names; one that is gone is a row that says so."""
    if not (run_dir / LOCK_FILE).exists():
        return []
    lock = read_lock_file(run_dir / LOCK_FILE)
    listed = []
    for corpus, parts in lock.corpora.items():
        for part in parts:
            for teacher, root in part.stores.items():
                found = _list_one(root)
                gone = ListedStore(
                    path=root,
                    teacher=teacher,
                    corpus=corpus,
                    part=part.part,
                    plan_hash=part.plan_hash,
                    problem="not there any more",
                )
                listed += found or [gone]
    return listed


def _list_one(root: str) -> list[ListedStore]:
    try:
        return list_stores(root)
    except (DataError, ResourceError):
        # Gone, or out of reach from here.
        return []


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
