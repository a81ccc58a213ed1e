"""A small writer of corpora and stores for tests and benchmarks, independent of ``precompute``.

It knows nothing of crashes; it writes what format 1.0 says and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from schemas.digest import hash_file, hash_value
from schemas.job import PartSource, SoftTarget
from schemas.plan import Plan, cut_rows, encode_plan
from schemas.records import (
    COMMIT_DIRECTORY,
    DATA_DIRECTORY,
    MANIFEST_FILE,
    PLAN_FILE,
    STORE_FILE,
    BatchRecord,
    CommitRecord,
    ExcludedRow,
    Manifest,
    ManifestShard,
    StoreIdentity,
    encode_record,
    record_name,
    shard_stem,
)
from schemas.rows import classification_schema, corpus_schema, fingerprint_columns, hash_texts

Logits = npt.NDArray[np.float32]
RowMaker = Callable[[npt.NDArray[np.int64]], pa.RecordBatch]


@dataclass(frozen=True)
class MadePart:
    """A corpus part on disk."""

    source: PartSource
    plan: Plan


def make_part(
    path: Path, texts: Sequence[Sequence[str]], labels: Sequence[int], *, shard_rows: int, name: str = "train"
) -> MadePart:
    """Writes ``rows.arrow`` with one or two text columns (``texts`` is row by row)."""
    return write_part(path, make_table(texts, labels, name), shard_rows=shard_rows)


def make_table(texts: Sequence[Sequence[str]], labels: Sequence[int], name: str = "train") -> pa.Table:
    """Makes the table of a corpus part (``texts`` is row by row)."""
    columns = [
        pa.array(range(len(texts)), pa.int64()),
        pa.array([f"{name}/{row}" for row in range(len(texts))], pa.string()),
        pa.array([hash_texts(row) for row in texts], pa.binary(16)),
        *(pa.array(column, pa.large_string()) for column in zip(*texts, strict=True)),
        pa.array(labels, pa.int32()),
    ]
    return pa.Table.from_arrays(columns, schema=corpus_schema(len(texts[0])))


def write_part(path: Path, table: pa.Table, *, shard_rows: int) -> MadePart:
    """Writes ``rows.arrow`` from a table with the layout of ``corpus_schema``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=65536)
    rows = table.select(["ordinal", "example_id", "text_hash"])
    schema = pa.schema([pa.field(field.name, field.type, nullable=False) for field in rows.schema])
    fingerprint = fingerprint_columns(rows.column("example_id"), rows.column("text_hash"))
    plan = Plan(rows.cast(schema), cut_rows(table.num_rows, shard_rows), fingerprint)
    source = PartSource(
        rows=str(path),
        fingerprint=fingerprint,
        plan_hash=plan.plan_hash,
        num_rows=table.num_rows,
        shard_rows=shard_rows,
    )
    return MadePart(source, plan)


def make_store(
    root: Path,
    plan: Plan,
    logits: Logits,
    *,
    labels: Sequence[str] = ("a", "b", "c"),
    teacher: str = "teacher",
    batch_rows: int = 4,
    excluded: Sequence[int] = (),
) -> Path:
    """Writes a finished store; ``logits`` is float32[rows of the part, C] in the order of ``labels``."""
    generation = {"teacher": teacher}
    identity = StoreIdentity(
        plan_hash=plan.plan_hash,
        generation_hash=hash_value(generation),
        generation=generation,
        native_labels=tuple(labels),
        teacher=teacher,
        corpus="corpus",
        part="train",
    )

    def make_rows(rows: npt.NDArray[np.int64]) -> pa.RecordBatch:
        schema = classification_schema(logits.shape[1])
        values = pa.FixedSizeListArray.from_arrays(
            pa.array(logits[rows].ravel(), pa.float32()), type=schema.field("logits").type
        )
        return pa.RecordBatch.from_arrays([*take_keys(plan, rows).columns, values], schema=schema)

    return write_store(root, plan, identity, make_rows, batch_rows=batch_rows, excluded=excluded)


def take_keys(plan: Plan, rows: npt.NDArray[np.int64]) -> pa.RecordBatch:
    """Returns ``ordinal``, ``example_id`` and ``text_hash`` of some rows."""
    chosen = plan.rows.take(rows)
    names = ("ordinal", "example_id", "text_hash")
    return pa.record_batch({name: chosen.column(name).combine_chunks() for name in names})


def write_store(
    root: Path,
    plan: Plan,
    identity: StoreIdentity,
    make_rows: RowMaker,
    *,
    batch_rows: int = 4,
    excluded: Sequence[int] = (),
) -> Path:
    """Writes a finished store of any level; ``make_rows`` makes the record batch of some rows."""
    for directory in (DATA_DIRECTORY, COMMIT_DIRECTORY):
        (root / directory).mkdir(parents=True)
    (root / STORE_FILE).write_bytes(encode_record(identity))
    (root / PLAN_FILE).write_bytes(encode_plan(plan))
    shards = [
        _write_shard(root, identity, plan, task.shard, make_rows, batch_rows, excluded)
        for task in plan.tasks()
    ]
    reasons = tuple(row for _, record in shards for row in record.excluded)
    manifest = Manifest(
        plan_hash=plan.plan_hash,
        generation_hash=identity.generation_hash,
        store_sha256=hash_file(root / STORE_FILE),
        plan_sha256=hash_file(root / PLAN_FILE),
        num_rows=sum(record.num_rows for _, record in shards),
        shards=tuple(entry for entry, _ in shards),
        excluded=reasons,
    )
    (root / MANIFEST_FILE).write_bytes(encode_record(manifest))
    return root


def target(*stores: tuple[str, Sequence[Path]], head: str | None = None) -> SoftTarget:
    """Returns a soft target of teachers, each with its store per part."""
    names = tuple(name for name, _ in stores)
    roots = tuple(tuple(str(root) for root in paths) for _, paths in stores)
    return SoftTarget(head=head or names[0], teachers=names, stores=roots)


def _write_shard(
    root: Path,
    identity: StoreIdentity,
    plan: Plan,
    shard: int,
    make_rows: RowMaker,
    batch_rows: int,
    excluded: Sequence[int],
) -> tuple[ManifestShard, CommitRecord]:
    start, stop = plan.bounds[shard], plan.bounds[shard + 1]
    rows = np.setdiff1d(np.arange(start, stop), np.asarray(excluded, np.int64))
    chosen = plan.rows.take(rows)
    whole = make_rows(rows)
    schema = whole.schema
    name = f"{shard_stem(shard)}-test.arrow"
    path = root / DATA_DIRECTORY / name
    offsets = [8 + schema.serialize().size]
    sizes = []
    with path.open("wb") as file:
        writer = pa.ipc.new_file(file, schema)
        for first in range(0, whole.num_rows, batch_rows):
            piece = whole.slice(first, batch_rows)
            writer.write_batch(piece)
            sizes.append(piece.num_rows)
            offsets.append(file.tell())
        writer.close()
    data = path.read_bytes()
    regions = [
        BatchRecord(offset=a, length=b - a, rows=size, xxh3=xxhash.xxh3_64_hexdigest(data[a:b]))
        for a, b, size in zip([0, *offsets], [*offsets, len(data)], [0, *sizes, 0], strict=True)
    ]
    record = CommitRecord(
        plan_hash=plan.plan_hash,
        generation_hash=identity.generation_hash,
        shard=shard,
        revision=0,
        file=name,
        start=start,
        stop=stop,
        num_rows=len(rows),
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        ids_hash=fingerprint_columns(chosen.column("example_id"), chosen.column("text_hash")),
        head=regions[0],
        batches=tuple(regions[1:-1]),
        tail=regions[-1],
        excluded=tuple(
            ExcludedRow(
                ordinal=row, example_id=plan.rows.column("example_id")[row].as_py(), reason="not finite"
            )
            for row in sorted(excluded)
            if start <= row < stop
        ),
    )
    record_path = root / COMMIT_DIRECTORY / record_name(shard, 0)
    record_path.write_bytes(encode_record(record))
    entry = ManifestShard(
        shard=shard,
        record=record_path.name,
        record_sha256=hash_file(record_path),
        num_rows=record.num_rows,
        num_bytes=record.num_bytes,
    )
    return entry, record
