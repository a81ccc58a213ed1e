"""A sweep's file, and its cells: one recipe for each grid point and fold.

Invariants (tests/cluster/sweep/test_points.py):
    1. Every cell's recipe is valid before anything runs; what is not names the sweep's file, the axis
       or field, and what was expected.
    2. All cells share the output root, and so teachers, stores and students.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.recipe_file import apply_override, explain_validation, load_document, parse_recipe, set_field
from cluster.run_directory import RunDirectory
from schemas.any_recipe import expect_classification
from schemas.errors import RecipeError
from schemas.recipe import Recipe
from schemas.sweep import GridPoint, Sweep

CELLS_DIRECTORY = "cells"


@dataclass(frozen=True)
class Cell:
    """One point of the grid, on one fold.

    Attributes:
        fold: None where the sweep has no folds.
        recipe: With the point's changes.
        directory: ``<out>/<sweep>/cells/<point>[/fold-<n>]`` in place of a run's.
    """

    point: GridPoint
    fold: int | None
    recipe: Recipe
    directory: RunDirectory

    @property
    def name(self) -> str:
        """``layers=3`` or ``layers=3/fold-0``."""
        return cell_name(self.point.name, self.fold)


def cell_name(point: str, fold: int | None) -> str:
    """Returns a cell's name, which is also its directory's below ``<sweep>/cells``."""
    return point if fold is None else f"{point}/fold-{fold}"


def load_sweep(source: str, *, size: str | None = None) -> Sweep:
    """Reads a sweep's file; its recipe's path comes back relative to the working directory.

    Args:
        source: A path, or the name of a sweep that ships with tmkd, such as ``qnli_sweep``.
        size: One of the file's ``sizes``.

    Raises:
        RecipeError: The file is missing, no YAML mapping, or does not describe a sweep.
    """
    document = load_document(source, size=size)
    try:
        sweep = Sweep.model_validate(document)
    except ValidationError as error:
        raise explain_validation(error, source, Sweep.model_json_schema()) from error
    beside = Path(source).parent / sweep.recipe
    return sweep.model_copy(update={"recipe": str(beside)}) if beside.is_file() else sweep


def make_cells(
    sweep: Sweep, *, source: str, overrides: Sequence[str] = (), out: str | None = None
) -> tuple[Cell, ...]:
    """Makes the recipes of all points and folds.

    Args:
        sweep: The sweep.
        source: Its file, for errors.
        overrides: ``dotted.path=value`` each: of the recipe, after the sweep's own and before the grid's.
        out: Overrides the recipe's output root.

    Raises:
        RecipeError: A field of the grid is unknown, a value does not fit, or two points do not share
            their output root.
    """
    base = load_document(sweep.recipe, size=sweep.size)
    _set_fields(base, sweep.overrides, source, "overrides")
    for override in overrides:
        apply_override(base, override)
    if sweep.seeds:
        set_field(base, "compare.seeds", list(sweep.seeds))
    if out is not None:
        base["out"] = out
    cells = [
        _make_cell(sweep, base, point, fold, source)
        for point in sweep.points()
        for fold in (sweep.folds or (None,))
    ]
    roots = {cell.directory.out for cell in cells}
    if len(roots) > 1:
        raise RecipeError("the grid changes `out`; all points share one", source=source, field="grid")
    for cell in cells:
        arms = (cell.recipe.student.arm, *cell.recipe.compare.arms)
        if sweep.baseline not in arms:
            raise RecipeError(
                f"the recipe has no arm {sweep.baseline}; it has {', '.join(arms)}",
                source=source,
                field="baseline",
            )
    return tuple(cells)


def _make_cell(sweep: Sweep, base: dict[str, Any], point: GridPoint, fold: int | None, source: str) -> Cell:
    document = copy.deepcopy(base)
    where = "grid" if point.coordinates else "recipe"
    _set_fields(document, point.overrides, source, "grid")
    if fold is not None:
        _set_fold(document, fold, source)
    try:
        recipe = expect_classification(parse_recipe(document), "a sweep")
    except RecipeError as error:
        at = f"{where} ({point.title})" if point.coordinates else f"{where} {sweep.recipe}"
        raise RecipeError(error.message, source=source, field=at) from error
    shared = RunDirectory.of(recipe)
    cell = Cell(point, fold, recipe, shared)
    run = shared.out / sweep.name / CELLS_DIRECTORY / cell.name
    return replace(cell, directory=replace(shared, run=run))


def _set_fields(document: dict[str, Any], fields: Mapping[str, Any], source: str, where: str) -> None:
    for path, value in fields.items():
        try:
            set_field(document, path, copy.deepcopy(value))
        except RecipeError as error:
            message = error.message.removeprefix(f"{path}: ").removeprefix(f"--set {path}: ")
            raise RecipeError(message, source=source, field=f"{where}.{path}") from error


def _set_fold(document: dict[str, Any], fold: int, source: str) -> None:
    folds = [
        part["fold"]
        for corpus in document.get("corpora", {}).values()
        for part in corpus.get("parts", ())
        if isinstance(part.get("fold"), dict)
    ]
    if not folds:
        raise RecipeError("no part of the recipe's corpora has a fold", source=source, field="folds")
    for described in folds:
        described["index"] = fold
