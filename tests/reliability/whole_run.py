"""A whole precompute with a Ray of its own: ``python -m tests.reliability.whole_run DIRECTORY``.

The directory holds ``model`` and ``rows.arrow``; the stores go below ``stores``. What this run committed
goes to standard output, one shard a line.
"""

from __future__ import annotations

import sys
from pathlib import Path

import precompute.pool
from cluster.ray_session import ray_session
from precompute.interrupt import StopFlag
from precompute.materialised import MaterialisedPart
from precompute.pool import PoolReport
from precompute.stores import StoreRequest, StoreSettings, make_stores
from schemas.plan import make_plan
from schemas.recipe import Corpus, FilePart, StoreOptions, Teacher
from schemas.rows import open_rows

SHARD_ROWS = 4
LABELS = ("entailment", "not_entailment")
CORPUS = Corpus(
    labels=LABELS, text=("a", "b"), parts=(FilePart(kind="file", path="train.jsonl", name="train"),)
)


def make_request(directory: Path) -> StoreRequest:
    """Returns what both runs ask for."""
    path = directory / "rows.arrow"
    rows = open_rows(path)
    fingerprint = make_plan(rows, SHARD_ROWS).fingerprint
    num_rows = rows.num_rows
    part = MaterialisedPart("toy", "train", path, fingerprint, "b" * 64, num_rows, (), num_rows)
    model = str(directory / "model")
    return StoreRequest(Teacher(name="tiny", model=model, max_length=32), model, None, CORPUS, part)


def main() -> None:
    """Makes the store, and says which shards this run committed."""
    directory = Path(sys.argv[1])
    reports: list[PoolReport] = []
    real = precompute.pool.run_pool

    def run_pool(*arguments: object, **options: object) -> PoolReport:
        reports.append(real(*arguments, **options))  # type: ignore[arg-type]
        return reports[-1]

    precompute.pool.run_pool = run_pool
    settings = StoreSettings(
        root=str(directory / "stores"),
        # Each run's own: what is under test is the store.
        hash_cache=Path(sys.argv[2]),
        options=StoreOptions(shard_rows=SHARD_ROWS, batch_rows=2),
    )
    make_stores(
        [make_request(directory)],
        settings,
        session=lambda: ray_session(num_cpus=1),
        on_progress=lambda _: None,
        stop=StopFlag(),
    )
    for report in reports:
        for receipt in report.receipts:
            if receipt.committed:
                sys.stdout.write(f"{receipt.shard}\n")


if __name__ == "__main__":
    main()
