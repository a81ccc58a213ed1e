"""A finished store of any level, read by rows of its corpus part (DESIGN sections 4 and 5).

Shapes: B rows asked for, R rows of a batch.

Invariants:
    1. Records and plan describe one store, whole (``distill.store_records``).
    2. A shard's bytes are checked before they are decoded (``distill.shard_file``).
    3. A store of another level is refused before a data file is touched
       (tests/distill/test_token_store.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, Literal, Self

import numpy as np
import numpy.typing as npt

from distill.shard_file import ShardFile
from distill.shard_layout import Columns, ShardLayout
from distill.store_records import StoreRecords, read_store_records
from schemas.errors import DataError, RefusedError
from schemas.records import CommitRecord, StoreIdentity
from schemas.rows import TEXT_HASH_BYTES
from schemas.storage.location import is_local, open_storage
from schemas.storage.storage import StoreSource
from schemas.store_files import check_data_file, list_data

MAX_MAPPED_SHARDS = 256
"""Maps kept at once; an evicted shard is mapped and checked again when it is next touched."""

Rows = npt.NDArray[np.int64]


class StoreReader(Generic[Columns]):
    """One teacher's output over one corpus part. Use ``open`` of a class for one level.

    Attributes:
        root: The store's location: a directory or a URL.
        identity: What the store is.
        plan: Rows and cut of the part.
        records: The commit record of each shard.
        excluded: Ordinals without output, int64, ascending.
    """

    level: Literal["classification", "token"]

    def __init__(
        self, source: StoreSource, found: StoreRecords, layout: ShardLayout[Columns], *, verify: bool
    ) -> None:
        self.root = source.root
        self.identity = found.identity
        self.plan = found.plan
        self.records = records = found.records
        self.excluded: Rows = _sorted_ordinals(records)
        self._source = source
        self._layout = layout
        self._verify = verify
        sizes = [batch.rows for record in records for batch in record.batches]
        # Of each batch, over the whole store: its first stored row, its shard, its place in the shard.
        self._batch_starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._batch_shards = np.repeat(np.arange(len(records)), [len(r.batches) for r in records])
        self._first_batches = np.searchsorted(self._batch_shards, np.arange(len(records) + 1))
        self._mapped: OrderedDict[int, ShardFile[Columns]] = OrderedDict()

    @classmethod
    def open(cls, root: str | Path, *, verify: bool = True) -> Self:
        """Opens a finished store.

        Args:
            root: The store's directory, or its URL.
            verify: Check shard files against their hashes: head and tail of each when it is mapped (a
                local one's now), a record batch when it is first touched; then also that its values
                make sense and its examples are the plan's. JSON records, the plan and the layout of what
                is decoded are always checked, and that each data file is there with its size.

        Raises:
            IncompleteStoreError: There is no manifest.
            DamagedStoreError: A file is missing, truncated, or does not match its hash.
            RefusedError: The store has another format version, or is of another level.
            ResourceError: A file may not be read, or the object store cannot be reached.
        """
        source = open_storage(root)
        if is_local(source.root) and not Path(source.root).is_dir():
            raise DataError(f"store {source.root}: there is no such directory")
        found = read_store_records(source)
        _check_level(source.root, cls.level, found.identity.level)
        files = list_data(source)
        for record in found.records:
            check_data_file(source, record, files)
        store = cls(source, found, cls.make_layout(found.identity, source.root), verify=verify)
        if source.is_local:
            for shard in range(len(store.records)):
                store.shard_file(shard)
        return store

    @classmethod
    def make_layout(cls, identity: StoreIdentity, root: str) -> ShardLayout[Columns]:
        """Returns what the rows of this store are.

        Raises:
            DamagedStoreError: The identity does not say it.
        """
        raise NotImplementedError

    @property
    def num_rows(self) -> int:
        """Rows with output: the part's rows without the excluded ones."""
        return int(self._batch_starts[-1])

    def stored_rows(self) -> Rows:
        """Returns the rows of the part that have output, int64, ascending."""
        rows = np.arange(self.plan.num_rows, dtype=np.int64)
        return np.delete(rows, self.excluded) if len(self.excluded) else rows

    def text_hashes(self, rows: Rows) -> npt.NDArray[np.uint8]:
        """Copies the text hashes that the shards hold for ``rows``: uint8[B, 16].

        Raises:
            DataError: A row is out of range or excluded.
            DamagedStoreError: A touched batch does not match its hash.
        """
        result = np.empty((len(rows), TEXT_HASH_BYTES), np.uint8)
        for positions, within, columns in self.locate(rows):
            result[positions] = columns.text_hashes[within]
        return result

    def read_shard(self, shard: int) -> Iterator[Columns]:
        """Yields the checked batches of a shard in order, as views of the map.

        Raises:
            DamagedStoreError: A batch does not match its hash, or holds other rows than its record.
        """
        file = self.shard_file(shard)
        for index in range(len(self.records[shard].batches)):
            yield file.batch(index)

    def shard_file(self, shard: int) -> ShardFile[Columns]:
        """Returns a shard's mapped file, mapping and checking it if it is not mapped."""
        file = self._mapped.get(shard)
        if file is None:
            file = ShardFile(
                self._source, self.records[shard], self._layout, verify=self._verify, plan=self.plan
            )
            self._mapped[shard] = file
            if len(self._mapped) > MAX_MAPPED_SHARDS:
                self._mapped.popitem(last=False)
        else:
            self._mapped.move_to_end(shard)
        return file

    def locate(self, rows: Rows) -> Iterator[tuple[Rows, Rows, Columns]]:
        """Yields, for each touched batch: positions in ``rows``, rows within the batch, the batch."""
        if not len(rows):
            return
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
            raise DataError(
                f"store {self.root}: row {rows[hit][0]} is excluded, the teacher gave nothing for it"
            )
        return rows - before


def _check_level(root: str, wanted: str, found: str) -> None:
    if wanted != found:
        holds = {
            "classification": "logits of a classifier, for a recipe of classification",
            "token": "token-level output of a language model, for a recipe with `task: language`",
        }
        raise RefusedError(f"store {root}: holds {holds[found]}")


def _sorted_ordinals(records: tuple[CommitRecord, ...]) -> Rows:
    return np.array(sorted(row.ordinal for record in records for row in record.excluded), np.int64)
