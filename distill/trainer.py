"""``python -m distill.trainer --job job.json``: one rank of one stage, under DeepSpeed's launcher.

Rank 0 leaves the outcome in ``status.json``; a rank above 0 that fails leaves ``status.rank<r>.json``.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from distill.classification_task import ClassificationTask
from distill.engine import start_process_group, stop_process_group
from distill.language_task import LanguageTask
from distill.stage_directory import StageDirectory, read_job
from distill.stage_task import AnyTask
from distill.stage_trainer import StageTrainer, State, peak_rss_bytes
from distill.stop_request import StopRequest
from schemas.errors import ResourceError, TmkdError
from schemas.job import AnyJob, LanguageJob, StageStatus

_OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_LOGGER = logging.getLogger("distill.trainer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one rank.

    Args:
        arguments: Of the command line; by default this process's.

    Returns:
        The exit code: 0 also when it was asked to stop; else the error's.
    """
    parser = argparse.ArgumentParser(prog="distill.trainer", description="One stage of training.")
    parser.add_argument("--job", type=Path, required=True, help="the stage's job, as JSON")
    parser.add_argument("--keep-checkpoints", action="store_true", help="keep them after the last step")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
    options = parser.parse_args(arguments)
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s"
    )
    try:
        job = read_job(options.job)
        directory = StageDirectory(Path(job.output))
        directory.create()
    except TmkdError as error:
        _LOGGER.error("%s: %s", type(error).__name__, error)
        return error.exit_code
    # DeepSpeed calls collectives by the names that they had before torch 2.13, thousands of times.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    stop = StopRequest(directory)
    stop.install()
    try:
        run_rank(job, directory, stop, keep_checkpoints=options.keep_checkpoints)
    except TmkdError as error:
        _report(job, directory, rank, error)
        return error.exit_code
    return 0


def run_rank(
    job: AnyJob, directory: StageDirectory, stop: StopRequest, *, keep_checkpoints: bool = False
) -> State:
    """Trains a stage on this rank, unless it is finished already.

    Raises:
        TmkdError: What went wrong, data that is damaged and a full disk included.
    """
    if directory.is_complete(job):
        return "complete"
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        directory.lock()
    try:
        start_process_group(job.threads)
        outcome = _train(job, directory, stop, keep_checkpoints)
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"the device's memory is full ({error}); lower max_micro_batch") from error
    except OSError as error:
        if error.errno in _OUTSIDE:
            raise ResourceError(f"{error.filename or directory.path}: {error.strerror}") from error
        raise
    finally:
        directory.unlock()
    stop_process_group()
    return outcome


def _train(job: AnyJob, directory: StageDirectory, stop: StopRequest, keep_checkpoints: bool) -> State:
    torch.manual_seed(job.seed)
    task: AnyTask = LanguageTask.open(job) if isinstance(job, LanguageJob) else ClassificationTask.open(job)
    trainer = StageTrainer(job, directory, stop, task)
    return trainer.run(keep_checkpoints=keep_checkpoints)


def _report(job: AnyJob, directory: StageDirectory, rank: int, error: TmkdError) -> None:
    _LOGGER.error("%s: %s", type(error).__name__, error)
    before = directory.read_status()
    status = StageStatus(
        state="failed",
        fingerprint=job.fingerprint(),
        step=before.step if before is not None else 0,
        error=str(error),
        exit_code=error.exit_code,
        peak_rss_bytes=peak_rss_bytes(),
    )
    try:
        directory.write_status(status, rank=rank)
    except OSError as unwritten:
        # The disk that is full may be this one; then the exit code has to say it.
        _LOGGER.error("the status cannot be written: %s", unwritten.strerror)


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    # Everything is closed by now; taking torch and transformers apart would hold the launcher up for
    # seconds.
    os._exit(code)
