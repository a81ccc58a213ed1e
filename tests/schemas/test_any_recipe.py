import pytest

from schemas.any_recipe import expect_classification, recipe_type
from schemas.errors import RecipeError
from schemas.language import LanguageRecipe
from schemas.recipe import Recipe


def test_a_recipe_without_a_task_is_a_classifiers() -> None:
    assert recipe_type({"name": "a"}) is Recipe
    assert recipe_type({"task": "classification"}) is Recipe
    assert recipe_type({"task": "language"}) is LanguageRecipe


@pytest.mark.parametrize("task", ["translation", 3, None, ["language"]])
def test_another_task_is_refused_with_the_known_ones(task: object) -> None:
    with pytest.raises(RecipeError, match=r"r.yaml: task: there is no task .*classification, language"):
        recipe_type({"task": task}, source="r.yaml")


def test_a_command_for_classifiers_refuses_a_language_model() -> None:
    recipe = LanguageRecipe.model_validate(
        {
            "task": "language",
            "name": "lm",
            "corpora": {"text": {"parts": [{"kind": "docstrings"}]}},
            "student": {"init": {"kind": "layers", "model": "m"}},
            "stages": [{"corpus": "text", "losses": [{"name": "cross_entropy"}]}],
        }
    )
    with pytest.raises(
        RecipeError, match="export is for classifiers, and recipe lm is one of language models"
    ):
        expect_classification(recipe, "export")
