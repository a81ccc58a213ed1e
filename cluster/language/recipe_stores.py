"""The stores that a language recipe makes, teacher by teacher, without running anything."""

from __future__ import annotations

from cluster.language.arms import used_teachers
from cluster.language.models import find_teachers
from cluster.language.planning import PlannedText, cut_corpus
from cluster.language.stores import make_request
from cluster.recipe_stores import Pair
from cluster.run_directory import RunDirectory
from precompute.stores import StoreRequest
from schemas.language import LanguageRecipe
from schemas.records import Level


class LanguageStores:
    """A ``RecipeStores`` of language models.

    Attributes:
        untrained: None ever is: language models are not trained as teachers.
    """

    level: Level = "token"

    def __init__(self, recipe: LanguageRecipe) -> None:
        self.untrained: dict[str, str] = {}
        self._recipe = recipe
        self._directory = RunDirectory.of(recipe)
        self._planned: dict[str, PlannedText] = {}

    def pairs(self) -> list[Pair]:
        """See ``RecipeStores``."""
        return [(name, corpus) for name, corpora in used_teachers(self._recipe).items() for corpus in corpora]

    def requests(self, teacher: str, corpus: str) -> list[StoreRequest]:
        """See ``RecipeStores``."""
        model = find_teachers(self._recipe, self._directory, (teacher,)).get(teacher)
        if model is None:
            return []
        if corpus not in self._planned:
            self._planned[corpus] = cut_corpus(self._recipe, self._directory, corpus)
        return [make_request(self._recipe, teacher, model, part) for part in self._planned[corpus].parts]
