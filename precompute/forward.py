"""A teacher over tokenised rows: batches under the token budget, logits in the order of the rows.

Shapes: R rows, B rows of a batch, C labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from precompute.batching import cut_batches
from precompute.teacher import LoadedTeacher, TokenisedRows


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """Logits of R rows, float32 ``[R, C]`` on the CPU, and what they took."""

    logits_RC: npt.NDArray[np.float32]
    num_padded_tokens: int
    seconds: float


def compute_logits(
    teacher: LoadedTeacher, tokens: TokenisedRows, on_rows: Callable[[int], None] = lambda _: None
) -> ForwardResult:
    """Runs a teacher over at least one row.

    Args:
        teacher: The loaded teacher. On the CPU, the calling thread computes with its number of threads.
        tokens: R rows.
        on_rows: Hears, after each batch, how many rows it had.

    Raises:
        ResourceError: The device's memory does not hold a batch.
    """
    if teacher.spec.device == "cpu":
        # Inside a Ray actor OMP_NUM_THREADS is 1 whatever its CPUs are; OpenMP keeps the number
        # per thread, so it is set in the thread that computes.
        torch.set_num_threads(teacher.spec.num_threads)
    began = time.perf_counter()
    indices: list[npt.NDArray[np.int64]] = []
    outputs: list[torch.Tensor] = []
    num_padded = 0
    for indices_B in cut_batches(tokens.lengths, teacher.spec.teacher.tokens_per_batch):
        batch = teacher.collate(tokens, indices_B)
        # Logits stay on the device until the end: a copy each batch would wait for the GPU.
        outputs.append(teacher.forward(batch))
        indices.append(indices_B)
        num_padded += batch["input_ids"].numel()
        on_rows(len(indices_B))
    sorted_RC = torch.cat(outputs).cpu().numpy()
    logits_RC = np.empty_like(sorted_RC)
    logits_RC[np.concatenate(indices)] = sorted_RC
    return ForwardResult(logits_RC, num_padded, time.perf_counter() - began)
