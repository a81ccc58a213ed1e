"""Locks and jobs that use stores, for the tests of the catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from schemas.job import JOB_FILE, PartSource, SoftTarget, StageJob, StudentInit
from schemas.recipe import ConfigInit, Training
from schemas.records import LOCK_FILE, LockedPart, StoresLock, encode_record

PART = PartSource(rows="rows.arrow", fingerprint="f", plan_hash="p", num_rows=1)


def write_lock(directory: Path, **stores: str) -> None:
    """Locks stores by teacher name, over ``pairs/train``."""
    directory.mkdir(parents=True, exist_ok=True)
    part = LockedPart(
        part="train", fingerprint="0" * 64, plan_hash="0" * 64, num_rows=1, rows="rows.arrow", stores=stores
    )
    (directory / LOCK_FILE).write_bytes(encode_record(StoresLock(corpora={"pairs": (part,)})))


def write_stage(directory: Path, name: str, *roots: str, before: Path | None = None) -> Path:
    """Begins a stage that reads stores and may start from the stage in another directory."""
    directory.mkdir(parents=True)
    init: Any = ConfigInit(kind="config", config={}, tokenizer="t")
    if before is not None:
        init = StudentInit(kind="student", path=str(before / "model"), fingerprint="0" * 64)
    job = StageJob(
        name=name,
        output=str(directory),
        init=init,
        max_length=8,
        labels=("a", "b"),
        parts=(PART,),
        soft_targets=tuple(
            SoftTarget(head=f"t{number}", teachers=(f"t{number}",), stores=((root,),))
            for number, root in enumerate(roots)
        ),
        alpha=0.5,
        training=Training(corpus="pairs"),
        selection_seed=0,
        seed=0,
    )
    (directory / JOB_FILE).write_text(job.model_dump_json())
    return directory
