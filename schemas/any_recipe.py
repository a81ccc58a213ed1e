"""Recipes of either task, told apart by their field ``task``.

Invariants (tests/schemas/test_any_recipe.py):
    1. A recipe without ``task``, as written before there were language models, is a classifier's.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from schemas.errors import RecipeError
from schemas.language import LanguageRecipe
from schemas.recipe import Recipe

AnyRecipe: TypeAlias = Recipe | LanguageRecipe

RECIPES: Mapping[str, type[Recipe] | type[LanguageRecipe]] = MappingProxyType(
    {"classification": Recipe, "language": LanguageRecipe}
)


def recipe_type(
    document: Mapping[str, Any], *, source: str | None = None
) -> type[Recipe] | type[LanguageRecipe]:
    """Returns what a recipe's document is validated as.

    Args:
        document: The recipe's fields.
        source: Its file, for the error.

    Raises:
        RecipeError: There is no such task.
    """
    task = document.get("task", "classification")
    found = RECIPES.get(task) if isinstance(task, str) else None
    if found is None:
        known = ", ".join(RECIPES)
        raise RecipeError(f"there is no task {task!r}; expected one of {known}", source=source, field="task")
    return found


def expect_classification(recipe: AnyRecipe, command: str) -> Recipe:
    """Returns a classifier's recipe.

    Args:
        recipe: Any.
        command: What wants it, for the error.

    Raises:
        RecipeError: It is a language model's.
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"{command} is for classifiers, and recipe {recipe.name} is one of language models", field="task"
        )
    return recipe
