"""The worker: one shard task goes in, one committed shard and a receipt come out. No Ray.

Shapes: R rows of a shard, B rows of a batch, C labels.

Invariants (tests/precompute/test_worker.py):
    1. A shard's bytes depend on the job and the teacher alone, not on what the worker did before.
    2. Rows that are not those of the store's plan are refused before the model runs.
    3. Rows whose logits are not finite are named, and either fail the shard or are left out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from precompute.encode import encode_rows
from precompute.forward import compute_logits
from precompute.store_writer import StoreWriter
from precompute.tasks import ShardJob, ShardReceipt, WorkerSpec
from precompute.teacher import LoadedTeacher, TokenisedRows
from schemas.errors import CorpusError, TeacherError
from schemas.records import CommitRecord, ExcludedRow
from schemas.rows import hash_texts, open_rows, text_columns

_NOT_FINITE = "logits are not finite"
_NUM_NAMED_ROWS = 5


@dataclass(frozen=True, slots=True)
class _PreparedShard:
    """Checked rows of a job, and their tokens."""

    rows: pa.Table
    tokens: TokenisedRows


class ShardWorker:
    """Runs one teacher over shards, one at a time; the teacher is loaded once, at first need.

    Attributes:
        num_rows_done: Rows that went through the model so far; another thread may read it to see
            that a long shard makes progress.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.num_rows_done = 0
        self._spec = spec
        self._lock = threading.Lock()
        self._teacher: LoadedTeacher | None = None
        self._stores: dict[str, StoreWriter] = {}
        self._ahead: tuple[ShardJob, Future[_PreparedShard]] | None = None
        self._tokeniser = ThreadPoolExecutor(1, thread_name_prefix="tokenise")

    def load(self) -> LoadedTeacher:
        """Loads the teacher if it is not loaded yet.

        Raises:
            TeacherError: See ``LoadedTeacher.load``.
            ResourceError: See ``LoadedTeacher.load``.
        """
        with self._lock:
            if self._teacher is None:
                self._teacher = LoadedTeacher.load(self._spec)
            return self._teacher

    def prefetch(self, job: ShardJob) -> bool:
        """Starts to tokenise a later job beside the one in ``process``; any thread may call it.

        Returns:
            False if another job is ahead already: at most one is.
        """
        with self._lock:
            if self._ahead is not None:
                return self._ahead[0] == job
            self._ahead = (job, self._tokeniser.submit(self._prepare, job))
            return True

    def process(self, job: ShardJob) -> ShardReceipt:
        """Computes one shard and commits it, unless another attempt has committed it meanwhile.

        Raises:
            CorpusError: The corpus's rows are not those of the store's plan.
            TeacherError: Logits are not finite and the job says ``fail``.
            ResourceError: Disk or device memory is full.
        """
        began = time.perf_counter()
        prepared = self._take(job)
        store = self._open_store(job.store_root)
        there = store.find_commit(job.task.shard, job.revision)
        if there is not None:
            # Another run on the same store, or a lost actor that was not dead, has been here.
            return _make_receipt(job, there, committed=False, seconds=time.perf_counter() - began)
        result = compute_logits(self.load(), prepared.tokens, self._count_rows)
        if result.logits_RC.shape[1] != len(store.identity.native_labels):
            raise TeacherError(
                f"gives {result.logits_RC.shape[1]} logits, its configuration names "
                f"{len(store.identity.native_labels)} labels",
                teacher=self._spec.teacher.name,
                shard=job.task.shard,
            )
        finite_R: npt.NDArray[np.bool_] = np.all(np.isfinite(result.logits_RC), axis=1)
        excluded = self._exclude(job, prepared.rows, finite_R)
        rows = prepared.rows.filter(pa.array(finite_R)) if excluded else prepared.rows
        batches = encode_rows(rows, result.logits_RC[finite_R], store.schema, job.batch_rows)
        record = store.write_data(job.task, batches, excluded, revision=job.revision)
        committed = False
        if not job.driver_commits:
            record, committed = store.commit(record)
        receipt = _make_receipt(job, record, committed=committed, seconds=time.perf_counter() - began)
        return replace(
            receipt,
            num_tokens=int(prepared.tokens.offsets[-1]),
            num_padded_tokens=result.num_padded_tokens,
            forward_seconds=result.seconds,
            record=record if job.driver_commits else None,
        )

    def close(self) -> None:
        """Ends the helper thread."""
        self._tokeniser.shutdown(wait=True, cancel_futures=True)

    def _take(self, job: ShardJob) -> _PreparedShard:
        """Returns the prepared job: the one ahead if it is that, else prepared now.

        A tokenizer is not to be used by two threads at once, so that one thread prepares all jobs. A
        later job that is ahead already stays there: its turn comes.
        """
        with self._lock:
            if self._ahead is not None and self._ahead[0] == job:
                prepared, self._ahead = self._ahead[1], None
            else:
                prepared = self._tokeniser.submit(self._prepare, job)
        return prepared.result()

    def _prepare(self, job: ShardJob) -> _PreparedShard:
        store = self._open_store(job.store_root)
        task = job.task
        rows = open_rows(Path(job.rows_path)).slice(task.start, task.num_rows)
        texts = [rows.column(name).to_pylist() for name in text_columns(rows)]
        _check_rows(job, rows, texts, store)
        return _PreparedShard(rows, self.load().tokenise(texts))

    def _open_store(self, root: str) -> StoreWriter:
        with self._lock:
            if root not in self._stores:
                self._stores[root] = StoreWriter.attach(root)
            return self._stores[root]

    def _count_rows(self, num_rows: int) -> None:
        self.num_rows_done += num_rows

    def _exclude(
        self, job: ShardJob, rows: pa.Table, finite_R: npt.NDArray[np.bool_]
    ) -> tuple[ExcludedRow, ...]:
        bad = rows.filter(pa.array(~finite_R))
        if not bad.num_rows:
            return ()
        ids = bad.column("example_id").to_pylist()
        if job.on_bad_row == "exclude":
            ordinals = bad.column("ordinal").to_pylist()
            return tuple(
                ExcludedRow(ordinal=ordinal, example_id=example_id, reason=_NOT_FINITE)
                for ordinal, example_id in zip(ordinals, ids, strict=True)
            )
        named = ids[:_NUM_NAMED_ROWS]
        more = f" and {len(ids) - len(named)} more" if len(ids) > len(named) else ""
        raise TeacherError(
            f"{_NOT_FINITE} for {job.part} row {', '.join(named)}{more}; "
            "set on_bad_row: exclude to leave such rows out",
            teacher=self._spec.teacher.name,
            shard=job.task.shard,
            example_ids=named,
        )


def _make_receipt(job: ShardJob, record: CommitRecord, *, committed: bool, seconds: float) -> ShardReceipt:
    return ShardReceipt(
        store_root=job.store_root,
        shard=job.task.shard,
        num_rows=record.num_rows,
        num_excluded=len(record.excluded),
        num_tokens=0,
        num_padded_tokens=0,
        seconds=seconds,
        forward_seconds=0.0,
        committed=committed,
    )


def _check_rows(job: ShardJob, rows: pa.Table, texts: Sequence[Sequence[str]], store: StoreWriter) -> None:
    """Compares rows with the plan: ids, and hashes of the texts as they are now.

    Raises:
        CorpusError: They differ.
    """
    ids = store.plan.example_ids(job.task)
    hashes = [hash_texts(row) for row in zip(*texts, strict=True)]
    corpus, _, part = job.part.partition("/")
    advice = "remove the materialised corpus and run the same command again"
    if rows.column("example_id").to_pylist() != ids:
        message = f"its example ids are not those of the store's plan; {advice}"
        raise CorpusError(message, corpus=corpus, part=part or None)
    planned = store.plan.text_hashes(job.task)
    changed = [
        example_id for example_id, ours, theirs in zip(ids, hashes, planned, strict=True) if ours != theirs
    ]
    if changed:
        raise CorpusError(
            f"the text of {changed[0]} ({len(changed)} rows in shard {job.task.shard}) has changed since "
            f"the plan; {advice}",
            corpus=corpus,
            part=part or None,
        )
