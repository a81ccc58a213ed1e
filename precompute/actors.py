"""A shard worker inside a Ray actor, and the driver's view of one.

Only jobs, receipts and errors go through Ray; rows never do.

Invariants (tests/precompute/test_pool.py):
    1. An error of the worker comes back as a value: one that Ray raises means a lost actor.
    2. While a shard is computed, the actor still answers how many rows it has done.
"""

from __future__ import annotations

import os
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError

from precompute.queue import TeacherQueue
from precompute.tasks import AnyWorkerSpec, LanguageWorkerSpec, ShardJob, ShardReceipt
from schemas.errors import TmkdError, first_line
from schemas.storage.os_errors import explain_os_error

# Ray restarts an actor by itself faster than a new one is placed; after that it is replaced.
_MAX_RESTARTS = 2
# Ray's reasons go on to list all that might have happened.
_MAX_REASON = 160

Call = Literal["place", "load", "beat"] | ShardJob


class Worker(Protocol):
    """What an actor runs; ``ShardWorker`` and ``LanguageWorker`` are the real ones."""

    num_rows_done: int

    def load(self) -> object:
        """Loads the teacher."""

    def process(self, job: ShardJob) -> ShardReceipt:
        """Computes and commits one shard."""

    def prefetch(self, job: ShardJob) -> object:
        """Prepares a later shard beside the one in ``process``."""


WorkerFactory = Callable[[AnyWorkerSpec], Worker]


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of a worker.

    Attributes:
        error: The error itself, where it is one of ours.
        summary: Class and message in one line.
        trace: The traceback inside the actor.
    """

    error: TmkdError | None
    summary: str
    trace: str


@dataclass(frozen=True, slots=True)
class Loss:
    """An actor that did not answer because it is gone, or out of reach.

    Attributes:
        restarting: Ray starts the same actor again.
        preempted: The machine was taken away: nobody's fault.
    """

    reason: str
    restarting: bool = False
    preempted: bool = False


Outcome = ShardReceipt | Failure | Loss | int | None


def make_shard_worker(spec: AnyWorkerSpec) -> Worker:
    """Makes the real worker, of the spec's kind. It imports torch, so only actors call this."""
    # Ray gives every actor one OpenMP thread whatever its CPUs are; this is read when torch loads.
    os.environ["OMP_NUM_THREADS"] = str(spec.num_threads)
    if isinstance(spec, LanguageWorkerSpec):
        from precompute.language_worker import LanguageWorker

        return LanguageWorker(spec)
    from precompute.worker import ShardWorker

    return ShardWorker(spec)


class ShardActor:
    """The shell round a worker. Methods of the group ``watch`` answer while a shard is computed."""

    def __init__(self, factory: WorkerFactory, spec: AnyWorkerSpec) -> None:
        # Nothing that can fail happens here: Ray would not carry the error back typed.
        self._factory = factory
        self._spec = spec
        self._worker: Worker | None = None

    def place(self) -> None:
        """Answers once the actor has its resources."""

    def load(self) -> Failure | None:
        """Makes the worker and loads its teacher."""
        try:
            self._require_worker().load()
        except Exception as error:  # noqa: BLE001 - supervision boundary: carried back as a value
            return _describe_failure(error)
        return None

    def process(self, job: ShardJob) -> ShardReceipt | Failure:
        """Computes and commits one shard."""
        try:
            return self._require_worker().process(job)
        except Exception as error:  # noqa: BLE001 - supervision boundary: carried back as a value
            return _describe_failure(error)

    @ray.method(concurrency_group="watch")
    def prefetch(self, job: ShardJob) -> None:
        """Prepares a later shard; an error shows when that shard is processed."""
        if self._worker is not None:
            self._worker.prefetch(job)

    @ray.method(concurrency_group="watch")
    def beat(self) -> int:
        """Returns the number of rows that went through the model so far."""
        return 0 if self._worker is None else self._worker.num_rows_done

    def _require_worker(self) -> Worker:
        if self._worker is None:
            self._worker = self._factory(self._spec)
        return self._worker


class RemoteActor:
    """The driver's end of one actor.

    Attributes:
        calls: Calls without an answer yet.
    """

    def __init__(self, queue: TeacherQueue, factory: WorkerFactory) -> None:
        """Asks Ray for an actor; it may take its time to be placed."""
        actor_class = ray.remote(concurrency_groups={"watch": 1})(ShardActor)
        self._handle: Any = actor_class.options(
            num_cpus=queue.cpus_per_actor,
            num_gpus=queue.gpus_per_actor,
            max_restarts=_MAX_RESTARTS,
            max_task_retries=0,
        ).remote(factory, queue.spec)
        self.calls: dict[Any, Call] = {}

    def ask(self, call: Call, *, behind_another: bool = False) -> None:
        """Sends a call.

        Args:
            call: ``place``: answer as soon as the actor has its resources; ``load`` the teacher;
                ``beat``: the number of rows done; or a shard to process.
            behind_another: The shard waits behind another one: prepare it meanwhile.
        """
        if isinstance(call, ShardJob):
            if behind_another:
                self._handle.prefetch.remote(call)
            reference = self._handle.process.remote(call)
        else:
            reference = getattr(self._handle, call).remote()
        self.calls[reference] = call

    def collect(self, reference: Any) -> tuple[Call, Outcome]:
        """Fetches the answer to a call that ``ray.wait`` found ready."""
        call = self.calls.pop(reference)
        try:
            return call, ray.get(reference)
        except ActorUnavailableError:
            return call, Loss("its process is gone or out of reach", restarting=True)
        except ActorDiedError as error:
            return call, Loss(_last_line(error), preempted=bool(getattr(error, "preempted", False)))
        except RayTaskError as error:
            # The shell catches what the worker raises, so that this is an answer that cannot be sent.
            return call, Failure(None, _last_line(error), str(error))
        except RayError as error:
            return call, Loss(f"{type(error).__name__}: {_last_line(error)}")

    def kill(self) -> None:
        """Ends the actor at once; nothing that is committed depends on its good end."""
        self.calls.clear()
        # An actor that is dead already is no error.
        ray.kill(self._handle, no_restart=True)


def _describe_failure(error: Exception) -> Failure:
    trace = traceback.format_exc()
    if isinstance(error, OSError):
        refusal = explain_os_error(error, error.filename or "the file system")
        if refusal is not None:
            return Failure(refusal, str(error), trace)
    summary = f"{type(error).__name__}: {first_line(error)}"
    return Failure(error if isinstance(error, TmkdError) else None, summary, trace)


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return textwrap.shorten(lines[-1], _MAX_REASON, placeholder=" ...") or type(error).__name__
