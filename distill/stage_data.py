"""What a stage reads: its joined corpus, tokens, rows to train on and rows to select on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from distill.engine import StepPlan
from distill.join import JoinedCorpus
from distill.loader import LoaderOptions, StageLoader
from distill.order import hold_out, select_rows
from distill.selection import selection_metric
from distill.tokens import CorpusTokens
from schemas.errors import RecipeError
from schemas.job import StageJob

_TOKENS_DIRECTORY = "tokens"


@dataclass(frozen=True, slots=True)
class StageData:
    """The data of one rank.

    Attributes:
        loader: Of the rows to train on.
        held_out: int64, rows to select on, short ones first so that little is padded.
        plan: Number and cut of the steps.
    """

    loader: StageLoader
    held_out: npt.NDArray[np.int64]
    plan: StepPlan


def open_stage_data(job: StageJob, tokenizer: Any, *, prefetch: int = 2) -> StageData:
    """Opens a stage's data on this rank; every rank must call it.

    Args:
        job: Corpus, stores, selection of rows and cut of steps.
        tokenizer: The student's.
        prefetch: Steps that are read ahead; 0: none.

    Raises:
        DataError: See ``JoinedCorpus.open`` and ``CorpusTokens.open``; or no row is left.
        RecipeError: The rows that are held out cannot give the metric of selection.
        RefusedError: A store belongs to another plan.
    """
    training = job.training
    joined = JoinedCorpus.open_job(job)
    tokens = _open_tokens(job, joined, tokenizer)
    # Arms with and without teachers must see the same rows, so unlabelled ones go in both.
    usable = joined.usable_rows(labelled=job.uses_golden)
    chosen = select_rows(usable, training.rows)
    rows, held_out = hold_out(chosen, training.selection_fraction, job.selection_seed, joined.corpus_key)
    if len(held_out):
        _check_metric(job, np.intersect1d(held_out, joined.usable_rows(labelled=True)))
    options = LoaderOptions(
        seed=job.seed,
        global_batch=training.global_batch,
        max_micro_batch=training.max_micro_batch,
        window=training.window_shards,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        prefetch=prefetch,
    )
    loader = StageLoader(joined, tokens, rows, options)
    total_steps = training.max_steps or training.epochs * loader.num_steps_per_epoch
    by_length = np.argsort(tokens.lengths(held_out), kind="stable")
    plan = StepPlan(total_steps, loader.micro_batch, loader.num_micro_steps)
    return StageData(loader, held_out[by_length], plan)


def _check_metric(job: StageJob, labelled: npt.NDArray[np.int64]) -> None:
    """Checks before the first step what would else fail after an epoch."""
    metric = selection_metric(job)
    if metric == "soft_loss" and not job.soft_targets:
        raise RecipeError("soft_loss cannot be measured: the stage has no teacher", field="metric")
    if metric in ("accuracy", "macro_f1") and not len(labelled):
        raise RecipeError(
            f"{metric} cannot be measured: none of the held-out rows is labelled", field="metric"
        )


def _open_tokens(job: StageJob, joined: JoinedCorpus, tokenizer: Any) -> CorpusTokens:
    """Opens the cached tokens, rank 0 first: it fills the cache for the others."""
    parts = [part.corpus for part in joined.parts]
    cache = Path(job.parts[0].rows).parent / _TOKENS_DIRECTORY
    tokens: CorpusTokens | None = None
    if dist.get_rank() == 0:
        tokens = CorpusTokens.open(parts, tokenizer, job.max_length, cache)
    dist.barrier()
    return tokens or CorpusTokens.open(parts, tokenizer, job.max_length, cache)
