"""One stage of training on one rank, from its first or a checkpoint's step to the finished model.

Invariants (tests/distill/test_trainer.py, tests/distill/test_resume.py):
    1. The result depends neither on accumulation nor on the number of ranks, up to rounding.
    2. Killed at any step, or at any point of writing a checkpoint, and started again: the same weights,
       bit for bit, on one CPU thread and as many ranks. Dropout is seeded anew in each step from seed,
       step and rank, so there is no random state to restore.
    3. No teacher is opened; neither precompute nor ray is imported.
"""

from __future__ import annotations

import hashlib
import math
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from distill.checkpoint import CheckpointDirectory, Origin
from distill.data_state import DataState
from distill.engine import build_engine, is_partitioned, take_step
from distill.engine_state import gather_weights, load_engine_state, raise_together, save_engine_state
from distill.loader import Step
from distill.metrics_log import MetricsLog
from distill.progress import StageProgress
from distill.selection import Selection, selection_metric
from distill.stage_directory import StageDirectory, publish_directory
from distill.stage_task import AnyTask
from distill.stop_request import StopRequest
from schemas.errors import ResourceError, TrainingError
from schemas.job import AnyJob, StageStatus

State = Literal["running", "complete", "preempted"]


class StageTrainer:
    """Trains a stage; every rank makes one and calls ``run``.

    Attributes:
        job: What to train.
        step: Optimizer steps done.
    """

    def __init__(self, job: AnyJob, directory: StageDirectory, stop: StopRequest, task: AnyTask) -> None:
        self.job = job
        self.step = 0
        self._directory = directory
        self._checkpoints = CheckpointDirectory(directory.checkpoints)
        self._stop = stop
        self._task = task
        self._frame = task.frame
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._engine = build_engine(self._frame.module, job, self._frame.plan)
        self._state: DataState = self._frame.source.start()
        self._selection = Selection(selection_metric(job), job.training.patience)
        self._log: MetricsLog | None = None
        self._progress: StageProgress | None = None

    def run(self, *, keep_checkpoints: bool = False) -> State:
        """Trains to the end, or until it is asked to stop.

        Args:
            keep_checkpoints: Do not delete them once the stage is complete.

        Returns:
            ``complete`` or ``preempted``.

        Raises:
            RefusedError: The checkpoints belong to another job or to other stores.
            TrainingError: The loss is not finite any more.
            DataError: A store or the corpus is damaged.
        """
        self._resume()
        outcome: State = "running"
        with self._records():
            remaining = self._frame.plan.total_steps - self.step
            with closing(self._frame.source.steps(self._state, remaining)) as steps:  # type: ignore[type-var]
                for step in steps:
                    outcome = self._advance(step)
                    if outcome != "running":
                        break
            if outcome != "preempted":
                self._finish()
                outcome = "complete"
        self._write_status(outcome)
        if outcome == "complete" and self._rank == 0 and not keep_checkpoints:
            self._checkpoints.delete()
        return outcome

    def _resume(self) -> None:
        found: list[Any] = [None, None]
        if self._rank == 0:
            # One rank decides, so that all load the same checkpoint.
            checkpoint = self._checkpoints.find(self._origin())
            if checkpoint is not None:
                found = [checkpoint.step, checkpoint.state]
        dist.broadcast_object_list(found, src=0, device=self._engine.device)
        step, state = found
        if step is not None:
            load_engine_state(self._engine, self._checkpoints.place(step), state["engine"])
            self.step = step
            self._state = DataState.model_validate(state["data"])
            self._selection = Selection.from_json(state["selection"])
        self._write_status("running")

    @contextmanager
    def _records(self) -> Iterator[None]:
        if self._rank != 0:
            yield
            return
        self._log = MetricsLog(self._directory.metrics, self._directory.tensorboard, self.step)
        self._progress = StageProgress(self.job.name)
        try:
            yield
        finally:
            self._progress.close()
            self._log.close()

    def _advance(self, step: Step[Any]) -> State:
        """Takes one optimizer step and what is due after it."""
        epoch = self._state.epoch
        asked = self._take_step(step, epoch)
        self.step += 1
        self._state = step.state
        is_last = self.step == self._frame.plan.total_steps
        evaluated = self._frame.evaluates and (is_last or self._is_due(step, "eval"))
        if evaluated:
            self._evaluate(epoch)
            if self._selection.wants_stop:
                return "complete"
        if is_last:
            return "running"
        if asked or evaluated or self._is_due(step, "checkpoint"):
            self._save_checkpoint()
        return "preempted" if asked else "running"

    def _is_due(self, step: Step[Any], what: Literal["eval", "checkpoint"]) -> bool:
        training = self.job.training
        every = training.eval_every_steps if what == "eval" else training.checkpoint_every_steps
        return step.ends_epoch if every is None else self.step % every == 0

    def _take_step(self, step: Step[Any], epoch: int) -> bool:
        """Puts the micro-batches through and steps; returns whether any rank was asked to stop."""
        start_s = time.monotonic()
        engine = self._engine
        engine.train()
        torch.manual_seed(_step_seed(self.job.seed, self.step, self._rank))
        learning_rate, norm = float(engine.get_lr()[0]), 0.0
        rows: list[torch.Tensor] = []
        means: dict[str, float | None] = {}
        for number, batch in enumerate(step.batches):
            losses = self._task.sum_losses(engine, batch)
            # DeepSpeed averages over ranks; the sum over all of them is divided by what counts.
            scale = self._world_size / batch.real_count_in_step
            engine.backward(losses.total * scale, scale_wrt_gas=False)
            trained = {name: value for name, value in losses.parts.items() if value is not None}
            rows.append(torch.stack([losses.total.detach(), *trained.values()]).double())
            means = dict.fromkeys(losses.parts)
            if number + 1 < len(step.batches):
                engine.step()
            else:
                norm = take_step(engine, self.job.training.max_grad_norm)
        asked_now = rows[0].new_tensor([float(self._stop.is_set())])
        sums = torch.cat([torch.stack(rows).sum(dim=0), asked_now])
        dist.all_reduce(sums)
        loss, *parts, asked = sums.tolist()
        count = step.batches[0].real_count_in_step
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingError(
                f"{self.job.name}: the loss is {loss / count} and the gradient's norm {norm} in step "
                f"{self.step + 1}; lower learning_rate"
            )
        means |= dict(zip(trained, (part / count for part in parts), strict=True))
        self._record(
            {
                "kind": "step",
                "step": self.step + 1,
                "total_steps": self._frame.plan.total_steps,
                "epoch": epoch,
                "loss": loss / count,
                **means,
                "lr": learning_rate,
                "grad_norm": norm,
                **self._speeds(step, time.monotonic() - start_s),
            }
        )
        return asked > 0

    def _speeds(self, step: Step[Any], elapsed_s: float) -> dict[str, float]:
        speeds = {"rows_per_s": step.num_rows / elapsed_s}
        if self._frame.counts == "tokens":
            speeds["tokens_per_s"] = step.batches[0].real_count_in_step / elapsed_s
        return speeds

    def _evaluate(self, epoch: int) -> None:
        self._engine.eval()
        with torch.no_grad():
            measures = self._task.measure(self._engine)
        # Rank 0's word counts: sums of floats may differ in their last bit between ranks.
        found = measures[self._selection.metric]
        value = torch.tensor(found, dtype=torch.float64, device=self._engine.device)
        dist.broadcast(value, src=0)
        if self._selection.update(self.step, float(value)):
            self._save_model(self._checkpoints.best_model(self.step))
        best = self._selection.best_step
        self._record({"kind": "evaluation", "step": self.step, "epoch": epoch, "best_step": best, **measures})
        self._write_status("running")

    def _save_checkpoint(self) -> None:
        checkpoints, failure = self._checkpoints, None
        if self._rank == 0:
            checkpoints.prepare(self.step)
        try:
            engine = save_engine_state(self._engine, checkpoints.temporary(self.step))
            if self._rank == 0:
                try:
                    self._commit_checkpoint(engine)
                except OSError as error:
                    failure = error
            raise_together(failure, self._engine.device, checkpoints.path)
        except ResourceError:
            if self._rank == 0:
                # What was written of it may be what fills the disk, and the status has to go there too.
                checkpoints.prepare(self.step)
            raise

    def _commit_checkpoint(self, engine: dict[str, Any]) -> None:
        state = {
            "data": self._state.model_dump(mode="json"),
            "selection": self._selection.to_json(),
            "engine": engine,
        }
        best = self._selection.best_step
        self._checkpoints.commit(self.step, self._origin(), self._world_size, best, state)
        self._checkpoints.prune_best(best)
        self._write_status("running")

    def _origin(self) -> Origin:
        """Returns what checkpoints of this run are bound to."""
        job = self.job.model_dump(mode="json", exclude={"name", "output", "threads"})
        data = self._state.model_dump(mode="json", exclude={"epoch", "samples_consumed"})
        return Origin(fingerprint=self.job.fingerprint(), job=job, data=data)

    def _save_model(self, target: Path) -> None:
        """Writes the current weights in the layout of ``save_pretrained``; every rank must call it."""
        if self._rank != 0 and not is_partitioned(self._engine.config):
            return
        weights = gather_weights(self._engine)
        if self._rank == 0:
            publish_directory(target, lambda path: self._task.save(path, weights))

    def _finish(self) -> None:
        best = self._selection.best_step
        if best is None:
            self._save_model(self._directory.model)
        elif self._rank == 0:
            source = self._checkpoints.best_model(best)
            # Copied, not moved: a crash after this line starts from a checkpoint that refers to it.
            self._directory.publish_model(lambda path: _copy(source, path))
        dist.barrier()

    def _record(self, line: dict[str, Any]) -> None:
        if self._log is not None and self._progress is not None:
            self._log.write(line)
            self._progress.show(line)

    def _write_status(self, state: State) -> None:
        if self._rank != 0:
            return
        self._directory.write_status(
            StageStatus(
                state=state,
                fingerprint=self.job.fingerprint(),
                step=self.step,
                best_step=self._selection.best_step,
                best_value=self._selection.best_value,
                peak_rss_bytes=peak_rss_bytes(),
            )
        )


def peak_rss_bytes() -> int:
    """Returns the largest resident memory that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _step_seed(seed: int, step: int, rank: int) -> int:
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
