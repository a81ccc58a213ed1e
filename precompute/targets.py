"""What a run's stores are: of each request the plan, the identity and the worker, before any work.

Invariants (tests/precompute/test_stores.py, tests/precompute/test_token_stores.py):
    1. Labels that do not map, policies that a vocabulary cannot satisfy, and tokenizers that are not
       those of the chunks are refused here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from precompute.chunking import ChunkedPart
from precompute.generation import (
    describe_generation,
    describe_token_generation,
    generation_hash,
    native_labels,
    resolve_commit,
)
from precompute.given_stores import PartKey
from precompute.materialised import MaterialisedPart
from precompute.store_writer import StoreWriter
from precompute.tasks import AnyWorkerSpec, LanguageWorkerSpec, WorkerSpec
from schemas.chunks import ChunkSpec
from schemas.errors import DataError, RecipeError
from schemas.labels import match_order, rename
from schemas.language import LanguageTeacher, LossTerm, find_misfit
from schemas.plan import Plan, make_plan
from schemas.policy import check_policy
from schemas.recipe import Corpus, StoreOptions, Teacher
from schemas.records import Level, StoreIdentity, store_directory_name
from schemas.rows import open_rows
from schemas.storage.location import join_location
from schemas.text_corpus import TextCorpus
from schemas.token_generation import read_generation

StoreKey = tuple[str, str, str]
"""Teacher, corpus and part."""

MAX_SHARDS = 100_000
"""A manifest of more would take a reader too long."""

_PACKAGES = ("tmkd", "torch", "transformers", "tokenizers", "ray", "pyarrow")


@dataclass(frozen=True)
class StoreRequest:
    """One teacher over one corpus part.

    Attributes:
        model_path: What ``from_pretrained`` takes; None for a teacher with ``stores``.
        revision: On the hub.
        corpus: The part's corpus as the recipe describes it.
        part: A language model's is a ``ChunkedPart``.
        losses: Of the language models that read the store.
    """

    teacher: Teacher | LanguageTeacher
    model_path: str | None
    revision: str | None
    corpus: Corpus | TextCorpus
    part: MaterialisedPart
    losses: tuple[LossTerm, ...] = ()

    @property
    def key(self) -> StoreKey:
        """Names of teacher, corpus and part."""
        return (self.teacher.name, self.part.corpus, self.part.part)

    @property
    def part_key(self) -> PartKey:
        """Names of corpus and part."""
        return (self.part.corpus, self.part.part)


@dataclass(frozen=True)
class StoreSettings:
    """Where stores lie and how they are made.

    Attributes:
        root: Location of all stores, a directory or a URL.
        hash_cache: JSON file of weight hashes.
        new_store: Begin a new store although one of the same names but another hash exists.
    """

    root: str
    hash_cache: Path
    options: StoreOptions
    new_store: bool = False


@dataclass(frozen=True)
class StoreTarget:
    """A store that a model has to fill: what it is, by what, and where."""

    request: StoreRequest
    plan: Plan
    identity: StoreIdentity
    spec: AnyWorkerSpec
    root: str


def plan_part(part: MaterialisedPart, shard_rows: int) -> Plan:
    """Cuts a part into shards.

    Raises:
        DataError: Its rows have changed since they were written.
        RecipeError: There would be too many shards.
    """
    plan = make_plan(open_rows(part.rows_path), shard_rows)
    if plan.fingerprint != part.fingerprint:
        raise DataError(
            f"{part.rows_path}: its rows have changed since they were written; delete its directory and "
            "run the same command again"
        )
    if plan.num_shards > MAX_SHARDS:
        raise RecipeError(
            f"{part.corpus}/{part.part} would have {plan.num_shards} shards of {shard_rows} rows; a store "
            f"has at most {MAX_SHARDS}: raise it",
            field="store.shard_rows",
        )
    return plan


def describe_target(request: StoreRequest, plan: Plan, settings: StoreSettings) -> StoreTarget:
    """Says which store a request's model fills, and what fills it.

    Raises:
        LabelError: The teacher's labels do not map onto the corpus's.
        RecipeError: The policy keeps more than the vocabulary has, or the tokenizer is another.
        TeacherError: The teacher's directory has no configuration or no safetensors.
        ResourceError: The hub cannot be reached.
    """
    if request.model_path is None:
        raise ValueError(f"the request of teacher {request.teacher.name} has neither a model nor stores")
    commit = resolve_commit(request.model_path, request.revision, teacher=request.teacher.name)
    describe = _describe_classifier if isinstance(request.teacher, Teacher) else _describe_language_model
    level, fields, spec = describe(request, request.model_path, commit, settings)
    identity = StoreIdentity(
        level=level,
        plan_hash=plan.plan_hash,
        generation_hash=generation_hash(fields.generation),
        generation=fields.generation,
        native_labels=fields.native_labels,
        teacher=request.teacher.name,
        corpus=request.part.corpus,
        part=request.part.part,
        produced_by=_installed_versions(),
    )
    root = join_location(settings.root, store_directory_name(identity.plan_hash, identity.generation_hash))
    return StoreTarget(request, plan, identity, spec, root)


def check_given(request: StoreRequest, store: StoreWriter) -> None:
    """Checks that a finished store, whose rows are those of the part, is of use for the recipe.

    Raises:
        LabelError: Its labels do not map onto the corpus's.
        RecipeError: It does not keep what the losses need.
        RefusedError: It is a store of another level.
    """
    if isinstance(request.teacher, Teacher):
        check_labels(request.teacher, request.corpus, store.identity.native_labels)
        return
    made = read_generation(store.identity, store=store.root)
    misfit = find_misfit(request.teacher.name, made.policy, made.grid, request.losses)
    if misfit is not None:
        raise RecipeError(f"the store {store.root} does not fit the losses: {misfit}", field="losses")


def check_labels(teacher: Teacher, corpus: Corpus | TextCorpus, labels: Sequence[str]) -> None:
    """Maps the teacher's labels onto the corpus's.

    Raises:
        LabelError: They cannot be mapped.
    """
    if not isinstance(corpus, Corpus):
        raise TypeError(f"teacher {teacher.name} is a classifier, its corpus is one of plain text")
    field = f"teachers.{teacher.name}.label_map"
    match_order(rename(labels, teacher.label_map, field=field), corpus.labels, field=field)


@dataclass(frozen=True, slots=True)
class _Fields:
    """What ``StoreIdentity`` says of a teacher."""

    generation: dict[str, Any]
    native_labels: tuple[str, ...] = ()


def _describe_classifier(
    request: StoreRequest, model_path: str, commit: str | None, settings: StoreSettings
) -> tuple[Level, _Fields, AnyWorkerSpec]:
    teacher, corpus = request.teacher, request.corpus
    if not isinstance(teacher, Teacher) or not isinstance(corpus, Corpus):
        raise TypeError(f"teacher {teacher.name} is a classifier, its corpus is one of plain text")
    labels = native_labels(model_path, commit, teacher=teacher.name)
    check_labels(teacher, corpus, labels)
    generation = describe_generation(teacher, model_path, commit, corpus, settings.hash_cache)
    spec = WorkerSpec(
        teacher=teacher,
        model_path=model_path,
        revision=commit,
        num_threads=max(1, int(teacher.cpus_per_actor)),
        device="cuda" if teacher.gpus_per_actor else "cpu",
    )
    return "classification", _Fields(generation, labels), spec


def _describe_language_model(
    request: StoreRequest, model_path: str, commit: str | None, settings: StoreSettings
) -> tuple[Level, _Fields, AnyWorkerSpec]:
    teacher, part = request.teacher, request.part
    if not isinstance(teacher, LanguageTeacher) or not isinstance(part, ChunkedPart):
        raise TypeError(f"teacher {teacher.name} is a language model, its part is not one of chunks")
    field = f"teachers.{teacher.name}"
    check_policy(teacher.keep, part.spec.vocab, field=f"{field}.keep")
    _check_tokenizer(teacher, model_path, commit, part.spec)
    generation = describe_token_generation(teacher, model_path, commit, part.spec, settings.hash_cache)
    spec = LanguageWorkerSpec(
        teacher=teacher,
        model_path=model_path,
        revision=commit,
        num_threads=max(1, int(teacher.cpus_per_actor)),
        device="cuda" if teacher.gpus_per_actor else "cpu",
        objective=part.spec.objective,
        vocab=part.spec.vocab,
    )
    return "token", _Fields(generation), spec


def _check_tokenizer(
    teacher: LanguageTeacher, model_path: str, commit: str | None, chunks: ChunkSpec
) -> None:
    # Importing transformers takes a second, which runs of classifiers over finished stores need not pay.
    from precompute.tokenizer import load_tokenizer, read_tokenizer_hash

    tokenizer = load_tokenizer(
        model_path, commit, teacher.gguf_file, trust_remote_code=teacher.trust_remote_code
    )
    if read_tokenizer_hash(tokenizer, teacher=teacher.name) != chunks.tokenizer:
        raise RecipeError(
            "its tokenizer is not the one that the corpus was cut into chunks with: all teachers and the "
            "student must share one; name models that do (aligning tokenizers is not supported)",
            field=f"teachers.{teacher.name}.model",
        )


def _installed_versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
