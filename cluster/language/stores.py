"""The logit stores of a language run: which teacher over which corpus part."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.language.arms import used_teachers
from cluster.language.planning import PlannedText
from cluster.run_context import RunOf
from cluster.teacher_model import TeacherModel
from precompute.chunking import ChunkedPart
from precompute.stores import StoreRequest
from schemas.language import LanguageRecipe


def store_requests(
    run: RunOf[LanguageRecipe], planned: Mapping[str, PlannedText], models: Mapping[str, TeacherModel]
) -> list[StoreRequest]:
    """Lists what each teacher has to run over, leaving out teachers that were not asked for.

    Given stores cost nothing and their cut counts for all teachers, so that they are never left out.
    """
    requests = []
    for name, corpora in used_teachers(run.recipe).items():
        teacher = run.recipe.teacher(name)
        model = models.get(name)
        if teacher.model is not None and (model is None or not _is_wanted(run, name)):
            continue
        requests += [
            make_request(run.recipe, name, model, part)
            for corpus in corpora
            for part in planned[corpus].parts
        ]
    return requests


def make_request(
    recipe: LanguageRecipe, name: str, model: TeacherModel | None, part: ChunkedPart
) -> StoreRequest:
    """Asks for a teacher's store over a part.

    Args:
        recipe: The recipe.
        name: Of its teacher.
        model: Where the teacher lies; None: it has finished stores.
        part: Of one of the recipe's corpora.
    """
    teacher = recipe.teacher(name)
    return StoreRequest(
        # What is run is the converted model.
        teacher if model is None else teacher.model_copy(update={"gguf_file": None}),
        model.path if model else None,
        model.revision if model else None,
        recipe.corpora[part.corpus],
        part,
        recipe.losses_of(name),
    )


def _is_wanted(run: RunOf[LanguageRecipe], name: str) -> bool:
    return not run.options.teachers or name in run.options.teachers
