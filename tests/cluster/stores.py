"""Small stores for the tests of the catalogue and the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from precompute.store_writer import StoreWriter
from schemas.digest import hash_value
from schemas.plan import Plan, make_plan
from schemas.records import ExcludedRow, StoreIdentity
from schemas.rows import hash_texts

NUM_ROWS = 50
SHARD_ROWS = 20
BATCH_ROWS = 8


def make_rows() -> pa.Table:
    ids = [f"train/{row}" for row in range(NUM_ROWS)]
    return pa.table(
        {
            "ordinal": pa.array(range(NUM_ROWS), pa.int64()),
            "example_id": ids,
            "text_hash": pa.array([hash_texts([name]) for name in ids], pa.binary(16)),
        }
    )


def write_store(
    root: Path | str, *, teacher: str = "t1", shards: int = 3, excluded: int | None = None
) -> StoreWriter:
    """Writes the first ``shards`` of three shards; finishes the store when that is all of them."""
    plan = make_plan(make_rows(), SHARD_ROWS)
    generation = {"weights": teacher, "keep": {"kind": "dense"}}
    identity = StoreIdentity(
        plan_hash=plan.plan_hash,
        generation_hash=hash_value(generation),
        generation=generation,
        native_labels=("yes", "no"),
        teacher=teacher,
        corpus="pairs",
        part="train",
        produced_by={"torch": "2"},
    )
    writer = StoreWriter.open(root, identity, plan)
    for task in plan.tasks()[:shards]:
        left_out = [row for row in range(task.start, task.stop) if row == excluded]
        kept = [row for row in range(task.start, task.stop) if row != excluded]
        reasons = [ExcludedRow(ordinal=row, example_id=f"train/{row}", reason="NaN") for row in left_out]
        writer.write_shard(task, make_batches(writer, plan, kept), reasons)
    if shards == plan.num_shards:
        writer.finish()
    return writer


def make_batches(writer: StoreWriter, plan: Plan, rows: list[int]) -> list[pa.RecordBatch]:
    batches = []
    for start in range(0, len(rows), BATCH_ROWS):
        taken = plan.rows.take(rows[start : start + BATCH_ROWS]).combine_chunks()
        values = np.repeat(taken.column("ordinal").to_numpy(), 2).astype(np.float32)
        logits = pa.FixedSizeListArray.from_arrays(pa.array(values), type=writer.schema.field("logits").type)
        columns = [taken.column(name).combine_chunks() for name in ("ordinal", "example_id", "text_hash")]
        batches.append(pa.RecordBatch.from_arrays([*columns, logits], schema=writer.schema))
    return batches
