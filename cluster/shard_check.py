"""One shard's data file, examined to its end: every region's hash, then every row.

Invariants (tests/cluster/test_store_check.py):
    1. One damaged region hides no other: all are named, with batch and offset.
    2. Rows are read only from regions whose hash is right, one batch at a time.
    3. What lies in an object store is read from there, not from a local copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import xxhash

from cluster.diagnosis import Fault, Problem
from precompute.encode import LABELS_KEY
from schemas.arrow_message import ArrowMessageError, read_batch, read_head
from schemas.errors import DamagedStoreError
from schemas.plan import Plan
from schemas.records import DATA_DIRECTORY, BatchRecord, CommitRecord
from schemas.rows import fingerprint_columns
from schemas.shard_rows import ShardRowsError, check_rows, select_rows
from schemas.storage.storage import StoredFile, StoreSource
from schemas.token_rows import LAYOUT_KEY

_BOUND_METADATA: Final = {
    LABELS_KEY: "the store's labels in their order",
    LAYOUT_KEY: "the store's codec, policy, vocabulary and temperatures",
}
"""Metadata of a shard's schema that must be the store's own, whichever of them it has."""


class ShardCheck:
    """Examines the data files of one store.

    Args:
        source: The store.
        schema: Of its shards; None if it is not known, so that rows are not read.
        plan: The store's plan; None if it is not known, so that rows are not read.
        deep: Read everything, not only head and tail.
    """

    def __init__(
        self,
        source: StoreSource,
        schema: pa.Schema | None,
        plan: Plan | None,
        *,
        deep: bool,
    ) -> None:
        self._source = source
        self._schema = schema
        self._plan = plan
        self._deep = deep

    def examine(self, record: CommitRecord, file: StoredFile | None) -> list[Problem]:
        """Returns what is wrong with a shard's data.

        Args:
            record: Its commit record, which does not contradict itself.
            file: The data file as it is listed, or None.

        Raises:
            ResourceError: The storage cannot be read.
        """
        name = f"{DATA_DIRECTORY}/{record.file}"
        if file is None:
            return [_problem(record, "missing", f"{name} is missing")]
        if file.num_bytes != record.num_bytes:
            message = f"{name} has {file.num_bytes} bytes, its record says {record.num_bytes}"
            return [_problem(record, "size", message, offset=min(file.num_bytes, record.num_bytes))]
        # Head and tail of a remote file would mean to fetch all of it.
        if not self._deep and not self._source.is_local:
            return []
        problems = self._read(name, record)
        # What came over a network may be wrong once.
        return self._read(name, record) if problems and not self._source.is_local else problems

    def _read(self, name: str, record: CommitRecord) -> list[Problem]:
        try:
            data = self._source.map_file(name)
        except FileNotFoundError:
            return [_problem(record, "missing", f"{name} is missing")]
        except DamagedStoreError as error:
            return [_problem(record, "damaged", error.damage)]
        if data.size != record.num_bytes:
            message = f"{name} has {data.size} bytes, its record says {record.num_bytes}"
            return [_problem(record, "size", message, offset=min(data.size, record.num_bytes))]
        return list(_ShardBytes(record, data, self._schema, self._plan).examine(deep=self._deep))


@dataclass(frozen=True)
class _ShardBytes:
    """A mapped data file that is as long as its record says."""

    record: CommitRecord
    data: pa.Buffer
    schema: pa.Schema | None
    plan: Plan | None

    @property
    def name(self) -> str:
        return f"{DATA_DIRECTORY}/{self.record.file}"

    def examine(self, *, deep: bool) -> Iterator[Problem]:
        record = self.record
        head = self._check_region(record.head, "head")
        yield from head
        yield from self._check_region(record.tail, "tail")
        if not head:
            yield from self._check_head()
        if not deep:
            return
        damaged = set()
        for batch, region in enumerate(record.batches):
            problems = self._check_region(region, f"record batch {batch}", batch)
            yield from problems
            damaged |= {batch for _ in problems}
        # After the regions, which say better where the damage is.
        if hashlib.sha256(self.data).hexdigest() != record.sha256:
            yield _problem(record, "hash", f"{self.name} does not match its SHA-256")
        yield from self._check_rows(damaged)

    def _check_region(self, region: BatchRecord, part: str, batch: int | None = None) -> list[Problem]:
        if xxhash.xxh3_64_hexdigest(self._slice(region)) == region.xxh3:
            return []
        message = f"{self.name}: the bytes of its {part} do not match their hash"
        return [_problem(self.record, "hash", message, batch=batch, offset=region.offset)]

    def _check_head(self) -> Iterator[Problem]:
        if self.schema is None:
            return
        try:
            metadata = read_head(self._slice(self.record.head), self.schema)
        except ArrowMessageError as error:
            message = f"{self.name} does not start as a shard: {error}"
            yield _problem(self.record, "damaged", message, offset=0)
            return
        for key, meaning in _BOUND_METADATA.items():
            if metadata.get(key) != self.schema.metadata.get(key):
                yield _problem(self.record, "labels", f"{self.name} does not name {meaning}")

    def _check_rows(self, damaged: set[int]) -> Iterator[Problem]:
        """Checks what the rows mean, except those of the ``damaged`` batches."""
        record = self.record
        if self.plan is None or self.schema is None:
            return
        try:
            expected = select_rows(self.plan, record.start, record.stop, record.excluded)
        except ShardRowsError as error:
            yield _problem(record, error.fault, f"its commit record is wrong: {error}")
            return
        first = 0
        for batch, region in enumerate(record.batches):
            rows = expected.slice(first, region.rows)
            first += region.rows
            if batch not in damaged:
                yield from self._check_batch(batch, region, rows)
        if (
            fingerprint_columns(expected.column("example_id"), expected.column("text_hash"))
            != record.ids_hash
        ):
            yield _problem(record, "rows", "its commit record has another hash of ids than the plan")

    def _check_batch(self, batch: int, region: BatchRecord, expected: pa.Table) -> Iterator[Problem]:
        try:
            found = read_batch(self._slice(region), self.schema)
            check_rows(pa.Table.from_batches([found]), expected)
        except (ArrowMessageError, ShardRowsError) as error:
            fault: Fault = error.fault if isinstance(error, ShardRowsError) else "damaged"
            message = f"{self.name}: record batch {batch}: {error}"
            yield _problem(self.record, fault, message, batch=batch, offset=region.offset)

    def _slice(self, region: BatchRecord) -> pa.Buffer:
        return self.data.slice(region.offset, region.length)


def _problem(
    record: CommitRecord, fault: Fault, message: str, *, batch: int | None = None, offset: int | None = None
) -> Problem:
    return Problem(place="data", fault=fault, message=message, shard=record.shard, batch=batch, offset=offset)
