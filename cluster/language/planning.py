"""Planning of a language run: each corpus that it uses, cut into chunks once and locked to the run.

Invariants (tests/cluster/language/test_planning.py):
    1. All corpora are cut by the student's tokenizer.
    2. No document of an evaluation corpus is trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cluster.console import say
from cluster.language.models import find_init
from cluster.leakage import find_shared_rows, write_rows
from cluster.planning import check_corpora_lock
from cluster.run_directory import RunDirectory
from precompute.chunking import ChunkedPart, chunk_part, describe_chunks
from precompute.documents import materialise_documents
from precompute.tokenizer import load_tokenizer
from schemas.chunks import ChunkSpec, open_chunks
from schemas.errors import RecipeError
from schemas.language import LanguageConfigInit, LanguageLayersInit, LanguageRecipe
from schemas.rows import open_rows


@dataclass(frozen=True)
class PlannedText:
    """A corpus of chunks on disk.

    Attributes:
        parts: In order.
        spec: What made the chunks.
        dropped_rows: File of the chunks whose document is one of an evaluation corpus, if any is.
        num_dropped: How many they are.
    """

    parts: tuple[ChunkedPart, ...]
    spec: ChunkSpec
    dropped_rows: str | None = None
    num_dropped: int = 0


def plan_chunks(recipe: LanguageRecipe, directory: RunDirectory) -> dict[str, PlannedText]:
    """Materialises the corpora that a recipe's stages and evaluation use, and cuts them into chunks.

    Raises:
        RecipeError: The student has no tokenizer of use, or shorter sequences than a corpus's chunks; or
            nothing is left to train on.
        CorpusError: A corpus cannot be used.
        RefusedError: A corpus is not what this run was planned with.
    """
    trained = tuple(dict.fromkeys(stage.corpus for stage in recipe.stages))
    names = dict.fromkeys((*trained, *recipe.evaluation.corpora))
    for name in trained:
        longest = recipe.corpora[name].max_length
        if longest > recipe.student.max_length:
            raise RecipeError(
                f"chunks of {longest} tokens do not fit into sequences of {recipe.student.max_length}; lower "
                "it, or raise student.max_length",
                field=f"corpora.{name}.max_length",
            )
    found = {name: cut_corpus(recipe, directory, name) for name in names}
    check_corpora_lock({name: corpus.parts for name, corpus in found.items()}, directory.corpora_lock)
    evaluation = [part for name in recipe.evaluation.corpora for part in found[name].parts]
    for name in trained:
        shared = find_shared_chunks(found[name].parts, evaluation)
        if len(shared) == sum(part.num_rows for part in found[name].parts):
            stage = [stage.corpus for stage in recipe.stages].index(name)
            raise RecipeError(
                f"all documents of {name} are those of an evaluation corpus, which are not trained on",
                field=f"stages.{stage}.corpus",
            )
        if len(shared):
            path = write_rows(shared, directory.cache / "dropped")
            found[name] = PlannedText(found[name].parts, found[name].spec, str(path), len(shared))
    return found


def say_dropped(planned: Mapping[str, PlannedText]) -> None:
    """Says what was left out of the corpora, if anything was."""
    for name, corpus in planned.items():
        empty = sum(len(part.documents.excluded) for part in corpus.parts)
        if empty:
            say(f"  {name}: {empty} empty documents left out")
        if corpus.num_dropped:
            say(f"  {name}: dropped {corpus.num_dropped} chunks of documents of an evaluation corpus")


def find_shared_chunks(
    parts: Sequence[ChunkedPart], evaluation: Iterable[ChunkedPart]
) -> npt.NDArray[np.int64]:
    """Finds the chunks of documents that are, word by word, documents of an evaluation corpus.

    Returns:
        Sorted row numbers of the whole corpus, int64.
    """
    known = [open_rows(part.documents.rows_path) for part in evaluation]
    found: list[npt.NDArray[np.int64]] = []
    offset = 0
    for part in parts:
        documents = open_rows(part.documents.rows_path)
        shared = documents.column("example_id").take(pa.array(find_shared_rows([documents], known)))
        # A chunk's id is its document's and a number.
        chunk_ids = open_chunks(part.rows_path)[1].column("example_id")
        owners = pc.replace_substring_regex(chunk_ids, r"#\d+$", "")
        mask = pc.is_in(owners, value_set=shared.combine_chunks().cast(owners.type))
        found.append(np.flatnonzero(mask.to_numpy()).astype(np.int64) + offset)
        offset += part.num_rows
    return np.concatenate(found)


def cut_corpus(recipe: LanguageRecipe, directory: RunDirectory, name: str) -> PlannedText:
    """Materialises one corpus and cuts it into chunks; documents of evaluation corpora stay in it.

    Raises:
        RecipeError: The student has no tokenizer of use, or fewer tokens than that.
        CorpusError: The corpus cannot be used.
    """
    init, _ = find_init(recipe, directory)
    is_layers = isinstance(init, LanguageLayersInit)
    path = init.model if isinstance(init, LanguageLayersInit) else init.tokenizer
    tokenizer = load_tokenizer(path, init.revision)
    corpus = recipe.corpora[name]
    field = f"student.init.{'model' if is_layers else 'tokenizer'}"
    spec = describe_chunks(tokenizer, corpus, recipe.objective, field=field)
    _check_vocabulary(init, spec)
    documents = materialise_documents(name, corpus, data_root=recipe.data_root, out=directory.out)
    return PlannedText(tuple(chunk_part(part, tokenizer, spec) for part in documents), spec)


def _check_vocabulary(init: LanguageLayersInit | LanguageConfigInit, spec: ChunkSpec) -> None:
    """Refuses now what the trainer would refuse once the stores are paid for."""
    is_layers = isinstance(init, LanguageLayersInit)
    fields = init.overrides if isinstance(init, LanguageLayersInit) else init.config
    size = fields.get("vocab_size")
    if isinstance(size, int) and size < spec.vocab:
        raise RecipeError(
            f"is {size}, the tokenizer has {spec.vocab} tokens; leave it out",
            field=f"student.init.{'overrides' if is_layers else 'config'}.vocab_size",
        )
