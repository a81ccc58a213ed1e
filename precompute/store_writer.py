"""The writing side of a logit store on a local file system (DESIGN section 4).

A shard becomes visible through its commit record alone. Until that exists nothing of the shard
counts, whatever the process died of; afterwards nothing of it changes.

Invariants (tests/precompute/test_store_writer.py):
    1. A fault at any step publishes nothing, leaves no temporary file, and the next attempt works.
    2. Of two attempts at one shard exactly one is committed; the loser deletes its own file.
    3. A commit record never names a file that is not there.
    4. The manifest's bytes depend on STORE.json, plan and commit records alone.
    5. A directory that holds another store is refused, never written to.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from schemas.storage.os_errors import translated_os_errors
from precompute.encode import shard_schema
from precompute.near_miss import differing_fields
from precompute.shard_file import ShardContent, read_back, write_batches
from schemas.digest import create_file, replace_file, sync_directory
from schemas.errors import DamagedStoreError, DataError, IncompleteStoreError, RefusedError
from schemas.plan import Plan, ShardTask, read_plan, write_plan
from schemas.records import (
    COMMIT_DIRECTORY,
    DATA_DIRECTORY,
    MANIFEST_FILE,
    PLAN_FILE,
    STORE_FILE,
    CommitRecord,
    ExcludedRow,
    Manifest,
    ManifestShard,
    StoreIdentity,
    encode_record,
    read_record,
    record_name,
    shard_stem,
)


@dataclass(frozen=True)
class StoreWriter:
    """An opened store: its identity and plan are on disk and have been checked.

    Attributes:
        root: The store's directory.
        identity: ``STORE.json`` as it is on disk.
        plan: ``plan.arrow`` as it is on disk.
    """

    root: Path
    identity: StoreIdentity
    plan: Plan

    @classmethod
    def open(cls, root: Path, identity: StoreIdentity, plan: Plan) -> StoreWriter:
        """Creates the store, or opens the one that is there; several processes may do so at once.

        Raises:
            RefusedError: Another store is there.
            DamagedStoreError: What is there cannot be read.
            ResourceError: The disk is full or may not be written.
        """
        if plan.plan_hash != identity.plan_hash:
            raise ValueError("identity and plan have different plan hashes")
        with translated_os_errors(root):
            for directory in (root, root / DATA_DIRECTORY, root / COMMIT_DIRECTORY):
                directory.mkdir(parents=True, exist_ok=True)
                sync_directory(directory.parent)
            if (root / STORE_FILE).exists():
                _refuse_other(root, identity)
            _create_plan(root, plan)
            create_file(root / STORE_FILE, encode_record(identity))
        return cls.attach(root, expected=identity)

    @classmethod
    def attach(cls, root: Path, *, expected: StoreIdentity | None = None) -> StoreWriter:
        """Opens a store that ``open`` has created.

        Raises:
            RefusedError: It is not the store that was expected.
            DamagedStoreError: It cannot be read.
        """
        if expected is not None:
            _refuse_other(root, expected)
        identity = read_record(root / STORE_FILE, StoreIdentity, store=root)
        return cls(root, identity, _read_plan(root, identity.plan_hash))

    @property
    def schema(self) -> pa.Schema:
        """Layout of this store's shards."""
        return shard_schema(self.identity.native_labels)

    def commit_records(self) -> dict[int, tuple[str, CommitRecord]]:
        """Reads the commit record that counts (the highest revision) of each committed shard.

        Returns:
            From shard id, ascending, to the record's file name and the record.

        Raises:
            DamagedStoreError: A record is damaged, is not of this store, or names a data file
                that is missing or has another size.
        """
        found: dict[int, tuple[int, str, CommitRecord]] = {}
        for path in sorted((self.root / COMMIT_DIRECTORY).glob("s*.json")):
            record = read_record(path, CommitRecord, store=self.root)
            self._check_record(path.name, record)
            if record.shard not in found or record.revision > found[record.shard][0]:
                found[record.shard] = (record.revision, path.name, record)
        for _, _, record in found.values():
            self._check_data_file(record)
        return {shard: found[shard][1:] for shard in sorted(found)}

    def committed_shards(self) -> frozenset[int]:
        """Returns the ids of the committed shards.

        Raises:
            DamagedStoreError: See ``commit_records``.
        """
        return frozenset(self.commit_records())

    def write_shard(
        self,
        task: ShardTask,
        batches: Iterable[pa.RecordBatch],
        excluded: Sequence[ExcludedRow] = (),
        *,
        revision: int = 0,
    ) -> tuple[CommitRecord, bool]:
        """Writes one shard and commits it, or leaves nothing behind.

        Args:
            task: The shard's rows.
            batches: Record batches of ``schema``, in ordinal order, without the excluded rows.
            excluded: Rows without logits.
            revision: 0; a repair commits a higher one.

        Returns:
            The record that counts, and whether it is this attempt's.

        Raises:
            ShardContentError: The rows are not those of the plan, or not finite.
            ResourceError: The disk is full or may not be written.
        """
        attempt = uuid.uuid4().hex
        temporary = self.root / DATA_DIRECTORY / f".{shard_stem(task.shard)}-{attempt}.tmp"
        final = self.root / DATA_DIRECTORY / f"{shard_stem(task.shard)}-{attempt}.arrow"
        record_path = self.root / COMMIT_DIRECTORY / record_name(task.shard, revision)
        committed = False
        with translated_os_errors(self.root):
            try:
                content = self._write_temporary(temporary, task, batches, excluded)
                record = self._make_record(task, content, excluded, final.name, revision)
                temporary.rename(final)
                sync_directory(final.parent)
                committed = create_file(record_path, encode_record(record))
            finally:
                temporary.unlink(missing_ok=True)
                # The record may be there although `create_file` raised: it linked, then failed to
                # sync. Its data file must then stay.
                if not committed and not _names_file(record_path, final.name, self.root):
                    final.unlink(missing_ok=True)
        if not committed:
            record = read_record(record_path, CommitRecord, store=self.root)
        return record, committed

    def finish(self) -> Manifest:
        """Writes the manifest once every shard is committed; doing it again changes nothing.

        Raises:
            IncompleteStoreError: Shards are missing.
            DamagedStoreError: See ``commit_records``.
        """
        records = self.commit_records()
        if len(records) != self.plan.num_shards:
            raise IncompleteStoreError(self.root)
        shards = tuple(self._list_shard(name, record) for name, record in records.values())
        manifest = Manifest(
            plan_hash=self.identity.plan_hash,
            generation_hash=self.identity.generation_hash,
            store_sha256=_hash_bytes((self.root / STORE_FILE).read_bytes()),
            plan_sha256=_hash_bytes((self.root / PLAN_FILE).read_bytes()),
            num_rows=sum(shard.num_rows for shard in shards),
            shards=shards,
            excluded=tuple(row for _, record in records.values() for row in record.excluded),
        )
        data = encode_record(manifest)
        path = self.root / MANIFEST_FILE
        with translated_os_errors(self.root):
            if not path.exists() or path.read_bytes() != data:
                replace_file(path, data)
        return manifest

    def is_complete(self) -> bool:
        """Tells whether the manifest is there and belongs to this store.

        Raises:
            DamagedStoreError: The manifest is damaged or belongs to another store.
        """
        path = self.root / MANIFEST_FILE
        if not path.exists():
            return False
        manifest = read_record(path, Manifest, store=self.root)
        self._check_hashes(MANIFEST_FILE, manifest)
        return len(manifest.shards) == self.plan.num_shards

    def _write_temporary(
        self,
        path: Path,
        task: ShardTask,
        batches: Iterable[pa.RecordBatch],
        excluded: Sequence[ExcludedRow],
    ) -> ShardContent:
        with path.open("xb") as file:
            offsets = write_batches(file, self.schema, batches)
        content = read_back(path, offsets, self.plan, task, excluded)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        return content

    def _make_record(
        self,
        task: ShardTask,
        content: ShardContent,
        excluded: Sequence[ExcludedRow],
        file: str,
        revision: int,
    ) -> CommitRecord:
        return CommitRecord(
            plan_hash=self.identity.plan_hash,
            generation_hash=self.identity.generation_hash,
            shard=task.shard,
            revision=revision,
            file=file,
            start=task.start,
            stop=task.stop,
            num_rows=content.num_rows,
            num_bytes=content.num_bytes,
            sha256=content.sha256,
            ids_hash=content.ids_hash,
            head=content.head,
            batches=content.batches,
            tail=content.tail,
            excluded=tuple(sorted(excluded, key=lambda row: row.ordinal)),
        )

    def _check_hashes(self, name: str, record: CommitRecord | Manifest) -> None:
        ours = (self.identity.plan_hash, self.identity.generation_hash)
        if (record.plan_hash, record.generation_hash) != ours:
            raise DamagedStoreError(f"{name} belongs to another store", store=self.root)

    def _check_record(self, name: str, record: CommitRecord) -> None:
        self._check_hashes(name, record)
        if name != record_name(record.shard, record.revision):
            raise DamagedStoreError(f"{name} holds the record of shard {record.shard}", store=self.root)
        bounds = self.plan.bounds
        if record.shard >= self.plan.num_shards or (record.start, record.stop) != (
            bounds[record.shard],
            bounds[record.shard + 1],
        ):
            raise DamagedStoreError(f"{name} does not match the plan", store=self.root)

    def _check_data_file(self, record: CommitRecord) -> None:
        try:
            num_bytes = (self.root / DATA_DIRECTORY / record.file).stat().st_size
        except FileNotFoundError as error:
            message = f"data/{record.file} is missing; delete the store and run `tmkd precompute` again"
            raise DamagedStoreError(message, store=self.root, shard=record.shard) from error
        if num_bytes != record.num_bytes:
            message = f"data/{record.file} has {num_bytes} bytes, its record says {record.num_bytes}"
            raise DamagedStoreError(
                message + "; delete the store and run `tmkd precompute` again",
                store=self.root,
                shard=record.shard,
            )

    def _list_shard(self, name: str, record: CommitRecord) -> ManifestShard:
        data = (self.root / COMMIT_DIRECTORY / name).read_bytes()
        return ManifestShard(
            shard=record.shard,
            record=name,
            record_sha256=_hash_bytes(data),
            num_rows=record.num_rows,
            num_bytes=record.num_bytes,
        )


def _create_plan(root: Path, plan: Plan) -> None:
    """Creates ``plan.arrow`` if it is absent; racing creators leave exactly one of their files."""
    path = root / PLAN_FILE
    if path.exists():
        _read_plan(root, plan.plan_hash)
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write_plan(plan, temporary)
        create_file(path, temporary.read_bytes())
    finally:
        temporary.unlink(missing_ok=True)


def _read_plan(root: Path, plan_hash: str) -> Plan:
    try:
        return read_plan(root / PLAN_FILE, expected_hash=plan_hash)
    except DataError as error:
        raise DamagedStoreError(error.message, store=root) from error


def _refuse_other(root: Path, identity: StoreIdentity) -> None:
    theirs = read_record(root / STORE_FILE, StoreIdentity, store=root)
    differing = differing_fields(theirs, identity)
    if differing:
        raise RefusedError(f"store {root}: another store is there; name another root", differing=differing)
    if theirs.native_labels != identity.native_labels:
        raise RefusedError(
            f"store {root}: the teacher's labels have other names now; restore id2label in its config.json, "
            "and rename labels in the recipe's label_map",
            differing=[
                f"native_labels: {', '.join(theirs.native_labels)} -> {', '.join(identity.native_labels)}"
            ],
        )


def _names_file(record_path: Path, file: str, root: Path) -> bool:
    if not record_path.exists():
        return False
    return read_record(record_path, CommitRecord, store=root).file == file


def _hash_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
