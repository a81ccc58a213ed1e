"""``SWEEP.yaml``: one recipe, a grid of changes to it, and the seeds of every student.

Teachers and stores are made once for all points that share them; students that two points share are
trained once.

Invariants (tests/schemas/test_sweep.py):
    1. The points of a grid are the products of each of its mappings, in the order in which they are
       written, each point once.
    2. A point's name says what differs from the recipe, and is a name of a directory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from schemas.fields import Arm, Count, Frozen, Gpus, Name, RunName

GridValues = tuple[Any, ...] | dict[str, dict[str, Any]]
"""Of one axis: values of the field that names it, or named groups of fields with their values."""

_UNSAFE = re.compile(r"[^A-Za-z0-9.=,_-]+")
_MAX_NAME = 80


class Published(Frozen):
    """Figures of a publication, to stand beside ours.

    Attributes:
        source: Such as ``Yang et al., WSDM 2020, table 4``.
        num_rows: Rows that they were measured on; the table states the standard error that follows.
        accuracy: In percent, by arm, or any other name for a line of its own.
        examples_per_s: Likewise.
        note: What a reader must know.
    """

    source: str
    num_rows: Count | None = None
    accuracy: dict[str, Annotated[float, Field(ge=0, le=100)]]
    examples_per_s: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    note: str | None = None


class StudentResources(Frozen):
    """What one student of a sweep takes while it trains, and how many train side by side.

    Attributes:
        at_once: Students side by side, as Ray tasks; 1: one after another, without Ray.
        cpus: CPUs of one student, which are also its threads; by default the machine's CPUs divided by
            ``at_once``.
        gpus: GPUs of one student.
    """

    at_once: Count = 1
    cpus: Count | None = None
    gpus: Gpus = 0


class Sweep(Frozen):
    """A sweep.

    Attributes:
        name: The sweep's directory is ``<out>/<name>``.
        recipe: Path of the base recipe, relative to this file, or the name of a shipped one.
        size: The recipe's size, if it has sizes.
        overrides: ``dotted.path: value`` of fields of the recipe, before the grid's.
        seeds: Of every student; by default the recipe's.
        grid: A mapping from axes to values, or a list of such mappings: all of their points. An axis is
            a dotted field of the recipe with a list of values, or any name with a mapping from names to
            ``{dotted.path: value}``. Empty: the recipe alone.
        folds: Folds of cross-validation: each point is run once per fold, and the held-out rows of all
            of them are scored together.
        baseline: The arm that others are compared with.
        students: Resources.
        published: Figures to stand beside ours.
    """

    name: RunName
    recipe: str
    size: Name | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    grid: dict[str, GridValues] | tuple[dict[str, GridValues], ...] = Field(default_factory=dict)
    folds: tuple[Annotated[int, Field(ge=0)], ...] = ()
    baseline: Arm = "golden"
    students: StudentResources = Field(default_factory=StudentResources)
    published: Published | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for field in ("seeds", "folds"):
            values = getattr(self, field)
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f"{field}: {twice} is given twice")
        for grid in self._grids():
            empty = next((axis for axis, values in grid.items() if not values), None)
            if empty is not None:
                raise ValueError(f"grid.{empty}: has no values")
        return self

    def points(self) -> tuple[GridPoint, ...]:
        """Returns the grid's points, each once; one without changes where there is no grid."""
        found: dict[str, GridPoint] = {}
        for grid in self._grids() or ({},):
            for choice in itertools.product(*(_axis_points(axis, values) for axis, values in grid.items())):
                point = GridPoint(
                    coordinates={axis: name for axis, name, _ in choice},
                    overrides={path: value for _, _, changes in choice for path, value in changes.items()},
                )
                found.setdefault(point.name, point)
        return tuple(found.values())

    def _grids(self) -> tuple[dict[str, GridValues], ...]:
        if isinstance(self.grid, Mapping):
            return (self.grid,) if self.grid else ()
        return self.grid


class GridPoint(Frozen):
    """One point of a grid.

    Attributes:
        coordinates: From axis to the value's or group's name.
        overrides: ``dotted.path: value``.
    """

    coordinates: dict[str, str] = Field(default_factory=dict)
    overrides: dict[str, Any] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        """Such as ``alpha=0.5,layers=3``, safe as the name of a directory; ``base`` without axes."""
        if not self.coordinates:
            return "base"
        text = ",".join(f"{_short(axis)}={name}" for axis, name in self.coordinates.items())
        safe = _UNSAFE.sub("_", text)
        if safe == text and len(safe) <= _MAX_NAME:
            return safe
        digest = hashlib.sha256(json.dumps(self.coordinates, sort_keys=True).encode()).hexdigest()[:8]
        return f"{safe[:_MAX_NAME]}-{digest}"

    @property
    def title(self) -> str:
        """Such as ``alpha 0.5, layers 3``, for people; ``base`` without axes."""
        parts = [f"{_short(axis)} {name}" for axis, name in self.coordinates.items()]
        return ", ".join(parts) or "base"


def _axis_points(axis: str, values: GridValues) -> Iterator[tuple[str, str, dict[str, Any]]]:
    if isinstance(values, Mapping):
        for name, changes in values.items():
            yield axis, name, dict(changes)
        return
    for value in values:
        yield axis, value if isinstance(value, str) else json.dumps(value), {axis: value}


def _short(axis: str) -> str:
    """Returns the last step of a dotted path that is a name."""
    steps = [step for step in axis.split(".") if not step.isdigit()]
    return steps[-1] if steps else axis
