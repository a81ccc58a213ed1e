"""One shard file of a store: mapped, checked batch by batch when first touched, never written to.

Invariants:
    1. Only bytes that lie in a checked region are decoded: a flipped bit anywhere in the file raises
       before a value of its batch is seen (tests/distill/test_store_reader.py,
       tests/reliability/test_damage_matrix.py).
    2. A map that is used is as long as the commit record says (a shorter file would end the process
       with SIGBUS) (tests/distill/test_store_reader.py).
    3. A file whose hashes match but whose content is not a shard's (a stranger made it) raises too: other
       columns, rows that are not the plan's, numbers that are not finite
       (tests/reliability/test_hostile_stores.py). The footer is for other readers: nothing here reads it.
"""

from __future__ import annotations

from typing import Generic

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from distill.shard_layout import Columns, ShardLayout
from schemas.arrow_message import ArrowMessageError, read_batch, read_head
from schemas.column_view import wrap_integers
from schemas.errors import DamagedStoreError
from schemas.plan import Plan
from schemas.records import DATA_DIRECTORY, BatchRecord, CommitRecord
from schemas.storage.storage import StoreSource


class ShardFile(Generic[Columns]):
    """A mapped shard file.

    Args:
        source: Storage of the store.
        record: The shard's commit record; it fits the plan (``distill.store_records``).
        layout: What its rows are.
        verify: Whether hashes, and the meaning of the rows, are checked.
        plan: The store's plan, with whose ids and text hashes the rows are compared.

    Raises:
        DamagedStoreError: The file is missing, has another size, or its head or tail is damaged.
        ResourceError: The file may not be read.
    """

    def __init__(
        self,
        source: StoreSource,
        record: CommitRecord,
        layout: ShardLayout[Columns],
        *,
        verify: bool,
        plan: Plan | None = None,
    ) -> None:
        self._source = source
        self._record = record
        self._verify = verify
        self._plan = plan
        self._layout = layout
        self._excluded = np.array(sorted(row.ordinal for row in record.excluded), np.int64)
        self._firsts = np.cumsum([0, *(batch.rows for batch in record.batches)], dtype=np.int64)
        self._buffer = self._map()
        self._checked: dict[int, Columns] = {}
        self._read_head()

    def batch(self, index: int) -> Columns:
        """Returns batch ``index``, checking its hash the first time.

        Raises:
            DamagedStoreError: The bytes do not match the record, or do not decode to its rows.
        """
        columns = self._checked.get(index)
        if columns is None:
            columns = self._decode(index)
            self._checked[index] = columns
        return columns

    def damage(
        self, message: str, *, batch: int | None = None, offset: int | None = None
    ) -> DamagedStoreError:
        """Returns an error that names this shard."""
        return DamagedStoreError(
            f"{DATA_DIRECTORY}/{self._record.file}: {message}",
            store=self._source.root,
            shard=self._record.shard,
            batch=batch,
            offset=offset,
        )

    def _map(self) -> pa.Buffer:
        record = self._record
        name = f"{DATA_DIRECTORY}/{record.file}"
        try:
            buffer = self._source.map_file(name, num_bytes=record.num_bytes, sha256=record.sha256)
        except FileNotFoundError as error:
            raise self.damage("is missing") from error
        if buffer.size != self._record.num_bytes:
            raise self.damage(
                f"has {buffer.size} bytes, its commit record says {self._record.num_bytes}",
                offset=min(buffer.size, self._record.num_bytes),
            )
        return buffer

    def _read_head(self) -> None:
        head = self._check("head", self._record.head, None)
        self._check("tail", self._record.tail, None)
        try:
            metadata = read_head(head, self._layout.schema)
        except ArrowMessageError as error:
            raise self.damage(f"does not start as a shard: {error}", offset=0) from error
        find_foreign = self._layout.find_foreign
        foreign = find_foreign(metadata) if find_foreign is not None else None
        if foreign is not None:
            raise self.damage(f"does not start as a shard of this store: {foreign}", offset=0)

    def _check(self, name: str, region: BatchRecord, batch: int | None) -> pa.Buffer:
        data = self._buffer.slice(region.offset, region.length)
        if not self._verify or xxhash.xxh3_64_hexdigest(data) == region.xxh3:
            return data
        if self._source.discard_copy(self._record.sha256):
            # The local copy of a remote file went bad after it was mapped; the file itself may be whole.
            self._buffer = self._map()
            data = self._buffer.slice(region.offset, region.length)
            if xxhash.xxh3_64_hexdigest(data) == region.xxh3:
                return data
        raise self.damage(
            f"the bytes of its {name} do not match their hash", batch=batch, offset=region.offset
        )

    def _decode(self, index: int) -> Columns:
        region = self._record.batches[index]
        data = self._check(f"record batch {index}", region, index)
        try:
            # Read from the checked region itself, so that a footer cannot point elsewhere.
            batch = read_batch(data, self._layout.schema)
        except ArrowMessageError as error:
            raise self.damage(f"record batch {index}: {error}", batch=index, offset=region.offset) from error
        columns = self._layout.split(batch)
        problem = self._find_problem(index, batch, columns)
        if problem is not None:
            raise self.damage(f"record batch {index} {problem}", batch=index, offset=region.offset)
        return columns

    def _find_problem(self, index: int, batch: pa.RecordBatch, columns: Columns) -> str | None:
        """Says what is wrong with the content of a batch that can be decoded, or returns None."""
        rows = self._expected_rows(index)
        if batch.num_rows != len(rows):
            return f"has {batch.num_rows} rows, its record says {len(rows)}"
        if not np.array_equal(columns.rows, rows):
            return "holds other rows than its record"
        if not self._verify:
            return None
        problem = self._layout.find_problem(columns) if self._layout.find_problem is not None else None
        if problem is not None:
            return problem
        if self._plan is not None and not _holds_plan_rows(batch, self._plan, rows):
            return "holds other examples than the plan"
        return None

    def _expected_rows(self, index: int) -> npt.NDArray[np.int64]:
        """Returns the ordinals of a batch: those of the shard without the excluded ones, cut as recorded."""
        kept = self._record.start + np.arange(self._firsts[index], self._firsts[index + 1])
        # The k-th excluded ordinal has e_k - k kept ones before it, counted with `start`.
        return kept + np.searchsorted(self._excluded - np.arange(len(self._excluded)), kept, side="right")


def _holds_plan_rows(batch: pa.RecordBatch, plan: Plan, rows: npt.NDArray[np.int64]) -> bool:
    if not len(rows):
        return True
    first, last = int(rows[0]), int(rows[-1])
    expected = plan.rows.slice(first, last - first + 1)
    if expected.num_rows != len(rows):
        expected = expected.take(wrap_integers(rows - first))
    names = ("example_id", "text_hash")
    return all(expected.column(name).equals(pa.chunked_array([batch.column(name)])) for name in names)
