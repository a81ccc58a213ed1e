"""Edits a store as a stranger could who knows the format: every hash and digest is made to match again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from schemas.digest import canonical_json, decode_document, hash_value
from schemas.records import (
    COMMIT_DIRECTORY,
    DATA_DIRECTORY,
    MANIFEST_FILE,
    PLAN_FILE,
    STORE_FILE,
)
from schemas.rows import classification_schema, fingerprint_columns

Body = dict[str, Any]


class ForgedStore:
    """A store's small files as JSON bodies and its data files as bytes, to be edited and signed again.

    Attributes:
        manifest, identity: Bodies without their digests.
        records, record_names: Commit records, and the file below ``commit/`` that each is written to.
        plan: Bytes of ``plan.arrow``.
        data: Bytes of each shard's file.
        raw: Bytes to write instead of a record's, by name relative to the root.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = decode_document((root / MANIFEST_FILE).read_bytes())
        self.identity = decode_document((root / STORE_FILE).read_bytes())
        self.plan = (root / PLAN_FILE).read_bytes()
        self.record_names = [entry["record"] for entry in self.manifest["shards"]]
        commits = root / COMMIT_DIRECTORY
        self.records = [decode_document((commits / name).read_bytes()) for name in self.record_names]
        self._files = [root / DATA_DIRECTORY / record["file"] for record in self.records]
        self.data = [path.read_bytes() for path in self._files]
        self.raw: dict[str, bytes] = {}

    def data_path(self, shard: int) -> Path:
        """Returns where a shard's bytes are written, whatever its record says."""
        return self._files[shard]

    def set_data(self, shard: int, data: bytes, cuts: Sequence[int], rows: Sequence[int]) -> None:
        """Replaces a shard's file; ``cuts`` are where each batch starts and the last one ends."""
        record = self.records[shard]
        edges = [0, *cuts, len(data)]
        regions = [
            {"offset": start, "length": stop - start, "rows": count, "xxh3": "0" * 16}
            for start, stop, count in zip(edges[:-1], edges[1:], [0, *rows, 0], strict=True)
        ]
        record["head"], *record["batches"], record["tail"] = regions
        record["num_bytes"] = self.manifest["shards"][shard]["num_bytes"] = len(data)
        self.data[shard] = data

    def sign(self) -> None:
        """Writes all files, with hashes and digests that match them."""
        self.manifest["store_sha256"] = self._write(STORE_FILE, _encode(self.identity))
        self.manifest["plan_sha256"] = self._write(PLAN_FILE, self.plan)
        for shard, (record, data) in enumerate(zip(self.records, self.data, strict=True)):
            for region in (record["head"], *record["batches"], record["tail"]):
                region["xxh3"] = _hash_region(data, region["offset"], region["length"])
            record["sha256"] = hashlib.sha256(data).hexdigest()
            self._files[shard].write_bytes(data)
            name = f"{COMMIT_DIRECTORY}/{self.record_names[shard]}"
            signed = self._write(name, _encode(record))
            if shard < len(self.manifest["shards"]):
                self.manifest["shards"][shard]["record_sha256"] = signed
        self._write(MANIFEST_FILE, _encode(self.manifest))

    def set_plan(self, rows: pa.Table, bounds: Any, *, options: pa.ipc.IpcWriteOptions | None = None) -> None:
        """Replaces the plan, with a fingerprint and a plan hash that match it."""
        fingerprint = fingerprint_columns(rows.column("example_id"), rows.column("text_hash"))
        header = {"plan": 1, "bounds": bounds, "fingerprint": fingerprint}
        table = rows.replace_schema_metadata({b"tmkd.plan": json.dumps(header).encode()})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema, options=options) as writer:
            writer.write_table(table)
        self.plan = sink.getvalue().to_pybytes()
        plan_hash = hash_value({"plan": 1, "part": fingerprint, "bounds": bounds})
        for body in (self.manifest, self.identity, *self.records):
            body["plan_hash"] = plan_hash

    def _write(self, name: str, data: bytes) -> str:
        data = self.raw.get(name, data)
        (self.root / name).write_bytes(data)
        return hashlib.sha256(data).hexdigest()


def read_columns(forged: ForgedStore, shard: int) -> dict[str, pa.Array]:
    """Returns the columns of a shard's file, all batches in one."""
    table = pa.ipc.open_file(forged.data[shard]).read_all().combine_chunks()
    return {name: table.column(name).combine_chunks() for name in table.column_names}


def shard_columns(forged: ForgedStore, shard: int, **changes: pa.Array | None) -> pa.RecordBatch:
    """Returns a shard's rows as one batch, with other columns; None leaves one out."""
    columns = {**read_columns(forged, shard), **changes}
    kept = {name: column for name, column in columns.items() if column is not None}
    fields = [pa.field(name, column.type, nullable=column.null_count > 0) for name, column in kept.items()]
    return pa.record_batch(list(kept.values()), schema=pa.schema(fields))


def replace_rows(
    forged: ForgedStore,
    shard: int,
    batches: Sequence[pa.RecordBatch],
    *,
    compression: str | None = None,
    metadata: Mapping[bytes, bytes] | None = None,
) -> None:
    """Writes a shard's file from batches of any schema, as large as they are."""
    schema = batches[0].schema.with_metadata(metadata)
    sink = pa.BufferOutputStream()
    writer = pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression=compression))
    cuts = [8 + schema.serialize().size]
    for batch in batches:
        writer.write_batch(batch.replace_schema_metadata(metadata))
        cuts.append(sink.tell())
    writer.close()
    data = sink.getvalue().to_pybytes()
    forged.set_data(shard, data, cuts, [batch.num_rows for batch in batches])


def make_logits(values: np.ndarray) -> pa.FixedSizeListArray:
    """Returns float32[R, C] as a column of a shard."""
    type_ = classification_schema(values.shape[1]).field("logits").type
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), pa.float32()), type=type_)


def _encode(body: Body) -> bytes:
    """Like ``encode_document``, without its indentation, which takes long."""
    return canonical_json({**body, "digest": hash_value(body)})


def _hash_region(data: bytes, start: Any, length: Any) -> str:
    if not isinstance(start, int) or not isinstance(length, int):
        return "0" * 16
    return xxhash.xxh3_64_hexdigest(data[max(0, start) : max(0, start + length)])
