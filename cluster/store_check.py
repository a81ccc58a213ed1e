"""A store examined to its end: ``STORE.json``, plan, manifest, every shard's record and data.

Invariants (tests/cluster/test_store_check.py):
    1. One fault hides no other: each damaged shard is named.
    2. Whatever bytes the store consists of, there is a diagnosis, or a refusal of another format version.
    3. A finished store without a problem is one that ``distill`` opens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from cluster.corpus_check import examine_texts, find_part
from cluster.diagnosis import Diagnosis, Fault, Place, Problem
from cluster.shard_check import ShardCheck
from distill.store_reader import LogitStore
from distill.token_store import TokenStore
from precompute.encode import store_schema
from schemas.digest import DocumentError, decode_document, hash_value
from schemas.errors import DamagedStoreError, DataError
from schemas.plan import Plan, parse_plan
from schemas.record_sums import find_contradiction
from schemas.records import (
    COMMIT_DIRECTORY,
    MANIFEST_FILE,
    MAX_COMMIT_BYTES,
    MAX_IDENTITY_BYTES,
    MAX_MANIFEST_BYTES,
    PLAN_FILE,
    STORE_FILE,
    CommitRecord,
    Manifest,
    StoreIdentity,
    check_format,
    parse_record,
    record_name,
)
from schemas.storage.location import open_storage
from schemas.storage.reading import read_files
from schemas.storage.storage import StoreSource
from schemas.store_files import (
    StoredCommit,
    check_commit,
    check_owner,
    has_file,
    list_commits,
    list_data,
    load_identity,
    load_manifest,
)

# Records whose bytes are held: a stranger's may be large, and many.
_NUM_READ_AT_ONCE = 16


@dataclass(frozen=True)
class Truth:
    """What a store is known to be, from its recipe, whatever its files say."""

    identity: StoreIdentity
    plan: Plan


def diagnose_store(
    root: str | Path,
    *,
    deep: bool = False,
    truth: Truth | None = None,
    corpora: Sequence[Path] | None = None,
) -> Diagnosis:
    """Looks at a store and says all that is wrong with it; changes nothing.

    Args:
        root: The store's location.
        deep: Read every data file: each hash, each row. Otherwise records, the plan and sizes, and of a
            local store head and tail of each data file.
        truth: Counts where ``STORE.json`` or the plan say otherwise or cannot be read.
        corpora: Where the materialised corpus is looked for, to hash its texts again; None: that is not
            done.

    Raises:
        DataError: There is no store.
        RefusedError: The store has another format version.
        ResourceError: It may not be read, or cannot be reached.
    """
    source = open_storage(root)
    _refuse_other_format(source)
    check = _StoreCheck(source, deep, truth)
    diagnosis = check.run()
    if corpora is not None and check.is_token_level:
        update: dict[str, object] = {"corpus": "its tokens lie in the store, and were hashed again"}
        return diagnosis.model_copy(update=update)
    if corpora is not None and check.plan is not None:
        path = find_part(check.plan, corpora)
        update = {"corpus": "not found, so texts were not hashed again"}
        if path is not None:
            problems = (*diagnosis.problems, *examine_texts(check.plan, path))
            update = {"corpus": f"texts of {path} hashed again", "problems": problems}
        diagnosis = diagnosis.model_copy(update=update)
    return diagnosis


class _StoreCheck:
    """Collects the problems of one store."""

    def __init__(self, source: StoreSource, deep: bool, truth: Truth | None) -> None:
        self.plan: Plan | None = None
        self._source = source
        self._deep = deep
        self._truth = truth
        self._problems: list[Problem] = []
        self._identity: StoreIdentity | None = None

    @property
    def is_token_level(self) -> bool:
        """Whether ``STORE.json`` says that the store is a language model's."""
        return self._identity is not None and self._identity.level == "token"

    def run(self) -> Diagnosis:
        source = self._source
        revisions = list_commits(source)
        is_complete = has_file(source, MANIFEST_FILE)
        self._identity = self._read_identity(is_store=is_complete or bool(revisions))
        manifest = self._read_manifest()
        self.plan = self._read_plan(manifest)
        commits = self._read_commits(revisions)
        if manifest is not None:
            self._compare_manifest(manifest, commits)
        self._examine_data(commits)
        missing = self._find_missing(revisions)
        if is_complete:
            for shard in missing:
                self._add("record", "missing", "its commit record is missing", shard=shard)
        if is_complete and not self._problems:
            self._try_reader()
        records = [commit.record for commit in commits.values()]
        return Diagnosis(
            store=source.root,
            deep=self._deep,
            is_complete=is_complete,
            num_shards=self.plan.num_shards if self.plan is not None else None,
            num_committed=len(records),
            num_rows=sum(record.num_rows for record in records),
            num_bytes=sum(record.num_bytes for record in records),
            missing_shards=() if is_complete else missing,
            problems=tuple(self._problems),
        )

    def _read_identity(self, *, is_store: bool) -> StoreIdentity | None:
        known = self._truth.identity if self._truth is not None else None
        try:
            identity = load_identity(self._source)
        except DataError as error:
            is_lost = isinstance(error.__cause__, FileNotFoundError)
            if is_lost and (known is not None or is_store or has_file(self._source, PLAN_FILE)):
                self._add("identity", "missing", f"{STORE_FILE} is missing")
            elif isinstance(error, DamagedStoreError):
                self._add("identity", "damaged", error.damage)
            else:
                raise
            return known
        if hash_value(identity.generation) != identity.generation_hash:
            self._add("identity", "damaged", f"{STORE_FILE} does not match its generation hash")
        elif known is not None and not _is_same(identity, known):
            self._add("identity", "foreign", f"{STORE_FILE} is another store's")
        return known or identity

    def _read_manifest(self) -> Manifest | None:
        try:
            manifest = load_manifest(self._source)
            if manifest is not None and self._identity is not None:
                check_owner(self._source, MANIFEST_FILE, manifest, self._identity)
        except DamagedStoreError as error:
            self._add("manifest", "damaged", error.damage)
            return None
        if manifest is not None and not self._problems:
            data = self._source.read(STORE_FILE, max_bytes=MAX_IDENTITY_BYTES)
            if hashlib.sha256(data).hexdigest() != manifest.store_sha256:
                self._add("identity", "foreign", f"{STORE_FILE} is not the one that {MANIFEST_FILE} binds")
        return manifest

    def _read_plan(self, manifest: Manifest | None) -> Plan | None:
        known = self._truth.plan if self._truth is not None else None
        owner = self._identity or manifest
        try:
            data = self._source.map_file(PLAN_FILE)
            plan = parse_plan(data, source=PLAN_FILE, expected_hash=owner.plan_hash if owner else None)
        except FileNotFoundError:
            self._add("plan", "missing", f"{PLAN_FILE} is missing")
            return known
        except DataError as error:
            damage = error.damage if isinstance(error, DamagedStoreError) else error.message
            self._add("plan", "damaged", damage)
            return known
        if manifest is not None and hashlib.sha256(data).hexdigest() != manifest.plan_sha256:
            self._add("plan", "hash", f"{PLAN_FILE} does not match its hash in {MANIFEST_FILE}")
        return plan

    def _read_commits(self, revisions: dict[int, tuple[int, ...]]) -> dict[int, StoredCommit]:
        names = {shard: record_name(shard, found[-1]) for shard, found in revisions.items()}
        contents = _read_each(self._source, [f"{COMMIT_DIRECTORY}/{name}" for name in names.values()])
        commits = {}
        for (shard, name), data in zip(names.items(), contents, strict=True):
            commit = self._parse_commit(shard, name, data)
            if commit is not None:
                commits[shard] = commit
        return commits

    def _parse_commit(self, shard: int, name: str, data: bytes | DamagedStoreError) -> StoredCommit | None:
        """Parses a record and checks that it is of this store, this shard, this plan; None if it is not."""
        fault: Fault = "damaged"
        try:
            if isinstance(data, DamagedStoreError):
                raise data
            record = parse_record(data, CommitRecord, store=self._source.root, name=name)
            fault = "foreign"
            commit = StoredCommit(name, hashlib.sha256(data).hexdigest(), record)
            if self._identity is not None and self.plan is not None:
                check_commit(self._source, commit, self._identity, self.plan)
        except DamagedStoreError as error:
            self._add("record", fault, error.damage, shard=shard)
            return None
        # Where the level is lost, a row may be as large as a row of any level.
        level = "token" if self._identity is None else self._identity.level
        contradiction = find_contradiction(record, level)
        if name != record_name(record.shard, record.revision):
            contradiction = f"holds the record of shard {record.shard}, revision {record.revision}"
        if contradiction is not None:
            self._add("record", "foreign", f"{name} {contradiction}", shard=shard)
            return None
        return commit

    def _compare_manifest(self, manifest: Manifest, commits: dict[int, StoredCommit]) -> None:
        """Compares what the manifest lists with the records that count."""
        listed = {entry.shard: entry for entry in manifest.shards}
        outdated = []
        for shard, commit in commits.items():
            entry = listed.get(shard)
            if entry is None or entry.record != commit.name:
                outdated.append(shard)
            elif entry.record_sha256 != commit.sha256:
                message = f"{commit.name} is not the record that {MANIFEST_FILE} binds"
                self._add("record", "foreign", message, shard=shard)
        if outdated:
            shown = ", ".join(map(str, outdated[:10]))
            message = f"{MANIFEST_FILE} does not list the records that count of shards {shown}"
            self._add("manifest", "foreign", message)

    def _examine_data(self, commits: dict[int, StoredCommit]) -> None:
        check = ShardCheck(self._source, self._find_schema(), self.plan, deep=self._deep)
        files = list_data(self._source) if commits else {}
        for commit in commits.values():
            self._problems += check.examine(commit.record, files.get(commit.record.file))

    def _find_schema(self) -> pa.Schema | None:
        if self._identity is None:
            return None
        try:
            return store_schema(self._identity, store=self._source.root)
        except DamagedStoreError as error:
            self._add("identity", "damaged", error.damage)
            return None

    def _find_missing(self, revisions: dict[int, tuple[int, ...]]) -> tuple[int, ...]:
        if self.plan is None:
            return ()
        return tuple(shard for shard in range(self.plan.num_shards) if shard not in revisions)

    def _try_reader(self) -> None:
        """Opens the store as ``distill`` does: whatever that finds counts, too."""
        reader = TokenStore if self.is_token_level else LogitStore
        try:
            reader.open(self._source.root)
        except DamagedStoreError as error:
            place: Place = "manifest" if error.shard is None else "data"
            self._add(place, "damaged", error.damage, shard=error.shard)

    def _add(self, place: Place, fault: Fault, message: str, *, shard: int | None = None) -> None:
        self._problems.append(Problem(place=place, fault=fault, message=message, shard=shard))


def _refuse_other_format(source: StoreSource) -> None:
    """Refuses a store of another format version: to this tmkd all of it would look damaged."""
    for name, max_bytes in ((STORE_FILE, MAX_IDENTITY_BYTES), (MANIFEST_FILE, MAX_MANIFEST_BYTES)):
        try:
            document = decode_document(source.read(name, max_bytes=max_bytes), max_bytes=max_bytes)
        except (FileNotFoundError, DamagedStoreError, DocumentError):
            continue
        check_format(document, store=source.root)


def _read_each(source: StoreSource, names: Sequence[str]) -> Iterator[bytes | DamagedStoreError]:
    """Yields files in the order of ``names``, a few at a time; what cannot be read gives its error."""
    at_once = 1 if source.is_local else _NUM_READ_AT_ONCE
    for start in range(0, len(names), at_once):
        few = names[start : start + at_once]
        try:
            yield from list(read_files(source, few, max_bytes=MAX_COMMIT_BYTES))
        except (FileNotFoundError, DamagedStoreError):
            yield from (_read_one(source, name) for name in few)


def _read_one(source: StoreSource, name: str) -> bytes | DamagedStoreError:
    try:
        return source.read(name, max_bytes=MAX_COMMIT_BYTES)
    except FileNotFoundError:
        return DamagedStoreError(f"{name} is missing", store=source.root)
    except DamagedStoreError as error:
        return error


def _is_same(found: StoreIdentity, known: StoreIdentity) -> bool:
    hashes = ("plan_hash", "generation_hash", "native_labels")
    return all(getattr(found, name) == getattr(known, name) for name in hashes)
