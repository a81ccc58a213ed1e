"""The stores that a recipe makes, teacher by teacher, without training or running anything."""

from __future__ import annotations

from typing import Protocol

from cluster.arms import used_teachers
from cluster.planning import PlannedCorpus
from cluster.run_directory import RunDirectory
from cluster.teacher_model import TeacherModel
from cluster.teacher_step import describe_training
from precompute.corpus import materialise_corpus
from precompute.stores import StoreRequest
from schemas.model_ref import resolve_model
from schemas.recipe import Recipe, Teacher
from schemas.records import Level

Pair = tuple[str, str]
"""Teacher and corpus."""


class RecipeStores(Protocol):
    """The stores of a recipe of one task.

    Attributes:
        untrained: Teachers whose trained model is not there, and where it would be.
    """

    untrained: dict[str, str]

    @property
    def level(self) -> Level:
        """Of all its stores."""

    def pairs(self) -> list[Pair]:
        """Lists which teacher runs over which corpus."""

    def requests(self, teacher: str, corpus: str) -> list[StoreRequest]:
        """Returns one request per part; none for a teacher without a model that is there.

        Raises:
            TmkdError: The corpus or the model cannot be read.
        """


class ClassifierStores:
    """A ``RecipeStores`` of classifiers.

    Attributes:
        untrained: See ``RecipeStores``.
    """

    level: Level = "classification"

    def __init__(self, recipe: Recipe) -> None:
        self.untrained: dict[str, str] = {}
        self._recipe = recipe
        self._directory = RunDirectory.of(recipe)
        self._planned: dict[str, PlannedCorpus] = {}

    def pairs(self) -> list[Pair]:
        """See ``RecipeStores``."""
        return [(name, corpus) for name, corpora in used_teachers(self._recipe).items() for corpus in corpora]

    def requests(self, teacher: str, corpus: str) -> list[StoreRequest]:
        """See ``RecipeStores``."""
        described = self._recipe.teacher(teacher)
        model = self._find_model(described)
        if model is None:
            return []
        fields = (described, model.path, model.revision, self._recipe.corpora[corpus])
        return [StoreRequest(*fields, part) for part in self._plan(corpus).parts]

    def _find_model(self, teacher: Teacher) -> TeacherModel | None:
        if teacher.model is None:
            return None
        path = resolve_model(teacher.model, field=f"teachers.{teacher.name}.model")
        if teacher.train is None:
            return TeacherModel(path, teacher.revision)
        corpus = self._plan(teacher.train.corpus)
        _, trained = describe_training(self._recipe, self._directory, teacher, path, corpus)
        if trained.exists():
            return TeacherModel(str(trained))
        self.untrained[teacher.name] = str(trained)
        return None

    def _plan(self, corpus: str) -> PlannedCorpus:
        if corpus not in self._planned:
            recipe = self._recipe
            parts = materialise_corpus(
                corpus, recipe.corpora[corpus], data_root=recipe.data_root, out=self._directory.out
            )
            self._planned[corpus] = PlannedCorpus(parts)
        return self._planned[corpus]
