"""The worker of classifiers: one shard task goes in, one committed shard and a receipt come out. No Ray.

Shapes: R rows of a shard, C labels.

Invariants: those of ``precompute.shard_worker`` (tests/precompute/test_worker.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from precompute.encode import encode_rows
from precompute.forward import compute_logits
from precompute.shard_worker import Computed, ShardWorkerBase, check_rows
from precompute.store_writer import StoreWriter
from precompute.tasks import ShardJob, WorkerSpec
from precompute.teacher import LoadedTeacher, TokenisedRows
from schemas.errors import TeacherError
from schemas.rows import hash_texts, text_columns


class ShardWorker(ShardWorkerBase[LoadedTeacher, TokenisedRows]):
    """Runs one classifier over shards; see ``ShardWorkerBase``."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec.teacher.name)
        self._spec = spec

    def _load_model(self) -> LoadedTeacher:
        return LoadedTeacher.load(self._spec)

    def _prepare_rows(self, job: ShardJob, rows: pa.Table, store: StoreWriter) -> TokenisedRows:
        texts = [rows.column(name).to_pylist() for name in text_columns(rows)]
        check_rows(job, rows, [hash_texts(row) for row in zip(*texts, strict=True)], store)
        return self.load().tokenise(texts)

    def _compute(self, prepared: TokenisedRows, job: ShardJob, store: StoreWriter) -> Computed:
        result = compute_logits(self.load(), prepared, self._count_rows)
        logits_RC = result.logits_RC
        if logits_RC.shape[1] != len(store.identity.native_labels):
            raise TeacherError(
                f"gives {logits_RC.shape[1]} logits, its configuration names "
                f"{len(store.identity.native_labels)} labels",
                teacher=self._spec.teacher.name,
                shard=job.task.shard,
            )
        finite_R: npt.NDArray[np.bool_] = np.all(np.isfinite(logits_RC), axis=1)

        def encode(rows: pa.Table, batch_rows: int) -> Iterator[pa.RecordBatch]:
            return encode_rows(rows, logits_RC[finite_R], store.schema, batch_rows)

        num_tokens = int(prepared.offsets[-1])
        return Computed(finite_R, encode, num_tokens, result.num_padded_tokens, result.seconds)
