"""The writing side of a logit store (DESIGN section 4), on whatever storage it lies.

A shard becomes visible through its commit record alone. Until that exists nothing of the shard
counts, whatever the process died of; afterwards nothing of it changes.

Invariants (tests/precompute/test_store_writer.py):
    1. A fault at any step publishes nothing, leaves no temporary file, and the next attempt works.
    2. Of two attempts at one shard exactly one is committed; the loser deletes its own file.
    3. A commit record never names a file that is not there.
    4. The manifest's bytes depend on STORE.json, plan and commit records alone; a slow process does not
       leave an older one there (tests/reliability/test_two_runs.py).
    5. A directory that holds another store is refused, never written to.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from precompute.encode import store_schema
from precompute.near_miss import differing_fields
from precompute.shard_file import ShardContent, read_back, write_batches
from schemas.errors import DamagedStoreError, IncompleteStoreError, RefusedError, TmkdError
from schemas.fault_points import FaultPoint, reach
from schemas.plan import Plan, ShardTask, encode_plan
from schemas.records import (
    COMMIT_DIRECTORY,
    DATA_DIRECTORY,
    MANIFEST_FILE,
    MAX_IDENTITY_BYTES,
    MAX_MANIFEST_BYTES,
    PLAN_FILE,
    STORE_FILE,
    CommitRecord,
    ExcludedRow,
    Manifest,
    StoreIdentity,
    encode_record,
    record_name,
    shard_stem,
)
from schemas.storage.location import create_storage, open_storage
from schemas.storage.storage import Storage
from schemas.store_files import (
    StoredCommit,
    check_commit,
    check_data_file,
    check_owner,
    has_file,
    list_commits,
    list_data,
    load_commit,
    load_commits,
    load_identity,
    load_manifest,
    load_plan,
)


@dataclass(frozen=True)
class StoreWriter:
    """An opened store: its identity and plan are in its storage and have been checked.

    Attributes:
        storage: Where it lies.
        identity: ``STORE.json`` as it is there.
        plan: ``plan.arrow`` as it is there.
    """

    storage: Storage
    identity: StoreIdentity
    plan: Plan

    @classmethod
    def open(
        cls, root: str | Path, identity: StoreIdentity, plan: Plan, *, single_committer: bool = False
    ) -> StoreWriter:
        """Creates the store, or opens the one that is there; several processes may do so at once.

        Args:
            root: The store's location.
            identity: What it is to be.
            plan: Its plan.
            single_committer: See ``schemas.storage.location.create_storage``.

        Raises:
            RefusedError: Another store is there.
            DamagedStoreError: What is there cannot be read.
            ResourceError: The storage is full or may not be written.
        """
        if plan.plan_hash != identity.plan_hash:
            raise ValueError("identity and plan have different plan hashes")
        storage = create_storage(root, single_committer=single_committer)
        if has_file(storage, STORE_FILE):
            _refuse_other(storage, identity)
        if not has_file(storage, PLAN_FILE):
            storage.create(PLAN_FILE, encode_plan(plan))
        reach(FaultPoint.PLAN_CREATED)
        load_plan(storage, plan.plan_hash)
        storage.create(STORE_FILE, encode_record(identity))
        reach(FaultPoint.STORE_CREATED)
        return cls._attach(storage, identity)

    @classmethod
    def attach(cls, root: str | Path, *, expected: StoreIdentity | None = None) -> StoreWriter:
        """Opens a store that ``open`` has created.

        Raises:
            RefusedError: It is not the store that was expected.
            DamagedStoreError: It cannot be read.
        """
        return cls._attach(open_storage(root), expected)

    @classmethod
    def _attach(cls, storage: Storage, expected: StoreIdentity | None) -> StoreWriter:
        if expected is not None:
            _refuse_other(storage, expected)
        identity = load_identity(storage)
        return cls(storage, identity, load_plan(storage, identity.plan_hash))

    @property
    def root(self) -> str:
        """Location of the store."""
        return self.storage.root

    @property
    def schema(self) -> pa.Schema:
        """Layout of this store's shards."""
        return store_schema(self.identity, store=self.root)

    def commit_records(self) -> dict[int, StoredCommit]:
        """Reads the commit record that counts (the highest revision) of each committed shard.

        Returns:
            By shard id, ascending.

        Raises:
            DamagedStoreError: A record is damaged, is not of this store, or names a data file
                that is missing or has another size.
        """
        commits = load_commits(self.storage)
        files = list_data(self.storage) if commits else {}
        for commit in commits.values():
            check_commit(self.storage, commit, self.identity, self.plan)
            check_data_file(self.storage, commit.record, files)
        return commits

    def committed_shards(self) -> frozenset[int]:
        """Returns the ids of the committed shards.

        Raises:
            DamagedStoreError: See ``commit_records``.
        """
        return frozenset(self.commit_records())

    def find_commit(self, shard: int, revision: int) -> CommitRecord | None:
        """Returns the commit record of a shard's revision, if another attempt has made it already.

        Raises:
            DamagedStoreError: It is damaged.
        """
        return load_commit(self.storage, shard, revision)

    def write_shard(
        self,
        task: ShardTask,
        batches: Iterable[pa.RecordBatch],
        excluded: Sequence[ExcludedRow] = (),
        *,
        revision: int = 0,
    ) -> tuple[CommitRecord, bool]:
        """Writes one shard and commits it, or leaves nothing behind. Arguments: see ``write_data``.

        Returns:
            The record that counts, and whether it is this attempt's.

        Raises:
            ShardContentError: The rows are not those of the plan, or not finite.
            ResourceError: The storage is full, unreachable, or may not be written.
        """
        return self.commit(self.write_data(task, batches, excluded, revision=revision))

    def write_data(
        self,
        task: ShardTask,
        batches: Iterable[pa.RecordBatch],
        excluded: Sequence[ExcludedRow] = (),
        *,
        revision: int = 0,
    ) -> CommitRecord:
        """Publishes the data file of one shard, which counts only once its record is committed.

        Args:
            task: The shard's rows.
            batches: Record batches of ``schema``, in ordinal order, without the excluded rows.
            excluded: Rows without logits.
            revision: 0; a repair commits a higher one.

        Returns:
            The record to commit.

        Raises:
            ShardContentError: The rows are not those of the plan, or not finite.
            ResourceError: The storage is full, unreachable, or may not be written.
        """
        file = f"{shard_stem(task.shard)}-{uuid.uuid4().hex}.arrow"

        def fill(path: Path) -> ShardContent:
            return self._fill(path, task, batches, excluded)

        content = self.storage.publish(f"{DATA_DIRECTORY}/{file}", fill)
        reach(FaultPoint.SHARD_PUBLISHED)
        return self._make_record(task, content, excluded, file, revision)

    def commit(self, record: CommitRecord) -> tuple[CommitRecord, bool]:
        """Commits a shard whose data file ``write_data`` has published: the commit point.

        Returns:
            The record that counts, and whether it is the given one; if not, the given one's data file
            is deleted.

        Raises:
            ResourceError: The storage is full, unreachable, or may not be written.
            DamagedStoreError: Another attempt's record is there, damaged.
        """
        return commit_shard(self.storage, record)

    def finish(self) -> Manifest:
        """Writes the manifest once every shard is committed; doing it again changes nothing.

        Raises:
            IncompleteStoreError: Shards are missing.
            DamagedStoreError: See ``commit_records``.
        """
        while True:
            revisions = list_commits(self.storage)
            manifest = self._make_manifest()
            data = encode_record(manifest)
            if self._read_manifest() != data:
                self.storage.replace(MANIFEST_FILE, data)
            # A process that was slow to write may have covered the manifest of a repair.
            if list_commits(self.storage) == revisions:
                return manifest

    def is_complete(self) -> bool:
        """Tells whether the manifest is there and belongs to this store; data files are looked at by size.

        Raises:
            DamagedStoreError: The manifest is damaged or belongs to another store, or the data file of a
                shard that it lists is gone or has another size.
        """
        manifest = load_manifest(self.storage)
        if manifest is None:
            return False
        check_owner(self.storage, MANIFEST_FILE, manifest, self.identity)
        # One listing, no record: the manifest names no files, their names begin with the shard.
        sizes = {(name.partition("-")[0], file.num_bytes) for name, file in list_data(self.storage).items()}
        for entry in manifest.shards:
            if (shard_stem(entry.shard), entry.num_bytes) not in sizes:
                message = f"the data file of {entry.record} is gone, or has not {entry.num_bytes} bytes"
                raise DamagedStoreError(message, store=self.root, shard=entry.shard)
        return len(manifest.shards) == self.plan.num_shards

    def _make_manifest(self) -> Manifest:
        commits = self.commit_records()
        if len(commits) != self.plan.num_shards:
            raise IncompleteStoreError(self.root)
        shards = tuple(commit.entry() for commit in commits.values())
        return Manifest(
            plan_hash=self.identity.plan_hash,
            generation_hash=self.identity.generation_hash,
            store_sha256=_hash_bytes(self.storage.read(STORE_FILE, max_bytes=MAX_IDENTITY_BYTES)),
            plan_sha256=hashlib.sha256(self.storage.map_file(PLAN_FILE)).hexdigest(),
            num_rows=sum(shard.num_rows for shard in shards),
            shards=shards,
            excluded=tuple(row for commit in commits.values() for row in commit.record.excluded),
        )

    def _read_manifest(self) -> bytes | None:
        try:
            return self.storage.read(MANIFEST_FILE, max_bytes=MAX_MANIFEST_BYTES)
        except (FileNotFoundError, DamagedStoreError):
            return None

    def _fill(
        self,
        path: Path,
        task: ShardTask,
        batches: Iterable[pa.RecordBatch],
        excluded: Sequence[ExcludedRow],
    ) -> ShardContent:
        with path.open("xb") as file:
            reach(FaultPoint.SHARD_BEGUN)
            offsets = write_batches(file, self.schema, batches)
        reach(FaultPoint.SHARD_WRITTEN)
        content = read_back(path, offsets, self.plan, task, excluded)
        reach(FaultPoint.SHARD_CHECKED)
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


def commit_shard(storage: Storage, record: CommitRecord) -> tuple[CommitRecord, bool]:
    """Creates a commit record only if it is absent. See ``StoreWriter.commit``."""
    name = f"{COMMIT_DIRECTORY}/{record_name(record.shard, record.revision)}"
    try:
        committed = storage.create(name, encode_record(record))
    except BaseException:
        _withdraw(storage, record)
        raise
    reach(FaultPoint.SHARD_COMMITTED)
    if committed:
        return record, True
    storage.delete(f"{DATA_DIRECTORY}/{record.file}")
    winner = load_commit(storage, record.shard, record.revision)
    if winner is None:
        raise DamagedStoreError(f"{name} is gone again", store=storage.root, shard=record.shard)
    return winner, False


def _withdraw(storage: Storage, record: CommitRecord) -> None:
    """Deletes the data file of a record that was not committed, where that is certain.

    The record may be there although ``create`` raised, or may yet arrive at an object store; its
    data file must then stay. ``tmkd store gc`` takes what is left, also where the disk that failed
    lets nothing be read or deleted: the first error is the one to tell.
    """
    if not storage.settles:
        return
    with suppress(TmkdError, OSError):
        if load_commit(storage, record.shard, record.revision) != record:
            storage.delete(f"{DATA_DIRECTORY}/{record.file}")


def _refuse_other(storage: Storage, identity: StoreIdentity) -> None:
    theirs = load_identity(storage)
    differing = differing_fields(theirs, identity)
    if differing:
        raise RefusedError(
            f"store {storage.root}: another store is there; name another root", differing=differing
        )
    if theirs.native_labels != identity.native_labels:
        raise RefusedError(
            f"store {storage.root}: the teacher's labels have other names now; restore id2label in its "
            "config.json, and rename labels in the recipe's label_map",
            differing=[
                f"native_labels: {', '.join(theirs.native_labels)} -> {', '.join(identity.native_labels)}"
            ],
        )


def _hash_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
