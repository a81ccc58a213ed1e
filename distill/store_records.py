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
from schemas.errors import DamagedStoreError, IncompleteStoreError, RefusedError
from schemas.plan import Plan, ShardTask
from schemas.records import (
    COMMIT_DIRECTORY,
    FORMAT_VERSION,
    MANIFEST_FILE,
    MAX_COMMIT_BYTES,
    MAX_IDENTITY_BYTES,
    MAX_MANIFEST_BYTES,
    STORE_FILE,
    CommitRecord,
    Manifest,
    ManifestShard,
    StoreIdentity,
    decode_record,
    parse_record,
    record_name,
    validate_record,
)
from schemas.storage.reading import read_files
from schemas.storage.storage import StoreSource
from schemas.store_files import load_plan

# What a row may take of a file, on average over a record batch. Hashing goes through all bytes, and the
# apparent size of a file costs a stranger nothing.
MAX_ROW_BYTES = 64 * 1024
# A chunk's kept entries; dense, a chunk of 512 tokens of a vocabulary of 50,000 takes 50 MB.
MAX_CHUNK_BYTES = 256 * 1024 * 1024
MAX_REGION_BYTES = 64 * 1024 * 1024
_MAX_VERSION_CHARACTERS = 20


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
    row_bytes = MAX_CHUNK_BYTES if identity.level == "token" else MAX_ROW_BYTES
    records = _read_commits(source, manifest, plan, row_bytes)
    _check_excluded(source.root, manifest, plan, records)
    return StoreRecords(manifest, identity, plan, records)


def _read_manifest(source: StoreSource) -> Manifest:
    try:
        data = source.read(MANIFEST_FILE, max_bytes=MAX_MANIFEST_BYTES)
    except FileNotFoundError as error:
        raise IncompleteStoreError(source.root) from error
    document = decode_record(data, store=source.root, name=MANIFEST_FILE)
    version = document.get("format")
    if version != FORMAT_VERSION:
        shown = ascii(version)[:_MAX_VERSION_CHARACTERS]
        raise RefusedError(
            f"store {source.root}: has format {shown}, this tmkd reads {FORMAT_VERSION!r}; "
            "open it with the tmkd that wrote it, or make it anew"
        )
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
    source: StoreSource, manifest: Manifest, plan: Plan, row_bytes: int
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
            problem = _find_problem(record, entry, task, manifest) or _find_wrong_sum(record, row_bytes)
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
    record: CommitRecord, entry: ManifestShard, task: ShardTask, manifest: Manifest
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
    return None


def _find_wrong_sum(record: CommitRecord, row_bytes: int) -> str | None:
    offset = 0
    for region in record.regions():
        if region.offset != offset:
            return f"leaves a gap before byte {region.offset}"
        if region.length > MAX_REGION_BYTES + region.rows * row_bytes:
            return f"has a region of {region.length} bytes for {region.rows} rows"
        offset += region.length
    if not all(batch.length for batch in record.batches):
        return "has a batch without bytes"
    if offset != record.num_bytes:
        return f"covers {offset} bytes of {record.num_bytes}"
    excluded = [row.ordinal for row in record.excluded]
    if not all(record.start <= ordinal < record.stop for ordinal in excluded):
        return "excludes a row of another shard"
    if len(set(excluded)) != len(excluded):
        return "excludes a row twice"
    rows = sum(batch.rows for batch in record.batches)
    if not rows == record.num_rows == record.stop - record.start - len(excluded):
        return f"has {rows} rows in its batches, which are not those of its shard"
    return None


def _check_hash(root: str, name: str, data: bytes, sha256: str) -> None:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedStoreError(f"{name} does not match its hash", store=root)
