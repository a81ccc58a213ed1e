"""A logit store, read by rows of its corpus part (DESIGN sections 4 and 5).

Shapes: B rows asked for, R rows of a batch, C classes.

Invariants:
    1. Records and plan describe one store, whole (``distill.store_records``).
    2. A shard's bytes are checked before they are decoded (``distill.shard_file``).
    3. What ``gather`` returns is a copy; mapped memory is never handed out writable
       (tests/distill/test_store_reader.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distill.shard_file import BatchColumns, ShardFile
from distill.store_records import StoreRecords, read_store_records
from schemas.errors import DataError
from schemas.records import CommitRecord
from schemas.rows import TEXT_HASH_BYTES
from schemas.storage.location import is_local, open_storage
from schemas.storage.storage import StoreSource
from schemas.store_files import check_data_file, list_data

MAX_MAPPED_SHARDS = 256
"""Maps kept at once; an evicted shard is mapped and checked again when it is next touched."""

Rows = npt.NDArray[np.int64]


class LogitStore:
    """One teacher's logits over one corpus part. Use ``LogitStore.open``.

    Attributes:
        root: The store's location: a directory or a URL.
        identity: What the store is.
        plan: Rows and cut of the part.
        records: The commit record of each shard.
        excluded: Ordinals without logits, int64, ascending.
    """

    def __init__(self, source: StoreSource, found: StoreRecords, *, verify: bool) -> None:
        self.root = source.root
        self.identity = found.identity
        self.plan = found.plan
        self.records = records = found.records
        self.excluded: Rows = _sorted_ordinals(records)
        self._source = source
        self._verify = verify
        sizes = [batch.rows for record in records for batch in record.batches]
        # Of each batch, over the whole store: its first stored row, its shard, its place in the shard.
        self._batch_starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._batch_shards = np.repeat(np.arange(len(records)), [len(r.batches) for r in records])
        self._first_batches = np.searchsorted(self._batch_shards, np.arange(len(records) + 1))
        self._mapped: OrderedDict[int, ShardFile] = OrderedDict()

    @classmethod
    def open(cls, root: str | Path, *, verify: bool = True) -> LogitStore:
        """Opens a finished store.

        Args:
            root: The store's directory, or its URL.
            verify: Check shard files against their hashes: head and tail of each when it is mapped (a
                local one's now), a record batch when it is first touched; then also that its logits
                are finite and its examples the plan's. JSON records, the plan and the layout of what
                is decoded are always checked, and that each data file is there with its size.

        Raises:
            IncompleteStoreError: There is no manifest.
            DamagedStoreError: A file is missing, truncated, or does not match its hash.
            RefusedError: The store has another format version.
            ResourceError: A file may not be read, or the object store cannot be reached.
        """
        source = open_storage(root)
        if is_local(source.root) and not Path(source.root).is_dir():
            raise DataError(f"store {source.root}: there is no such directory")
        found = read_store_records(source)
        files = list_data(source)
        for record in found.records:
            check_data_file(source, record, files)
        store = cls(source, found, verify=verify)
        if source.is_local:
            for shard in range(len(store.records)):
                store.shard_file(shard)
        return store

    @property
    def native_labels(self) -> tuple[str, ...]:
        """The teacher's label names in the order of its logits."""
        return self.identity.native_labels

    @property
    def num_labels(self) -> int:
        """C."""
        return len(self.identity.native_labels)

    @property
    def num_rows(self) -> int:
        """Rows with logits: the part's rows without the excluded ones."""
        return int(self._batch_starts[-1])

    def stored_rows(self) -> Rows:
        """Returns the rows of the part that have logits, int64, ascending."""
        rows = np.arange(self.plan.num_rows, dtype=np.int64)
        return np.delete(rows, self.excluded) if len(self.excluded) else rows

    def gather(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Copies the logits of ``rows``.

        Args:
            rows: int64[B], row numbers of the part, in any order.

        Returns:
            float32[B, C], raw logits in the native label order.

        Raises:
            DataError: A row is out of range or excluded.
            DamagedStoreError: A touched batch does not match its hash.
        """
        result = np.empty((len(rows), self.num_labels), np.float32)
        for positions, within, columns in self._locate(rows):
            result[positions] = columns.logits_RC[within]
        return result

    def text_hashes(self, rows: Rows) -> npt.NDArray[np.uint8]:
        """Copies the text hashes that the shards hold for ``rows``: uint8[B, 16]. Raises like ``gather``."""
        result = np.empty((len(rows), TEXT_HASH_BYTES), np.uint8)
        for positions, within, columns in self._locate(rows):
            result[positions] = columns.text_hashes[within]
        return result

    def read_shard(self, shard: int) -> Iterator[BatchColumns]:
        """Yields the checked batches of a shard in order, as views of the map.

        Raises:
            DamagedStoreError: A batch does not match its hash, or holds other rows than its record.
        """
        file = self.shard_file(shard)
        for index in range(len(self.records[shard].batches)):
            yield file.batch(index)

    def shard_file(self, shard: int) -> ShardFile:
        """Returns a shard's mapped file, mapping and checking it if it is not mapped."""
        file = self._mapped.get(shard)
        if file is None:
            file = ShardFile(
                self._source, self.records[shard], self.num_labels, verify=self._verify, plan=self.plan
            )
            self._mapped[shard] = file
            if len(self._mapped) > MAX_MAPPED_SHARDS:
                self._mapped.popitem(last=False)
        else:
            self._mapped.move_to_end(shard)
        return file

    def _locate(self, rows: Rows) -> Iterator[tuple[Rows, Rows, BatchColumns]]:
        """Yields, for each touched batch: positions in ``rows``, rows within the batch, the batch."""
        stored = self._stored_numbers(rows)
        batches = np.searchsorted(self._batch_starts, stored, side="right") - 1
        by_batch = np.argsort(batches, kind="stable")
        touched, starts = np.unique(batches[by_batch], return_index=True)
        for batch, positions in zip(touched.tolist(), np.split(by_batch, starts[1:]), strict=True):
            shard = int(self._batch_shards[batch])
            columns = self.shard_file(shard).batch(batch - int(self._first_batches[shard]))
            yield positions, stored[positions] - self._batch_starts[batch], columns

    def _stored_numbers(self, rows: Rows) -> Rows:
        if len(rows) and (rows.min() < 0 or rows.max() >= self.plan.num_rows):
            raise DataError(
                f"store {self.root}: rows {rows.min()} to {rows.max()} asked for, "
                f"the part has {self.plan.num_rows}"
            )
        if not len(self.excluded):
            return rows
        before = np.searchsorted(self.excluded, rows, side="left")
        hit = self.excluded[np.minimum(before, len(self.excluded) - 1)] == rows
        if hit.any():
            raise DataError(f"store {self.root}: row {rows[hit][0]} is excluded, it has no logits")
        return rows - before


def _sorted_ordinals(records: tuple[CommitRecord, ...]) -> Rows:
    return np.array(sorted(row.ordinal for record in records for row in record.excluded), np.int64)
