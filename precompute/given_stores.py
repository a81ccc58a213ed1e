"""Finished stores that a recipe names instead of a model, matched to corpus parts by their rows.

Invariants (tests/precompute/test_stores.py, tests/end_to_end/test_language_bad_input.py):
    1. A store counts for a part if both have the same ordered ids and texts, wherever it lies, whatever
       its corpus is called, and however it is cut into shards.
    2. All stores of one part share one plan.
    3. Of a language model's store the chunks were made like the part's: tokenizer, vocabulary, objective.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from precompute.chunking import ChunkedPart
from precompute.materialised import MaterialisedPart
from precompute.near_miss import differing_values
from precompute.store_writer import StoreWriter
from schemas.errors import DataError, IncompleteStoreError, RefusedError
from schemas.language import LanguageTeacher
from schemas.plan import Plan
from schemas.recipe import Teacher
from schemas.records import MANIFEST_FILE, STORE_FILE
from schemas.storage.location import normal_location, open_storage
from schemas.store_files import has_file
from schemas.token_generation import read_generation

PartKey = tuple[str, str]
"""Corpus and part."""

_BINDING = {"tokenizer", "vocab", "objective", "mask.token"}
"""Of what made chunks: what teachers and student must share even where the tokens are the same."""


def open_given_stores(teacher: Teacher | LanguageTeacher) -> dict[str, StoreWriter]:
    """Opens the finished stores of a teacher that has no model.

    Returns:
        From part fingerprint to the store.

    Raises:
        DataError: A directory is no store, is damaged, or two stores cover the same rows.
        IncompleteStoreError: A store is not finished.
        RefusedError: A store is of the other level.
    """
    found: dict[str, StoreWriter] = {}
    for name in teacher.stores or ():
        root = normal_location(name)
        source = open_storage(root)
        if not has_file(source, STORE_FILE):
            raise DataError(f"teacher {teacher.name}: there is no store at {root}; correct its `stores`")
        if not has_file(source, MANIFEST_FILE):
            raise IncompleteStoreError(root)
        store = StoreWriter.attach(root)
        if not store.is_complete():
            raise IncompleteStoreError(root)
        _check_level(teacher, store)
        twin = found.setdefault(store.plan.fingerprint, store)
        if twin is not store:
            raise DataError(
                f"teacher {teacher.name}: {twin.root} and {root} cover the same rows; name one of them"
            )
    return found


def match_part(
    teacher: Teacher | LanguageTeacher, stores: Mapping[str, StoreWriter], part: MaterialisedPart
) -> StoreWriter:
    """Finds a teacher's store of one part.

    Raises:
        RefusedError: Its stores are of chunks that were made otherwise: by another tokenizer, for example.
        DataError: None of its stores covers the part.
    """
    store = stores.get(part.fingerprint)
    if isinstance(part, ChunkedPart):
        candidates = stores.values() if store is None else (store,)
        _check_chunks(teacher, candidates, part, is_found=store is not None)
    if store is None:
        covered = "; ".join(_describe(item) for item in stores.values())
        raise DataError(
            f"teacher {teacher.name}: none of its stores covers {part.corpus}/{part.part} ({part.num_rows} "
            f"rows, fingerprint {part.fingerprint[:16]}); they cover {covered}; add one to its `stores`"
        )
    return store


def shared_plans(given: Sequence[tuple[PartKey, StoreWriter]]) -> dict[PartKey, Plan]:
    """Returns the plan that the given stores of each part share.

    Raises:
        RefusedError: Two stores of a part are cut differently: rows could not be joined.
    """
    first: dict[PartKey, StoreWriter] = {}
    for key, store in given:
        other = first.setdefault(key, store)
        if other.plan.plan_hash != store.plan.plan_hash:
            raise RefusedError(
                f"the stores {other.root} and {store.root} of {key[0]}/{key[1]} are cut into different "
                "shards and cannot be joined; make one of them again with the other's store.shard_rows",
                differing=[f"plan_hash: {other.plan.plan_hash[:16]} -> {store.plan.plan_hash[:16]}"],
            )
    return {key: store.plan for key, store in first.items()}


def _check_level(teacher: Teacher | LanguageTeacher, store: StoreWriter) -> None:
    wanted = "classification" if isinstance(teacher, Teacher) else "token"
    if store.identity.level != wanted:
        raise RefusedError(
            f"teacher {teacher.name}: the store {store.root} is of level {store.identity.level}, this recipe "
            f"needs one of level {wanted}; name another in its `stores`"
        )


def _check_chunks(
    teacher: Teacher | LanguageTeacher, stores: Iterable[StoreWriter], part: ChunkedPart, *, is_found: bool
) -> None:
    """Refuses stores none of which is of chunks that were made like the part's.

    Where a store ``is_found``, with the tokens of the part, lengths and templates do not matter.
    """
    nearest: list[str] | None = None
    for store in stores:
        theirs = read_generation(store.identity, store=store.root).chunks
        differing = differing_values(theirs.model_dump(mode="json"), part.spec.model_dump(mode="json"))
        if is_found:
            differing = [text for text in differing if text.partition(":")[0] in _BINDING]
        if nearest is None or len(differing) < len(nearest):
            nearest = differing
    if nearest:
        raise RefusedError(
            f"teacher {teacher.name}: its stores are of other chunks than {part.corpus}/{part.part}; "
            "give teachers, student and corpus what made the stores' chunks, or name other `stores`",
            differing=nearest,
        )


def _describe(store: StoreWriter) -> str:
    identity, name = store.identity, store.root.rpartition("/")[2]
    return f"{name}: {identity.corpus}/{identity.part}, {store.plan.num_rows} rows"
