"""A driver to be killed: ``python -m tests.reliability.pool_driver ADDRESS DIRECTORY SHARD``.

Joins a Ray cluster and fills a store for each fault point of an actor; each actor waits at its point.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ray

from precompute.interrupt import StopFlag
from precompute.pool import run_pool
from schemas.recipe import StoreOptions
from tests.reliability.store_runs import ACTOR_POINTS
from tests.reliability.store_worker import make_queues, make_store_worker


def main() -> None:
    """Runs until somebody ends it."""
    address, directory, shard = sys.argv[1:]
    ray.init(address=address, log_to_driver=False)
    queues = make_queues(Path(directory), "wait", ACTOR_POINTS, (int(shard),))
    run_pool(
        queues,
        StoreOptions(stall_timeout_s=120),
        on_progress=lambda _: None,
        stop=StopFlag(),
        worker_factory=make_store_worker,
    )


if __name__ == "__main__":
    main()
