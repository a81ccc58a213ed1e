"""A small project of language models whose stores have been made by its recipe, without Ray."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.commands import precompute_recipe
from cluster.recipe_file import load_recipe
from cluster.run_context import RunOptions
from schemas.any_recipe import AnyRecipe
from schemas.language import Objective
from tests.cluster.project_stores import use_here_pool
from tests.end_to_end.language_project import LanguageProject


@dataclass(frozen=True)
class LanguageStoresOnDisk:
    """The stores of a project.

    Attributes:
        project: The project; ``recipe_path`` describes it.
        roots: By teacher.
    """

    project: LanguageProject
    recipe_path: str
    roots: dict[str, str]

    @property
    def recipe(self) -> AnyRecipe:
        """The recipe that made the stores."""
        return load_recipe(self.recipe_path)

    def copy(self, directory: Path, teacher: str = "head") -> Path:
        """Copies a store, under its own name, so that it may be damaged."""
        root = Path(self.roots[teacher])
        return Path(shutil.copytree(root, directory / "copies" / root.name))


def make_language_stores(
    directory: Path, objective: Objective = "causal", **recipe: Any
) -> LanguageStoresOnDisk:
    """Makes the stores of a new project; ``recipe`` changes its fields."""
    project = LanguageProject(directory, objective)
    path = project.recipe(**recipe)
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_here_pool(monkeypatch)
        lock = precompute_recipe(load_recipe(path), RunOptions())
    roots = {
        name: root for parts in lock.corpora.values() for part in parts for name, root in part.stores.items()
    }
    return LanguageStoresOnDisk(project, path, roots)
