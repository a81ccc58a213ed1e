"""A language model over chunks: batches under the token budget, kept entries in the order of the chunks.

Shapes: R chunks, B of a batch, L tokens of its longest, N positions of a piece, P of all chunks, V true
vocabulary, D hidden size.

Invariants (tests/precompute/test_language_forward.py):
    1. Positions come in the order of chunks and tokens, whatever batches they were computed in.
    2. What is kept is what the model's whole logits give, but for rounding.
    3. A chunk with a logit that is not a number is flagged and changes no other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from precompute.batching import cut_batches
from precompute.draws import Keys, position_keys
from precompute.kept_positions import concatenate_kept, take_positions
from precompute.language_teacher import LoadedLanguageModel
from precompute.log_softmax import Buffers
from precompute.truncate import KeptPositions, Truncation, keep_entries
from schemas.kept_entries import Offsets, offsets_of
from schemas.policy import HybridPolicy, SampledPolicy
from schemas.token_rows import TokenChunks

# Of float32 logits that a policy works on at once on a CPU: few enough for its caches, and enough for calls
# to cost less than what they do.
_CACHED_BYTES = 6 * 2**20


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """Chunks to run, and what marks their positions.

    Attributes:
        chunks: R chunks.
        example_ids: Of each chunk, ``[R]``.
        objective_shift: 1 where a position predicts the next token (causal), 0 where its own (masked).
        mask_token: What the model reads in place of tokens with loss mask 1, for the masked objective.
    """

    chunks: TokenChunks
    example_ids: tuple[str, ...]
    objective_shift: int
    mask_token: int | None

    def positions(self) -> tuple[npt.NDArray[np.int64], Offsets]:
        """Returns the stored positions as indices into all tokens, int64[P], and each chunk's, int64[R + 1].

        A position is where the model's output is read; its target is ``objective_shift`` tokens on.
        """
        counts = np.add.reduceat(
            np.append(self.chunks.loss_mask, 0).astype(np.int64), self.chunks.offsets[:-1]
        )
        counts[np.diff(self.chunks.offsets) == 0] = 0
        return np.flatnonzero(self.chunks.loss_mask) - self.objective_shift, offsets_of(counts)


@dataclass(frozen=True, slots=True)
class LanguageResult:
    """What a model says of R chunks.

    Attributes:
        kept: Of P positions.
        rows: int64[R + 1]: the positions of each chunk.
        finite_R: Whether all logits of a chunk were numbers, bool[R].
        num_padded_tokens: Tokens that went through the model, padding included.
        seconds: What it took.
    """

    kept: KeptPositions
    rows: Offsets
    finite_R: npt.NDArray[np.bool_]
    num_padded_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ChunkBatch:
    """Positions of a batch: where they lie in it, their targets, and their place among all P.

    Attributes:
        rows_P, columns_P: int64, row and column of the batch.
        targets_P: int64, the token to predict.
        places_P: int64, index among the positions of all chunks.
        keys_P: Of ``precompute.draws``; None where the policy draws nothing.
    """

    rows_P: npt.NDArray[np.int64]
    columns_P: npt.NDArray[np.int64]
    targets_P: npt.NDArray[np.int64]
    places_P: npt.NDArray[np.int64]
    keys_P: Keys | None


def compute_kept(
    teacher: LoadedLanguageModel,
    rows: ChunkRows,
    truncation: Truncation,
    on_rows: Callable[[int], None] = lambda _: None,
) -> LanguageResult:
    """Runs a model over at least one chunk.

    Args:
        teacher: The loaded model. On the CPU, the calling thread computes with its number of threads.
        rows: R chunks with a position each at least.
        truncation: What is kept.
        on_rows: Hears, after each batch, how many chunks it had.

    Raises:
        ResourceError: The device's memory does not hold a batch.
        RecipeError: The policy keeps more entries than the vocabulary has.
    """
    if teacher.spec.device == "cpu":
        # See ``precompute.forward``.
        torch.set_num_threads(teacher.spec.num_threads)
    began = time.perf_counter()
    positions_P, bounds = rows.positions()
    pieces: list[KeptPositions] = []
    places: list[npt.NDArray[np.int64]] = []
    num_padded = 0
    lengths = np.diff(rows.chunks.offsets)
    with _spreading(teacher) as spread:
        reduction = _Reduction(truncation, spread, threading.local())
        for indices_B in cut_batches(lengths, teacher.spec.teacher.tokens_per_batch):
            ids_BL, mask_BL = collate_chunks(teacher, rows, indices_B)
            batch = find_positions(rows, indices_B, (positions_P, bounds), truncation)
            pieces += _keep_batch(teacher, (ids_BL, mask_BL), batch, reduction)
            places.append(batch.places_P)
            num_padded += ids_BL.numel()
            on_rows(len(indices_B))
    order: npt.NDArray[np.int64] = np.argsort(np.concatenate(places), kind="stable")
    kept = take_positions(concatenate_kept(pieces), order)
    finite_R = np.logical_and.reduceat(kept.is_finite_N, bounds[:-1])
    return LanguageResult(kept, bounds, finite_R, num_padded, time.perf_counter() - began)


def collate_chunks(
    teacher: LoadedLanguageModel, rows: ChunkRows, indices_B: npt.NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Returns ids and attention mask of the chunks ``indices_B``, int64[B, L], padded on the right."""
    chunks = rows.chunks
    starts_B1 = chunks.offsets[indices_B][:, None]
    lengths_B1 = chunks.offsets[indices_B + 1][:, None] - starts_B1
    columns_L = np.arange(int(lengths_B1.max()))[None, :]
    is_token_BL = columns_L < lengths_B1
    sources_BL = np.where(is_token_BL, starts_B1 + columns_L, 0)
    ids_BL = chunks.input_ids[sources_BL].astype(np.int64)
    if rows.mask_token is not None:
        ids_BL[chunks.loss_mask[sources_BL] == 1] = rows.mask_token
    ids_BL[~is_token_BL] = teacher.padding_token
    return torch.from_numpy(ids_BL), torch.from_numpy(is_token_BL.astype(np.int64))


def find_positions(
    rows: ChunkRows,
    indices_B: npt.NDArray[np.int64],
    found: tuple[npt.NDArray[np.int64], Offsets],
    truncation: Truncation,
) -> ChunkBatch:
    """Returns the stored positions of the chunks ``indices_B``.

    Args:
        rows: All chunks.
        indices_B: Those of the batch, in its order.
        found: From ``rows.positions()``.
        truncation: Whose policy may draw.
    """
    positions_P, bounds = found
    counts_B = np.diff(bounds)[indices_B]
    rows_P = np.repeat(np.arange(len(indices_B)), counts_B)
    inner_P = np.arange(len(rows_P)) - np.repeat(offsets_of(counts_B)[:-1], counts_B)
    places_P = bounds[indices_B][rows_P] + inner_P
    sources_P = positions_P[places_P]
    columns_P = sources_P - rows.chunks.offsets[indices_B][rows_P]
    targets_P = rows.chunks.input_ids[sources_P + rows.objective_shift].astype(np.int64)
    keys_P = None
    policy = truncation.policy
    if isinstance(policy, SampledPolicy | HybridPolicy):
        cuts = offsets_of(counts_B)
        keys_P = np.concatenate(
            [
                position_keys(policy.seed, rows.example_ids[index], columns_P[cuts[i] : cuts[i + 1]])
                for i, index in enumerate(indices_B.tolist())
            ]
        )
    return ChunkBatch(rows_P, columns_P, targets_P, places_P, keys_P)


_Work: TypeAlias = Callable[[slice], KeptPositions]
_Spread: TypeAlias = Callable[[_Work, list[slice]], Iterable[KeptPositions]]


@dataclass(frozen=True, slots=True)
class _Reduction:
    """What to keep of logits, and how their slices are gone through: like ``map``."""

    truncation: Truncation
    spread: _Spread
    local: threading.local

    def buffers(self) -> Buffers:
        """Returns those of the calling thread."""
        found: Buffers | None = getattr(self.local, "buffers", None)
        if found is None:
            found = self.local.buffers = Buffers()
        return found


@contextmanager
def _spreading(teacher: LoadedLanguageModel) -> Iterator[_Spread]:
    """Gives a ``map`` over slices of logits.

    On a CPU each goes to one of so many threads as the model has, since a slice that fits a cache is too
    little for torch to divide.
    """
    num_threads = teacher.spec.num_threads
    if teacher.spec.device != "cpu" or num_threads == 1:
        yield map
        return
    with ThreadPoolExecutor(num_threads, "keep", torch.set_num_threads, (1,)) as pool:
        yield pool.map
    # The number is the calling thread's own, but also what threads to come start with.
    torch.set_num_threads(num_threads)


def _keep_batch(
    teacher: LoadedLanguageModel, inputs: tuple[Tensor, Tensor], batch: ChunkBatch, reduction: _Reduction
) -> list[KeptPositions]:
    """Runs a batch and reduces its positions, some at a time."""
    output = teacher.encode(*inputs)
    hidden_BLD = output.last_hidden_state
    device = hidden_BLD.device
    hidden_PD = hidden_BLD[
        torch.from_numpy(batch.rows_P).to(device), torch.from_numpy(batch.columns_P).to(device)
    ]
    kept: list[KeptPositions] = []
    pending: Iterable[KeptPositions] = ()
    step = teacher.spec.teacher.chunk_positions
    for start in range(0, len(batch.rows_P), step):
        logits_NW = teacher.predict(output, hidden_PD[start : start + step])
        # What threads do with some logits goes on while the next ones are made, and no longer.
        kept += pending
        pending = _keep_logits(logits_NW, batch, start, reduction)
        del logits_NW
    return [*kept, *pending]


def _keep_logits(
    logits_NW: Tensor, batch: ChunkBatch, start: int, reduction: _Reduction
) -> Iterable[KeptPositions]:
    """Reduces the logits of N positions of a batch, from ``start`` on."""
    truncation = reduction.truncation
    num = len(logits_NW)
    # A policy's buffers are some times the logits: on a CPU it gets what its cache holds.
    size = num if logits_NW.is_cuda else max(2, _CACHED_BYTES // (4 * truncation.vocab))

    def keep(part: slice) -> KeptPositions:
        there = slice(start + part.start, start + part.stop)
        targets_N = torch.from_numpy(batch.targets_P[there]).to(logits_NW.device)
        keys_N = None if batch.keys_P is None else batch.keys_P[there]
        return keep_entries(logits_NW[part], targets_N, keys_N, truncation, reduction.buffers())

    parts = [slice(first, min(first + size, num)) for first in range(0, num, size)]
    return reduction.spread(keep, parts)


def leave_out(result: LanguageResult, rows: ChunkRows) -> tuple[ChunkRows, LanguageResult]:
    """Returns chunks and what is kept without the chunks whose logits are not finite."""
    chunks, finite_R = rows.chunks, result.finite_R
    lengths, counts = np.diff(chunks.offsets), np.diff(result.rows)
    is_kept_T = np.repeat(finite_R, lengths)
    remaining = TokenChunks(
        chunks.input_ids[is_kept_T], chunks.loss_mask[is_kept_T], offsets_of(lengths[finite_R])
    )
    ids = tuple(example_id for example_id, kept in zip(rows.example_ids, finite_R, strict=True) if kept)
    places: npt.NDArray[np.int64] = np.flatnonzero(np.repeat(finite_R, counts))
    kept = take_positions(result.kept, places)
    return (
        replace(rows, chunks=remaining, example_ids=ids),
        replace(result, kept=kept, rows=offsets_of(counts[finite_R]), finite_R=finite_R[finite_R]),
    )
