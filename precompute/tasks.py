"""What goes into a worker and what comes out: plain picklable values, no Ray, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from schemas.language import LanguageTeacher, Objective
from schemas.plan import ShardTask
from schemas.recipe import Teacher
from schemas.records import CommitRecord


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One loaded teacher.

    Attributes:
        teacher: The recipe's teacher.
        model_path: What ``from_pretrained`` takes: a local directory or a hub id.
        revision: Commit on the hub, or None.
        num_threads: CPU threads of the forward pass.
        device: ``cpu`` or ``cuda``.
    """

    teacher: Teacher
    model_path: str
    revision: str | None
    num_threads: int
    device: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True, slots=True)
class LanguageWorkerSpec:
    """One loaded language model.

    Attributes:
        teacher: The recipe's teacher.
        model_path, revision, num_threads, device: See ``WorkerSpec``.
        objective: Of the chunks.
        vocab: V, the true vocabulary: a model with fewer logits is refused.
    """

    teacher: LanguageTeacher
    model_path: str
    revision: str | None
    num_threads: int
    device: Literal["cpu", "cuda"]
    objective: Objective
    vocab: int


AnyWorkerSpec: TypeAlias = WorkerSpec | LanguageWorkerSpec
"""Chooses the worker too: ``precompute.actors.make_shard_worker``."""


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One shard to compute.

    Attributes:
        store_root: Location of an opened store (``STORE.json`` and ``plan.arrow`` are there).
        rows_path: The materialised corpus part.
        part: Corpus and part, for messages.
        task: Rows of the part.
        on_bad_row: What to do with a row whose logits are not finite.
        batch_rows: Rows of one record batch.
        revision: Of the commit record: 0; a repair's is higher.
        driver_commits: The worker only publishes the data file; the driver makes the commit record.
    """

    store_root: str
    rows_path: str
    part: str
    task: ShardTask
    on_bad_row: Literal["fail", "exclude"] = "fail"
    batch_rows: int = 1024
    revision: int = 0
    driver_commits: bool = False


@dataclass(frozen=True, slots=True)
class ShardReceipt:
    """What a worker reports of a shard: ids, hashes, counts; never rows.

    Attributes:
        committed: False if another attempt had committed the shard first (no harm).
        record: What the driver has to commit, where it does that.
        seconds: Wall time of the shard, of which ``forward_seconds`` in the model.
    """

    store_root: str
    shard: int
    num_rows: int
    num_excluded: int
    num_tokens: int
    num_padded_tokens: int
    seconds: float
    forward_seconds: float
    committed: bool
    record: CommitRecord | None = None
