"""The pool: several teachers' actors on one cluster, driven from here until all shards are done.

The driver owns the queue. Ray carries jobs, receipts and errors; a shard is done when its commit
record exists, so that nothing depends on the good end of any process.

Invariants (tests/precompute/test_pool.py):
    1. A dead or hung actor never hangs the run, and costs no committed shard.
    2. No actor outlives ``run_pool``, however it ends.
    3. A poison shard ends the run only after all other shards are done; a missing resource at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import ray

from precompute.actors import RemoteActor, WorkerFactory, make_shard_worker
from precompute.crew import Crew
from precompute.demand import check_demand
from precompute.events import ProgressEvent
from precompute.interrupt import StopFlag
from precompute.queue import TeacherQueue
from precompute.tasks import ShardReceipt
from schemas.errors import ResourceError, TmkdError
from schemas.recipe import StoreOptions

# Bounds how late a stop, a stall or a retry is noticed.
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class PoolReport:
    """What a pool did.

    Attributes:
        receipts: Of the shards done in this run.
        num_replaced: Actors that died or hung, or were replaced after an unforeseen error.
        stopped: The stop flag ended the run; shards are missing.
    """

    receipts: tuple[ShardReceipt, ...]
    num_replaced: int
    seconds: float
    stopped: bool


def run_pool(
    queues: Sequence[TeacherQueue],
    options: StoreOptions,
    *,
    on_progress: Callable[[ProgressEvent], None],
    stop: StopFlag,
    worker_factory: WorkerFactory = make_shard_worker,
) -> PoolReport:
    """Runs all queues on the Ray cluster that this process is connected to.

    Args:
        queues: Teachers with pending shards; they share the cluster.
        options: Attempts and timeouts.
        on_progress: Called from this thread.
        stop: Looked at several times a second.
        worker_factory: Makes the worker inside an actor.

    Raises:
        TeacherError: A teacher or a shard failed; all other shards are committed.
        ResourceError: No node can hold an actor, none starts in time, or a disk is full.
        DataError: A corpus or a store is damaged.
    """
    began_s = time.monotonic()
    todo = [queue for queue in queues if queue.jobs]
    try:
        check_demand(todo, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        crews = [
            Crew(queue, options, partial(RemoteActor, queue, worker_factory), on_progress) for queue in todo
        ]
        _drive(crews, options, stop)
    except ConnectionError as error:
        raise ResourceError(f"the connection to the Ray cluster was lost ({error})") from error
    if not stop.is_set():
        _raise_errors(crews)
    return PoolReport(
        receipts=tuple(receipt for crew in crews for receipt in crew.receipts),
        num_replaced=sum(crew.num_replaced for crew in crews),
        seconds=time.monotonic() - began_s,
        stopped=stop.is_set(),
    )


def _drive(crews: Sequence[Crew], options: StoreOptions, stop: StopFlag) -> None:
    placed_s = time.monotonic()
    try:
        while not stop.is_set():
            now_s = time.monotonic()
            for crew in crews:
                crew.advance(now_s)
                if isinstance(crew.failure, ResourceError):
                    raise crew.failure
            if all(crew.is_finished for crew in crews):
                return
            if any(crew.num_placed for crew in crews):
                placed_s = now_s
            elif now_s - placed_s > options.start_timeout_s:
                raise _not_placed(crews, options)
            _await_answers(crews)
    finally:
        for crew in crews:
            crew.dismiss()


def _await_answers(crews: Sequence[Crew]) -> None:
    waiting = {
        reference: (crew, member)
        for crew in crews
        for member in crew.members
        for reference in member.actor.calls
    }
    if not waiting:
        time.sleep(_POLL_S)
        return
    ready, _ = ray.wait(list(waiting), num_returns=1, timeout=_POLL_S)
    if len(waiting) > 1 and ready:
        # Whatever else has come meanwhile.
        ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
    for reference in ready:
        crew, member = waiting[reference]
        # An earlier answer of the same round may have cost the actor its place.
        if reference in member.actor.calls:
            call, outcome = member.actor.collect(reference)
            crew.receive(member, call, outcome, time.monotonic())


def _not_placed(crews: Sequence[Crew], options: StoreOptions) -> ResourceError:
    free = ray.available_resources()
    supply = f"{free.get('CPU', 0.0):g} CPU and {free.get('GPU', 0.0):g} GPU"
    names = ", ".join(crew.queue.name for crew in crews if not crew.is_finished)
    return ResourceError(
        f"no actor of {names} was started within {options.start_timeout_s:g} s (store.start_timeout_s); "
        f"the cluster has {supply} free; wait for other jobs to end, or ask for less per actor"
    )


def _raise_errors(crews: Sequence[Crew]) -> None:
    errors: list[TmkdError] = [error for crew in crews if (error := crew.error()) is not None]
    if errors:
        for other in errors[1:]:
            errors[0].add_note(other.message)
        raise errors[0]
