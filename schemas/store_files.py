"""The small files of a store, read through its storage: identity, plan, commit records, manifest.

Invariants (tests/schemas/test_store_files.py):
    1. Of a shard's commit records the highest revision counts, told by the file's name; lower ones are
       not even read, so that damage which a repair has replaced is no damage.
    2. A record that belongs to another store, another shard or another cut is damage.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from schemas.errors import DamagedStoreError, DataError
from schemas.plan import Plan, parse_plan
from schemas.records import (
    COMMIT_DIRECTORY,
    DATA_DIRECTORY,
    MANIFEST_FILE,
    MAX_COMMIT_BYTES,
    MAX_IDENTITY_BYTES,
    MAX_MANIFEST_BYTES,
    PLAN_FILE,
    STORE_FILE,
    CommitRecord,
    Manifest,
    ManifestShard,
    StoreIdentity,
    parse_record,
    parse_record_name,
    record_name,
)
from schemas.storage.reading import read_files
from schemas.storage.storage import StoredFile, StoreSource


@dataclass(frozen=True, slots=True)
class StoredCommit:
    """A commit record as it lies in the store.

    Attributes:
        name: Its file below ``commit/``.
        sha256: Of the file's bytes.
    """

    name: str
    sha256: str
    record: CommitRecord

    def entry(self) -> ManifestShard:
        """Returns the shard's line of the manifest."""
        record = self.record
        return ManifestShard(
            shard=record.shard,
            record=self.name,
            record_sha256=self.sha256,
            num_rows=record.num_rows,
            num_bytes=record.num_bytes,
        )


def has_file(source: StoreSource, name: str) -> bool:
    """Tells whether a file is there, directly below the store's root."""
    return any(file.name == name for file in source.list_files(""))


def load_identity(source: StoreSource) -> StoreIdentity:
    """Reads ``STORE.json``.

    Raises:
        DataError: There is none, so that this is no store.
        DamagedStoreError: It is damaged.
    """
    try:
        data = source.read(STORE_FILE, max_bytes=MAX_IDENTITY_BYTES)
    except FileNotFoundError as error:
        message = f"{source.root}: is no store, it has no {STORE_FILE}; see `tmkd store ls`"
        raise DataError(message) from error
    return parse_record(data, StoreIdentity, store=source.root, name=STORE_FILE)


def load_plan(
    source: StoreSource, plan_hash: str, *, sha256: str | None = None, max_bytes: int | None = None
) -> Plan:
    """Reads ``plan.arrow``.

    Args:
        source: The store.
        plan_hash: What the plan's hash must be.
        sha256: What the file's hash must be, where the manifest says it.
        max_bytes: A larger file is damage, and is not hashed.

    Raises:
        DamagedStoreError: It is missing, damaged, or another plan.
    """
    try:
        data = source.map_file(PLAN_FILE, sha256=sha256)
    except FileNotFoundError as error:
        raise DamagedStoreError(f"{PLAN_FILE} is missing", store=source.root) from error
    if max_bytes is not None and data.size > max_bytes:
        raise DamagedStoreError(
            f"{PLAN_FILE} has {data.size} bytes, too many for its rows", store=source.root
        )
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedStoreError(f"{PLAN_FILE} does not match its hash", store=source.root)
    try:
        return parse_plan(data, source=PLAN_FILE, expected_hash=plan_hash)
    except DataError as error:
        raise DamagedStoreError(error.message, store=source.root) from error


def load_manifest(source: StoreSource) -> Manifest | None:
    """Reads ``manifest.json``, or returns None where there is none: the store is not finished.

    Raises:
        DamagedStoreError: It is damaged.
    """
    try:
        data = source.read(MANIFEST_FILE, max_bytes=MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        return None
    return parse_record(data, Manifest, store=source.root, name=MANIFEST_FILE)


def load_commit(source: StoreSource, shard: int, revision: int) -> CommitRecord | None:
    """Reads one commit record, or returns None where there is none.

    Raises:
        DamagedStoreError: It is damaged.
    """
    name = record_name(shard, revision)
    try:
        data = source.read(f"{COMMIT_DIRECTORY}/{name}", max_bytes=MAX_COMMIT_BYTES)
    except FileNotFoundError:
        return None
    return parse_record(data, CommitRecord, store=source.root, name=name)


def list_commits(source: StoreSource) -> dict[int, tuple[int, ...]]:
    """Lists the revisions of each shard that have a commit record, ascending."""
    found: dict[int, list[int]] = {}
    for file in source.list_files(COMMIT_DIRECTORY):
        parsed = parse_record_name(file.name.removeprefix(f"{COMMIT_DIRECTORY}/"))
        if parsed is not None:
            found.setdefault(parsed[0], []).append(parsed[1])
    return {shard: tuple(sorted(found[shard])) for shard in sorted(found)}


def load_commits(source: StoreSource) -> dict[int, StoredCommit]:
    """Reads the commit record that counts of each committed shard, ascending.

    Raises:
        DamagedStoreError: One is damaged.
    """
    names = [record_name(shard, revisions[-1]) for shard, revisions in list_commits(source).items()]
    paths = [f"{COMMIT_DIRECTORY}/{name}" for name in names]
    found = {}
    for name, data in zip(names, read_files(source, paths, max_bytes=MAX_COMMIT_BYTES), strict=True):
        record = parse_record(data, CommitRecord, store=source.root, name=name)
        found[record.shard] = StoredCommit(name, hashlib.sha256(data).hexdigest(), record)
        if name != record_name(record.shard, record.revision):
            message = f"{name} holds the record of shard {record.shard}, revision {record.revision}"
            raise DamagedStoreError(message, store=source.root, shard=record.shard)
    return dict(sorted(found.items()))


def check_owner(
    source: StoreSource, name: str, record: CommitRecord | Manifest, identity: StoreIdentity
) -> None:
    """Checks that a record is of this store.

    Raises:
        DamagedStoreError: It is another's.
    """
    if (record.plan_hash, record.generation_hash) != (identity.plan_hash, identity.generation_hash):
        raise DamagedStoreError(f"{name} belongs to another store", store=source.root)


def check_commit(source: StoreSource, commit: StoredCommit, identity: StoreIdentity, plan: Plan) -> None:
    """Checks that a commit record is of this store and fits the plan.

    Raises:
        DamagedStoreError: It does not.
    """
    record = commit.record
    check_owner(source, commit.name, record, identity)
    inside = record.shard < plan.num_shards
    if not inside or (record.start, record.stop) != plan.bounds[record.shard : record.shard + 2]:
        raise DamagedStoreError(
            f"{commit.name} does not match the plan", store=source.root, shard=record.shard
        )


def list_data(source: StoreSource) -> dict[str, StoredFile]:
    """Lists the files below ``data/``, by name without the directory."""
    prefix = f"{DATA_DIRECTORY}/"
    return {file.name.removeprefix(prefix): file for file in source.list_files(DATA_DIRECTORY)}


def check_data_file(source: StoreSource, record: CommitRecord, files: Mapping[str, StoredFile]) -> None:
    """Checks that a shard's data file is there, whole.

    Raises:
        DamagedStoreError: It is missing or has another size.
    """
    file = files.get(record.file)
    if file is None:
        raise DamagedStoreError(f"data/{record.file} is missing", store=source.root, shard=record.shard)
    if file.num_bytes != record.num_bytes:
        raise DamagedStoreError(
            f"data/{record.file} has {file.num_bytes} bytes, its record says {record.num_bytes}",
            store=source.root,
            shard=record.shard,
            offset=min(file.num_bytes, record.num_bytes),
        )
