"""The small files of a finished store, read from its manifest on and checked to describe one store, whole.

Invariants (tests/distill/test_store_reader.py, tests/reliability/test_hostile_stores.py):
    1. The manifest binds ``STORE.json``, the plan and the commit records: a change of any byte of them
       raises.
    2. What is returned adds up, also where every digest was computed by a stranger: the records cut the
       plan's rows without gap or overlap, their regions cut each file so, and each row is either in a
       batch or excluded, once. Numbers of rows are then no larger than the plan's.
    3. Time and memory are linear in the bytes of these files: no file is read twice, none is read before
       the manifest's list fits the plan.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from schemas.column_view import wrap_integers
from schemas.digest import hash_value
from schemas.errors import DamagedStoreError, IncompleteStoreError
from schemas.plan import Plan, ShardTask
from schemas.record_sums import MAX_REGION_BYTES, MAX_ROW_BYTES, find_contradiction
from schemas.records import (
    COMMIT_DIRECTORY,
    MANIFEST_FILE,
    MAX_COMMIT_BYTES,
    MAX_IDENTITY_BYTES,
    MAX_MANIFEST_BYTES,
    STORE_FILE,
    CommitRecord,
    Level,
    Manifest,
    ManifestShard,
    StoreIdentity,
    check_format,
    decode_record,
    parse_record,
    record_name,
    validate_record,
)
from schemas.storage.reading import read_files
from schemas.storage.storage import StoreSource
from schemas.store_files import load_identity, load_plan


@dataclass(frozen=True, slots=True)
class StoreRecords:
    """What the small files of a store say.

    Attributes:
        records: The commit record that counts of each shard, by shard.
    """

    manifest: Manifest
    identity: StoreIdentity
    plan: Plan
    records: tuple[CommitRecord, ...]


def read_store_records(source: StoreSource) -> StoreRecords:
    """Reads manifest, identity, plan and commit records of a finished store; no data file is touched.

    Raises:
        IncompleteStoreError: There is no manifest.
        DataError: There is no store.
        DamagedStoreError: A file is missing, does not match its hash, or contradicts another.
        RefusedError: The store has another format version.
        ResourceError: A file may not be read, or the object store cannot be reached.
    """
    manifest = _read_manifest(source)
    identity = _read_identity(source, manifest)
    _check_identity(source.root, manifest, identity)
    num_rows = manifest.num_rows + len(manifest.excluded)
    plan = load_plan(
        source,
        manifest.plan_hash,
        sha256=manifest.plan_sha256,
        max_bytes=MAX_REGION_BYTES + num_rows * MAX_ROW_BYTES,
    )
    if num_rows != plan.num_rows:
        raise DamagedStoreError("the manifest's number of rows is not that of its plan", store=source.root)
    records = _read_commits(source, manifest, plan, identity.level)
    _check_excluded(source.root, manifest, plan, records)
    return StoreRecords(manifest, identity, plan, records)


def _read_manifest(source: StoreSource) -> Manifest:
    try:
        data = source.read(MANIFEST_FILE, max_bytes=MAX_MANIFEST_BYTES)
    except FileNotFoundError as error:
        load_identity(source)  # Says so where there is no store at all.
        raise IncompleteStoreError(source.root) from error
    document = decode_record(data, store=source.root, name=MANIFEST_FILE)
    check_format(document, store=source.root)
    return validate_record(document, Manifest, store=source.root, name=MANIFEST_FILE)


def _read_identity(source: StoreSource, manifest: Manifest) -> StoreIdentity:
    try:
        data = source.read(STORE_FILE, max_bytes=MAX_IDENTITY_BYTES)
    except FileNotFoundError as error:
        raise DamagedStoreError(f"{STORE_FILE} is missing", store=source.root) from error
    _check_hash(source.root, STORE_FILE, data, manifest.store_sha256)
    return parse_record(data, StoreIdentity, store=source.root, name=STORE_FILE)


def _check_identity(root: str, manifest: Manifest, identity: StoreIdentity) -> None:
    if (identity.plan_hash, identity.generation_hash) != (manifest.plan_hash, manifest.generation_hash):
        raise DamagedStoreError(f"{STORE_FILE} is of another plan or teacher than its manifest", store=root)
    if hash_value(identity.generation) != identity.generation_hash:
        raise DamagedStoreError(f"{STORE_FILE} does not match its generation hash", store=root)
    labels = identity.native_labels
    if identity.level == "token":
        if labels:
            raise DamagedStoreError(
                f"{STORE_FILE} names labels, which a token-level store has not", store=root
            )
    elif not labels or len(set(labels)) != len(labels):
        raise DamagedStoreError(f"{STORE_FILE} names no labels, or one twice", store=root)


def _read_commits(
    source: StoreSource, manifest: Manifest, plan: Plan, level: Level
) -> tuple[CommitRecord, ...]:
    # A list of the right length, with shard i at place i, names no file twice.
    if [entry.shard for entry in manifest.shards] != list(range(plan.num_shards)):
        raise DamagedStoreError("the manifest's shards are not those of its plan", store=source.root)
    names = [f"{COMMIT_DIRECTORY}/{entry.record}" for entry in manifest.shards]
    found = read_files(source, names, max_bytes=MAX_COMMIT_BYTES)
    records = []
    try:
        for entry, task, data in zip(manifest.shards, plan.tasks(), found, strict=True):
            name = f"{COMMIT_DIRECTORY}/{entry.record}"
            _check_hash(source.root, name, data, entry.record_sha256)
            record = parse_record(data, CommitRecord, store=source.root, name=name)
            problem = _find_problem(record, entry, task, manifest, level)
            if problem is not None:
                raise DamagedStoreError(f"{name} {problem}", store=source.root)
            records.append(record)
    except FileNotFoundError as error:
        raise DamagedStoreError(f"{error} is missing", store=source.root) from error
    return tuple(records)


def _check_excluded(root: str, manifest: Manifest, plan: Plan, records: tuple[CommitRecord, ...]) -> None:
    if tuple(row for record in records for row in record.excluded) != manifest.excluded:
        raise DamagedStoreError("the manifest's excluded rows are not those of its shards", store=root)
    ordinals = np.array([row.ordinal for row in manifest.excluded], np.int64)
    ids = plan.rows.column("example_id").take(wrap_integers(ordinals)).to_pylist()
    if ids != [row.example_id for row in manifest.excluded]:
        raise DamagedStoreError("the excluded rows have other ids than in the plan", store=root)


def _find_problem(
    record: CommitRecord, entry: ManifestShard, task: ShardTask, manifest: Manifest, level: Level
) -> str | None:
    """Says what is wrong with a commit record that is the one the manifest means, or returns None."""
    if (record.plan_hash, record.generation_hash) != (manifest.plan_hash, manifest.generation_hash):
        return "belongs to another plan or teacher than its manifest"
    if (record.shard, record.start, record.stop) != (task.shard, task.start, task.stop):
        return "does not cover its shard of the plan"
    if record_name(record.shard, record.revision) != entry.record:
        return f"holds the record of shard {record.shard}, revision {record.revision}"
    if (record.num_rows, record.num_bytes) != (entry.num_rows, entry.num_bytes):
        return "has other rows or bytes than its manifest says"
    return find_contradiction(record, level)


def _check_hash(root: str, name: str, data: bytes, sha256: str) -> None:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedStoreError(f"{name} does not match its hash", store=root)
