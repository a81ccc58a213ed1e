"""What every worker does with a shard, whatever its teacher gives: check, prepare ahead, publish, commit.

Shapes: R rows of a shard.

Invariants (tests/precompute/test_worker.py, tests/precompute/test_language_worker.py):
    1. A shard's bytes depend on the job and the teacher alone, not on what the worker did before.
    2. Rows that are not those of the store's plan are refused before the model runs.
    3. Rows whose logits are not finite are named, and either fail the shard or are left out.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from precompute.store_writer import StoreWriter
from precompute.tasks import ShardJob, ShardReceipt
from schemas.errors import CorpusError, TeacherError
from schemas.records import CommitRecord, ExcludedRow
from schemas.rows import open_rows

_NOT_FINITE = "logits are not finite"
_NUM_NAMED_ROWS = 5

Model = TypeVar("Model")
Prepared = TypeVar("Prepared")


@dataclass(frozen=True, slots=True)
class Computed:
    """What a teacher says of R rows.

    Attributes:
        finite_R: Rows whose logits are all numbers.
        encode: Makes the record batches of those rows; ``(finite rows, rows of a batch)``.
        num_tokens, num_padded_tokens: Tokens without and with padding.
        seconds: In the model.
    """

    finite_R: npt.NDArray[np.bool_]
    encode: Callable[[pa.Table, int], Iterable[pa.RecordBatch]]
    num_tokens: int
    num_padded_tokens: int
    seconds: float


class ShardWorkerBase(ABC, Generic[Model, Prepared]):
    """Runs one teacher over shards, one at a time; the teacher is loaded once, at first need.

    Attributes:
        num_rows_done: Rows that went through the model so far; another thread may read it to see
            that a long shard makes progress.
    """

    def __init__(self, teacher: str) -> None:
        self.num_rows_done = 0
        self._teacher_name = teacher
        self._lock = threading.Lock()
        self._model: Model | None = None
        self._stores: dict[str, StoreWriter] = {}
        self._ahead: tuple[ShardJob, Future[tuple[pa.Table, Prepared]]] | None = None
        self._tokeniser = ThreadPoolExecutor(1, thread_name_prefix="tokenise")

    @abstractmethod
    def _load_model(self) -> Model:
        """Loads the teacher."""

    @abstractmethod
    def _prepare_rows(self, job: ShardJob, rows: pa.Table, store: StoreWriter) -> Prepared:
        """Calls ``check_rows`` with hashes of the rows as they are now; returns what the model wants."""

    @abstractmethod
    def _compute(self, prepared: Prepared, job: ShardJob, store: StoreWriter) -> Computed:
        """Runs the model."""

    def load(self) -> Model:
        """Loads the teacher if it is not loaded yet.

        Raises:
            TeacherError: There is no such model, or it is not what the recipe says.
            ResourceError: The hub cannot be reached, or memory is full.
        """
        with self._lock:
            if self._model is None:
                self._model = self._load_model()
            return self._model

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
        rows, prepared = self._take(job)
        store = self._open_store(job.store_root)
        there = store.find_commit(job.task.shard, job.revision)
        if there is not None:
            # Another run on the same store, or a lost actor that was not dead, has been here.
            return _make_receipt(job, there, committed=False, seconds=time.perf_counter() - began)
        computed = self._compute(prepared, job, store)
        excluded = self._exclude(job, rows, computed.finite_R)
        finite_rows = rows.filter(pa.array(computed.finite_R)) if excluded else rows
        batches = computed.encode(finite_rows, job.batch_rows)
        record = store.write_data(job.task, batches, excluded, revision=job.revision)
        committed = False
        if not job.driver_commits:
            record, committed = store.commit(record)
        receipt = _make_receipt(job, record, committed=committed, seconds=time.perf_counter() - began)
        return replace(
            receipt,
            num_tokens=computed.num_tokens,
            num_padded_tokens=computed.num_padded_tokens,
            forward_seconds=computed.seconds,
            record=record if job.driver_commits else None,
        )

    def close(self) -> None:
        """Ends the helper thread."""
        self._tokeniser.shutdown(wait=True, cancel_futures=True)

    def _take(self, job: ShardJob) -> tuple[pa.Table, Prepared]:
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

    def _prepare(self, job: ShardJob) -> tuple[pa.Table, Prepared]:
        store = self._open_store(job.store_root)
        task = job.task
        rows = open_rows(Path(job.rows_path)).slice(task.start, task.num_rows)
        return rows, self._prepare_rows(job, rows, store)

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
            teacher=self._teacher_name,
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


def check_rows(job: ShardJob, rows: pa.Table, hashes: list[bytes], store: StoreWriter) -> None:
    """Compares rows with the plan.

    Args:
        job: Of the shard.
        rows: R rows as they are in the materialised part.
        hashes: Of what they hold, computed again.
        store: It has the plan.

    Raises:
        CorpusError: They differ.
    """
    ids = store.plan.example_ids(job.task)
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
