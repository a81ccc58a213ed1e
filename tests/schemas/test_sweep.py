"""A sweep's file: points of the grid, their names, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from schemas.sweep import Sweep


def sweep(**fields: Any) -> Sweep:
    return Sweep.model_validate({"name": "s", "recipe": "r", **fields})


def test_without_a_grid_there_is_the_recipe_alone() -> None:
    (point,) = sweep().points()
    assert (point.name, point.title, point.overrides) == ("base", "base", {})


def test_points_are_the_product_in_the_order_written() -> None:
    points = sweep(grid={"stages.1.alpha": [0.9, 0.5], "student.init.layers": [1, 3]}).points()
    assert [point.name for point in points] == [
        "alpha=0.9,layers=1",
        "alpha=0.9,layers=3",
        "alpha=0.5,layers=1",
        "alpha=0.5,layers=3",
    ]
    assert points[1].overrides == {"stages.1.alpha": 0.9, "student.init.layers": 3}
    assert points[1].title == "alpha 0.9, layers 3"


def test_several_grids_are_taken_one_after_another_and_a_point_twice_is_one() -> None:
    points = sweep(grid=[{}, {"a.b": [1, 2]}, {"a.b": [2, 3]}]).points()
    assert [point.name for point in points] == ["base", "b=1", "b=2", "b=3"]


def test_a_named_group_moves_several_fields_together() -> None:
    group = {"one": {"x.teachers": ["t"], "y.teachers": ["t"]}, "none": {}}
    points = sweep(grid={"teachers": group}).points()
    assert [point.name for point in points] == ["teachers=one", "teachers=none"]
    assert points[0].overrides == {"x.teachers": ["t"], "y.teachers": ["t"]}


def test_a_points_name_is_safe_for_a_directory_and_still_its_own() -> None:
    names = [
        point.name
        for point in sweep(grid={"a": [["x/y", 1], ["x\\y", 1], "../..", "n" * 200, "n" * 201]}).points()
    ]
    assert len(set(names)) == 5
    assert all("/" not in name and "\\" not in name and len(name) < 100 for name in names)
    assert all(name.strip(".") for name in names)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": [1, 2, 1]}, "seeds: 1 is given twice"),
        ({"folds": [0, 0]}, "folds: 0 is given twice"),
        ({"grid": {"stages.1.alpha": []}}, "grid.stages.1.alpha: has no values"),
        ({"gird": {}}, "gird"),
        ({"students": {"at_once": 0}}, "at_once"),
        ({"baseline": "gold"}, "baseline"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        sweep(**fields)
