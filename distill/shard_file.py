"""One shard file of a store: mapped, checked batch by batch when first touched, never written to.

Shapes: R rows of a batch, C classes.

Invariants:
    1. Only bytes that lie in a checked region are decoded: a flipped bit anywhere in the file raises
       before a value of its batch is seen (tests/distill/test_store_reader.py).
    2. A map that is used is as long as the commit record says (a shorter file would end the process
       with SIGBUS) (tests/distill/test_store_reader.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from distill.column_view import view_bytes, view_numbers
from schemas.errors import DamagedStoreError
from schemas.records import DATA_DIRECTORY, BatchRecord, CommitRecord
from schemas.rows import classification_schema
from schemas.storage.storage import StoreSource
from schemas.store_files import repair_advice


@dataclass(frozen=True, slots=True)
class BatchColumns:
    """One record batch, as views of the map (read-only).

    Attributes:
        rows: int64[R], row numbers of the part, ascending.
        example_ids: string[R].
        text_hashes: uint8[R, 16].
        logits_RC: float32[R, C], native label order.
    """

    rows: npt.NDArray[np.int64]
    example_ids: pa.StringArray
    text_hashes: npt.NDArray[np.uint8]
    logits_RC: npt.NDArray[np.float32]


class ShardFile:
    """A mapped shard file.

    Args:
        source: Storage of the store.
        record: The shard's commit record; it is trusted (its own digest was checked).
        num_labels: C.
        verify: Whether hashes are checked.

    Raises:
        DamagedStoreError: The file is missing, has another size, or its head or tail is damaged.
        ResourceError: The file may not be read.
    """

    def __init__(self, source: StoreSource, record: CommitRecord, num_labels: int, *, verify: bool) -> None:
        self._source = source
        self._record = record
        self._verify = verify
        self._buffer = self._map()
        self._checked: dict[int, BatchColumns] = {}
        self._schema = self._read_schema(num_labels)

    def batch(self, index: int) -> BatchColumns:
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
            f"{DATA_DIRECTORY}/{self._record.file}: {message}; {repair_advice(self._source.root)}",
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

    def _read_schema(self, num_labels: int) -> pa.Schema:
        self._check("head", self._record.head, None)
        self._check("tail", self._record.tail, None)
        try:
            reader = pa.ipc.open_file(self._buffer)
            schema, num_batches = reader.schema, reader.num_record_batches
        except (pa.ArrowException, OSError) as error:
            raise self.damage(f"is no Arrow IPC file ({error})", offset=0) from error
        expected = classification_schema(num_labels)
        if not schema.equals(expected, check_metadata=False):
            found = ", ".join(f"{field.name} {field.type}" for field in schema)
            raise self.damage(f"has columns {found}, not those of {num_labels} labels", offset=0)
        if num_batches != len(self._record.batches):
            raise self.damage(
                f"has {num_batches} record batches, its commit record {len(self._record.batches)}"
            )
        return schema

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

    def _decode(self, index: int) -> BatchColumns:
        region = self._record.batches[index]
        data = self._check(f"record batch {index}", region, index)
        try:
            # Read from the checked region itself, so that a footer cannot point elsewhere.
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(data), self._schema)
            batch.validate()
        except (pa.ArrowException, OSError, EOFError) as error:
            raise self.damage(
                f"record batch {index} cannot be decoded ({error})", batch=index, offset=region.offset
            ) from error
        if batch.num_rows != region.rows or any(column.null_count for column in batch.columns):
            raise self.damage(
                f"record batch {index} has {batch.num_rows} rows or nulls, its record {region.rows} rows",
                batch=index,
                offset=region.offset,
            )
        columns = _split(batch)
        if not np.array_equal(columns.rows, self._expected_rows(index)):
            raise self.damage(
                f"record batch {index} holds other rows than its record",
                batch=index,
                offset=region.offset,
            )
        return columns

    def _expected_rows(self, index: int) -> npt.NDArray[np.int64]:
        record = self._record
        rows = np.arange(record.start, record.stop, dtype=np.int64)
        if record.excluded:
            rows = np.setdiff1d(rows, [row.ordinal for row in record.excluded], assume_unique=True)
        first = sum(batch.rows for batch in record.batches[:index])
        return rows[first : first + record.batches[index].rows]


def _split(batch: pa.RecordBatch) -> BatchColumns:
    logits = batch.column("logits")
    return BatchColumns(
        rows=view_numbers(batch.column("ordinal"), np.int64),
        example_ids=batch.column("example_id"),
        text_hashes=view_bytes(batch.column("text_hash")),
        logits_RC=view_numbers(logits.flatten(), np.float32).reshape(-1, logits.type.list_size),
    )
