"""Which teacher of a recipe, over which corpus part, made a store.

Invariants (tests/cluster/test_store_repair.py, tests/cluster/language/test_store_repair.py):
    1. A store is matched by its plan and generation hashes, never by names or by where it lies.
    2. No teacher is trained here: one whose training is not finished is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from cluster.recipe_stores import ClassifierStores, Pair, RecipeStores
from cluster.run_directory import RunDirectory
from precompute.near_miss import differing_fields, differing_plans
from precompute.stores import StoreSettings, StoreTarget, describe_targets
from schemas.any_recipe import AnyRecipe
from schemas.errors import DataError, RefusedError, TeacherError
from schemas.language import LanguageRecipe
from schemas.records import StoreIdentity, store_directory_name
from schemas.storage.storage import StoreSource
from schemas.store_files import list_commits, load_commit, load_identity, load_manifest, load_plan


def match_store(source: StoreSource, recipe: AnyRecipe, *, trust_identity: bool = True) -> StoreTarget:
    """Finds what a store is in a recipe.

    Args:
        source: The store.
        recipe: One that names the teacher with its model, and the corpus, of either task. Its corpora are
            materialised where they are not yet.
        trust_identity: Whether ``STORE.json`` says what the store is. If not, the manifest, the commit
            records and the name of the store's directory do.

    Returns:
        The store as the recipe describes it, with the root of ``source``.

    Raises:
        RefusedError: No teacher of the recipe made it; the nearest one's fields that differ are named.
        TeacherError: Its teacher is trained by the recipe, and the trained model is gone.
        TmkdError: A corpus or a model of the recipe cannot be read.
    """
    identity = load_identity(source) if trust_identity else None
    hashes = _find_hashes(source) if identity is None else {(identity.plan_hash, identity.generation_hash)}
    search = _Search(recipe)
    _check_level(source, identity, search.stores)
    for pairs in _order_pairs(recipe, search.stores.pairs(), identity):
        for target in search.describe(pairs):
            ours = (target.identity.plan_hash, target.identity.generation_hash)
            named_so = identity is None and source.root.endswith(f"/{store_directory_name(*ours)}")
            if ours in hashes or named_so:
                _check_labels(source, identity, target)
                return replace(target, root=source.root)
    raise _refuse(source, identity, search)


class _Search:
    """Describes the stores of a recipe, those asked for first.

    Attributes:
        stores: What the recipe makes.
        targets: Those described so far.
    """

    def __init__(self, recipe: AnyRecipe) -> None:
        self.stores = _stores_of(recipe)
        self.targets: list[StoreTarget] = []
        directory = RunDirectory.of(recipe)
        self._settings = StoreSettings(directory.stores, directory.hash_cache, recipe.store)

    def describe(self, pairs: Iterable[Pair]) -> list[StoreTarget]:
        """Describes the stores of pairs of teacher and corpus."""
        requests = [request for pair in pairs for request in self.stores.requests(*pair)]
        found = describe_targets(requests, self._settings)
        self.targets += found
        return found


def _stores_of(recipe: AnyRecipe) -> RecipeStores:
    if isinstance(recipe, LanguageRecipe):
        # Importing transformers takes a second, which a classifier's recipe need not pay here.
        from cluster.language.recipe_stores import LanguageStores

        return LanguageStores(recipe)
    return ClassifierStores(recipe)


def _check_level(source: StoreSource, identity: StoreIdentity | None, stores: RecipeStores) -> None:
    if identity is not None and identity.level != stores.level:
        raise RefusedError(
            f"store {source.root}: holds {identity.level} rows, and this recipe makes {stores.level} ones; "
            "give the recipe that made it"
        )


def _order_pairs(recipe: AnyRecipe, used: list[Pair], identity: StoreIdentity | None) -> list[list[Pair]]:
    """Returns the pair that the store's own names give, if the recipe has them, then all others."""
    if identity is None:
        return [used]
    named = (identity.teacher, identity.corpus)
    if identity.corpus not in recipe.corpora or identity.teacher not in {t.name for t in recipe.teachers}:
        return [used]
    return [[named], [pair for pair in used if pair != named]]


def _find_hashes(source: StoreSource) -> set[tuple[str, str]]:
    """Collects what manifest and commit records say that the store is, as far as they can be read."""
    try:
        manifest = load_manifest(source)
        if manifest is not None:
            return {(manifest.plan_hash, manifest.generation_hash)}
    except DataError:
        pass
    for shard, revisions in list_commits(source).items():
        try:
            record = load_commit(source, shard, revisions[-1])
        except DataError:
            continue
        if record is not None:
            return {(record.plan_hash, record.generation_hash)}
    return set()


def _check_labels(source: StoreSource, identity: StoreIdentity | None, target: StoreTarget) -> None:
    ours = target.identity.native_labels
    if identity is not None and identity.native_labels != ours:
        raise RefusedError(
            f"store {source.root}: the teacher's labels have other names now; restore id2label in its "
            "config.json",
            differing=[f"native_labels: {', '.join(identity.native_labels)} -> {', '.join(ours)}"],
        )


def _refuse(
    source: StoreSource, identity: StoreIdentity | None, search: _Search
) -> RefusedError | TeacherError:
    """Explains why no store of the recipe is this one."""
    gone = search.stores.untrained
    if identity is not None and identity.teacher in gone:
        return TeacherError(
            f"is trained by the recipe, and the model that made {source.root} is gone from "
            f"{gone[identity.teacher]}; restore it: one trained anew would give other logits",
            teacher=identity.teacher,
        )
    if identity is None:
        hashes = [(t.identity.plan_hash, t.identity.generation_hash) for t in search.targets]
        known = ", ".join(store_directory_name(*found) for found in hashes)
        untrained = f"; not trained yet: {', '.join(gone)}" if gone else ""
        return RefusedError(
            f"store {source.root}: without its STORE.json, neither manifest and records nor the directory's "
            f"name say that it is one of this recipe's ({known or 'none'}{untrained})"
        )
    nearest = min(search.targets, key=lambda target: _distance(identity, target), default=None)
    message = f"store {source.root} ({identity.teacher} over {identity.corpus}/{identity.part}) was not made"
    if nearest is None:
        return RefusedError(f"{message} by this recipe: it has no teacher with a model")
    teacher, corpus, part = nearest.request.key
    return RefusedError(
        f"{message} as this recipe makes {teacher} over {corpus}/{part}; give the recipe that made it, or "
        "correct this one with --set",
        differing=_tell_differences(source, identity, nearest),
    )


def _distance(identity: StoreIdentity, target: StoreTarget) -> tuple[bool, ...]:
    ours = target.identity
    fields = ("teacher", "corpus", "part", "generation_hash", "plan_hash")
    return tuple(getattr(identity, name) != getattr(ours, name) for name in fields)


def _tell_differences(source: StoreSource, identity: StoreIdentity, target: StoreTarget) -> Sequence[str]:
    differing = differing_fields(identity, target.identity)
    if identity.plan_hash == target.identity.plan_hash:
        return differing
    try:
        plans = differing_plans(load_plan(source, identity.plan_hash), target.plan)
    except DataError:
        return differing
    return plans + [text for text in differing if not text.startswith("plan_hash:")]
