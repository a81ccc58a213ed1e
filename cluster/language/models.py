"""The models of a language run as directories: those of the teachers, and what the student starts from.

A GGUF file is written again as safetensors, once; everything after that reads the directory.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.language.model_files import local_model
from cluster.run_directory import RunDirectory
from cluster.teacher_model import TeacherModel
from precompute.generation import hash_model
from schemas.language import LanguageConfigInit, LanguageLayersInit, LanguageRecipe


def find_teachers(
    recipe: LanguageRecipe, directory: RunDirectory, names: Iterable[str]
) -> dict[str, TeacherModel]:
    """Returns the model of each named teacher that has one.

    Raises:
        RecipeError: A model does not exist.
        TeacherError: A GGUF file cannot be read.
    """
    models = {}
    for name in names:
        teacher = recipe.teacher(name)
        if teacher.model is None:
            continue
        path = local_model(
            teacher.model,
            teacher.revision,
            teacher.gguf_file,
            directory.cache,
            field=f"teachers.{name}.model",
        )
        models[name] = TeacherModel(path, None if teacher.gguf_file else teacher.revision)
    return models


def find_init(
    recipe: LanguageRecipe, directory: RunDirectory
) -> tuple[LanguageLayersInit | LanguageConfigInit, str | None]:
    """Returns what the student starts from, models as directories, and the hash of its initial weights.

    Raises:
        RecipeError: A model does not exist.
        TeacherError: It has no weights, or its GGUF file cannot be read.
    """
    init = recipe.student.init
    is_layers = isinstance(init, LanguageLayersInit)
    field = "model" if isinstance(init, LanguageLayersInit) else "tokenizer"
    path = local_model(
        getattr(init, field), init.revision, init.gguf_file, directory.cache, field=f"student.init.{field}"
    )
    revision = None if init.gguf_file else init.revision
    found = init.model_copy(update={field: path, "gguf_file": None, "revision": revision})
    if not is_layers:
        return found, None
    return found, hash_model(path, revision, directory.hash_cache)
