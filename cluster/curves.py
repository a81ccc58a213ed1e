"""Learning curves, read from the trainer's ``metrics.jsonl`` files.

Invariant: a line that is torn, or lacks a key, costs that point and nothing else
(tests/cluster/test_report.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.metrics_log import read_lines
from schemas.job import JOB_FILE

METRICS_FILE = "metrics.jsonl"
# The first that a log has is shown; perplexity is in those of language models alone.
METRICS = ("perplexity", "accuracy", "macro_f1", "soft_loss", "loss")
_MAX_POINTS = 150
TEACHERS_GROUP = "Fine-tuning of teachers"
_STAGE_NAMES = {"pretrain": "Pre-training", "finetune": "Fine-tuning"}

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One training run of one model.

    Attributes:
        group: What models are trained side by side for, such as ``Fine-tuning on qnli``.
        model: A teacher's name or a student's, such as ``1-o-1/a``, without its seed.
        seed: As it is named, or empty.
        losses: (step, training loss), averaged over at most 150 stretches of steps.
        metric: What ``values`` hold, on the held-out rows: one of ``METRICS``.
        best_step: Of the last evaluation's record.
    """

    group: str
    model: str
    seed: str
    losses: Points
    metric: str | None = None
    values: Points = field(default_factory=list)
    best_step: float | None = None

    @property
    def best_value(self) -> float | None:
        """The value at the best step, or the last one where no best step is recorded."""
        at_best = [value for step, value in self.values if step == self.best_step]
        return at_best[-1] if at_best else (self.values[-1][1] if self.values else None)


def read_student_curves(students: Path) -> list[Curve]:
    """Reads ``<arm>/[<teacher>/]seed-<n>/<stage>/metrics.jsonl`` below the students' directory."""
    curves = []
    for path in sorted(students.glob(f"**/seed-*/*/{METRICS_FILE}")):
        *model, seed, _, _ = path.relative_to(students).parts
        curve = read_stage_curve(path.parent, model="/".join(model), seed=seed.removeprefix("seed-"))
        curves += [curve] if curve is not None else []
    return order_curves(curves)


def read_stage_curve(stage: Path, *, model: str, seed: str) -> Curve | None:
    """Reads the log of a stage's directory; None if it holds no point."""
    group = _name_stage(stage.name, _read_json(stage / JOB_FILE))
    return read_curve(stage / METRICS_FILE, group=group, model=model, seed=seed)


def order_curves(curves: Iterable[Curve]) -> list[Curve]:
    """Puts pre-training first.

    An arm without stage 1 counts its stages from another start, so that names decide, not numbers.
    """
    return sorted(curves, key=lambda curve: not curve.group.startswith(_STAGE_NAMES["pretrain"]))


def read_teacher_curves(teachers: Path, recipe: Mapping[str, Any]) -> list[Curve]:
    """Reads the training of the recipe's teachers; other runs' teachers lie beside them.

    A training belongs to a teacher if its job has the teacher's name and the training fields that
    the recipe gives.
    """
    wanted = {
        f"teachers/{teacher['name']}": teacher["train"]
        for teacher in _dicts(recipe.get("teachers"))
        if "name" in teacher and isinstance(teacher.get("train"), dict)
    }
    curves = []
    for path in sorted(teachers.glob(f"*/train/{METRICS_FILE}")):
        job = _read_json(path.with_name(JOB_FILE))
        name = str(job.get("name", ""))
        if name in wanted and _is_part(wanted[name], job.get("training")):
            curve = read_curve(path, group=TEACHERS_GROUP, model=name.removeprefix("teachers/"), seed="")
            curves += [curve] if curve is not None else []
    return curves


def read_curve(path: Path, *, group: str, model: str, seed: str) -> Curve | None:
    """Reads one log; None if it holds no point."""
    lines = list(read_lines(path))
    steps = [line for line in lines if not _is_evaluation(line)]
    evaluations = [_strip_prefix(line) for line in lines if _is_evaluation(line)]
    metric = next((name for name in METRICS if any(_is_number(one.get(name)) for one in evaluations)), None)
    losses = _thin(_points(steps, "loss"))
    values = _points(evaluations, metric) if metric else []
    if not losses and not values:
        return None
    best = [one["best_step"] for one in evaluations if _is_number(one.get("best_step"))]
    return Curve(group, model, seed, losses, metric, values, float(best[-1]) if best else None)


def _name_stage(directory: str, job: Mapping[str, Any]) -> str:
    kind = directory.rsplit("-", 1)[-1]
    training = job.get("training")
    corpus = training.get("corpus") if isinstance(training, dict) else None
    if job.get("task") == "language" and corpus is not None:
        return f"Stage {kind}: training on {corpus}"
    if kind not in _STAGE_NAMES and "alpha" in job:
        # A directory that is named by a fingerprint says nothing; soft labels alone are pre-training.
        kind = "pretrain" if job["alpha"] == 1.0 else "finetune"
    if kind not in _STAGE_NAMES or corpus is None:
        return directory
    return f"{_STAGE_NAMES[kind]} on {corpus}"


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    return line.get("kind") == "evaluation" or any(key.startswith("selection_") for key in line)


def _strip_prefix(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("selection_"): value for key, value in line.items()}


def _points(lines: Iterable[Mapping[str, Any]], key: str) -> Points:
    return [
        (float(line["step"]), float(line[key]))
        for line in lines
        if _is_number(line.get("step")) and _is_number(line.get(key))
    ]


def _thin(points: Points) -> Points:
    """Averages neighbours, so that a long training is no thicket of ink."""
    size = math.ceil(len(points) / _MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)] if size else []
    return [
        (sum(step for step, _ in group) / len(group), sum(value for _, value in group) / len(group))
        for group in groups
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_part(wanted: Mapping[str, Any], found: object) -> bool:
    return isinstance(found, dict) and all(
        found[key] == value for key, value in wanted.items() if key in found
    )


def _dicts(value: object) -> Sequence[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
