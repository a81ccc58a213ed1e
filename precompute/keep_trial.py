"""Keep policies over a sample of chunks, all of them in one pass of the teacher.

Shapes: P positions of the sample's chunks, N positions of a piece, W the model's padded vocabulary, V true
vocabulary, D hidden size.

Logits exist for ``chunk_positions`` positions at a time; whole distributions go, some at a time, to whoever
watches, and are forgotten.

Invariants (tests/precompute/test_keep_trial.py):
    1. What a policy keeps here is what a store of it holds.
    2. No ``[P, V]`` tensor is made.
    3. A logit that is not a number is an error that names the chunk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from precompute.batching import cut_batches
from precompute.candidates import Candidate
from precompute.deviation import rounding
from precompute.draws import Keys, position_keys
from precompute.kept_positions import concatenate_kept, take_positions
from precompute.language_forward import ChunkBatch, LanguageResult, collate_chunks, find_positions
from precompute.language_teacher import LoadedLanguageModel
from precompute.policy_tally import DenseTally, LossTally, PolicyTally, Slice
from precompute.trial_bytes import EncodedSample, encode_sample
from precompute.trial_sample import (
    CandidateOutcome,
    DensePiece,
    LossOutcome,
    TrialOutcome,
    TrialSample,
)
from precompute.truncate import Truncation, keep_entries
from schemas.codec import CODECS
from schemas.entry_layout import EntryLayout
from schemas.errors import TeacherError
from schemas.language import CodecName, LossName
from schemas.policy import AnyPolicy, DensePolicy, HybridPolicy, SampledPolicy

NUM_PILOT = 64
"""Positions of which bytes are measured to match policies."""
_DENSE_POSITIONS = 64
# Of float32 logits that a policy works on at once on a CPU: they stay in its cache.
_CACHED_BYTES = 2 * 2**20
Watch = Callable[[DensePiece], None]


class Pilot:
    """The bytes of any policy on a few positions of the sample's first batch; warms the model up."""

    def __init__(self, teacher: LoadedLanguageModel, sample: TrialSample, codec: CodecName) -> None:
        self._vocab, self._codec = sample.generation.vocab, CODECS[codec]
        first = next(_run_batches(teacher, sample, _Clock(teacher)))
        places = np.unique(np.linspace(0, len(first.hidden_PD) - 1, NUM_PILOT).astype(np.int64))
        chosen = torch.from_numpy(places).to(first.hidden_PD.device)
        self._logits_NW = teacher.predict(first.output, first.hidden_PD[chosen])
        self._targets_N = torch.from_numpy(first.batch.targets_P[places]).to(self._logits_NW.device)
        self._keys_N = position_keys(0, "pilot", places)
        self._known: dict[AnyPolicy, float] = {}

    def measure(self, policy: AnyPolicy) -> float:
        """Returns the bytes of kept entries a position, taken as one row of a store."""
        if policy not in self._known:
            truncation = Truncation(policy, self._vocab)
            kept = keep_entries(self._logits_NW, self._targets_N, self._keys_N, truncation)
            rows = np.array([0, kept.entries.num_positions])
            columns = self._codec.encode(kept.entries, rows, EntryLayout(policy, self._vocab))
            self._known[policy] = sum(column.nbytes for column in columns.values()) / int(rows[1])
        return self._known[policy]


def run_trial(
    teacher: LoadedLanguageModel,
    sample: TrialSample,
    candidates: Sequence[Candidate],
    watch: Watch | None = None,
) -> TrialOutcome:
    """Tries candidates. ``Pilot`` comes first, so that the model is warm when it is timed.

    Args:
        teacher: The loaded model. On the CPU, the calling thread computes with its number of threads.
        sample: What it reads.
        candidates: At least one that is not dense.
        watch: Gets the whole distributions of all positions, piece by piece.

    Raises:
        TeacherError: A logit is not a number.
        ResourceError: The device's memory does not hold a batch.
    """
    clock, trial = _Clock(teacher), _Trial(teacher, sample, candidates, watch)
    step = teacher.spec.teacher.chunk_positions
    for ran in _run_batches(teacher, sample, clock):
        trial.begin(ran)
        for start in range(0, len(ran.hidden_PD), step):
            with clock:
                logits_NW = teacher.predict(ran.output, ran.hidden_PD[start : start + step])
            trial.add(logits_NW, start)
    return trial.finish(clock.seconds)


class _Clock:
    """Adds up the time of the blocks that it is entered for."""

    def __init__(self, teacher: LoadedLanguageModel) -> None:
        self._is_cuda = teacher.spec.device == "cuda"
        self._began = 0.0
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._began


@dataclass(frozen=True, slots=True)
class _RunBatch:
    """Chunks of a batch after the model, before its head."""

    indices_B: npt.NDArray[np.int64]
    batch: ChunkBatch
    output: Any
    hidden_PD: Tensor


def _run_batches(teacher: LoadedLanguageModel, sample: TrialSample, clock: _Clock) -> Iterator[_RunBatch]:
    if teacher.spec.device == "cpu":
        torch.set_num_threads(teacher.spec.num_threads)
    rows, found = sample.rows, sample.rows.positions()
    truncation = Truncation(DensePolicy(), sample.generation.vocab)
    lengths = np.diff(rows.chunks.offsets)
    for indices_B in cut_batches(lengths, teacher.spec.teacher.tokens_per_batch):
        batch = find_positions(rows, indices_B, found, truncation)
        inputs = collate_chunks(teacher, rows, indices_B)
        with clock:
            output = teacher.encode(*inputs)
            hidden_BLD = output.last_hidden_state
            device = hidden_BLD.device
            hidden_PD = hidden_BLD[
                torch.from_numpy(batch.rows_P).to(device), torch.from_numpy(batch.columns_P).to(device)
            ]
        yield _RunBatch(indices_B, batch, output, hidden_PD)


class _Trial:
    """The tallies of all policies, and the batch that is going on."""

    def __init__(
        self,
        teacher: LoadedLanguageModel,
        sample: TrialSample,
        candidates: Sequence[Candidate],
        watch: Watch | None,
    ) -> None:
        generation = sample.generation
        self._teacher, self._sample, self._candidates, self._watch = teacher, sample, candidates, watch
        sparse = dict.fromkeys(one.policy for one in candidates if one.policy.kind != "dense")
        self._tallies = {policy: PolicyTally(policy, generation) for policy in sparse}
        codecs = [one.codec for one in candidates if one.policy.kind == "dense"]
        self._dense = DenseTally(sample.store_of(DensePolicy(), candidates[0].codec), codecs)
        self._goes_dense = bool(codecs) or watch is not None
        self._whole, self._nats = LossTally(), 0.0
        self._places: list[npt.NDArray[np.int64]] = []
        self._keys: dict[AnyPolicy, Keys | None] = {}
        cached = max(2, _CACHED_BYTES // (4 * generation.vocab))
        is_cpu = teacher.spec.device == "cpu"
        self._slice_positions = cached if is_cpu else teacher.spec.teacher.chunk_positions

    def begin(self, ran: _RunBatch) -> None:
        """Takes up the positions of another batch."""
        self._ran = ran
        self._places.append(ran.batch.places_P)
        rows, found = self._sample.rows, self._sample.rows.positions()
        vocab = self._sample.generation.vocab
        self._keys = {
            policy: find_positions(rows, ran.indices_B, found, Truncation(policy, vocab)).keys_P
            for policy in self._tallies
            if isinstance(policy, SampledPolicy | HybridPolicy)
        }

    def add(self, logits_NW: Tensor, start: int) -> None:
        """Adds the positions of the batch from ``start`` on."""
        for part, piece in self._cut(logits_NW, start, self._slice_positions):
            self._check_finite(piece, part)
            self._whole.bins.add(piece.whole_N, piece.whole_N, piece.is_hit_N)
            goals_N1 = piece.log_probs_NV.gather(1, piece.targets_N[:, None])
            self._nats -= float(goals_N1.sum(dtype=torch.float64))
            for policy, tally in self._tallies.items():
                keys_P = self._keys.get(policy)
                tally.add(piece, None if keys_P is None else keys_P[part])
        if self._goes_dense:
            for part, piece in self._cut(logits_NW, start, _DENSE_POSITIONS):
                exact, decoded = self._dense.add(piece)
                if self._watch is not None:
                    self._watch(DensePiece(self._ran.batch.places_P[part], exact, decoded))

    def finish(self, forward_s: float) -> TrialOutcome:
        """Encodes what was kept."""
        order: npt.NDArray[np.int64] = np.argsort(np.concatenate(self._places), kind="stable")
        found: dict[Candidate, CandidateOutcome] = {}
        for policy, tally in self._tallies.items():
            kept = take_positions(concatenate_kept(tally.pieces), order)
            result = LanguageResult(
                kept,
                self._sample.rows.positions()[1],
                np.ones(len(self._sample.rows.example_ids), bool),
                0,
                0.0,
            )
            for one in self._candidates:
                if one.policy == policy:
                    found[one] = self._encode(one, tally, result)
        # Rows differ in their entries alone, whatever the codec.
        other = next(iter(found.values()))
        for one in self._candidates:
            if one.policy.kind == "dense":
                found[one] = self._finish_dense(one, other)
        perplexity = math.exp(min(self._nats / len(order), 700.0))
        outcomes = tuple(found[one] for one in self._candidates)
        return TrialOutcome(outcomes, forward_s, perplexity, self._whole.bins.error())

    def _cut(self, logits_NW: Tensor, start: int, size: int) -> Iterator[tuple[slice, Slice]]:
        """Yields some positions at a time, and where they lie in the batch."""
        for first in range(0, len(logits_NW), size):
            some_NW = logits_NW[first : first + size]
            part = slice(start + first, start + first + len(some_NW))
            targets_N = torch.from_numpy(self._ran.batch.targets_P[part]).to(some_NW.device)
            yield part, Slice.of(some_NW, targets_N, self._sample.generation.vocab)

    def _check_finite(self, piece: Slice, part: slice) -> None:
        if np.isfinite(piece.whole_N).all():
            return
        place = self._ran.batch.places_P[part][~np.isfinite(piece.whole_N)][0]
        bounds = self._sample.rows.positions()[1]
        chunk = self._sample.rows.example_ids[int(np.searchsorted(bounds, place, side="right")) - 1]
        raise TeacherError(
            f"its logits of chunk {chunk} are not numbers; try dtype: float32, or leave the document out",
            teacher=self._teacher.spec.teacher.name,
        )

    def _encode(self, one: Candidate, tally: PolicyTally, result: LanguageResult) -> CandidateOutcome:
        sample, kept = self._sample, result.kept
        generation = sample.store_of(one.policy, one.codec)
        made: EncodedSample = encode_sample(
            sample.table, sample.rows.chunks, result, generation, sample.batch_rows
        )
        num = kept.entries.num_positions
        variation, divergence = rounding(kept.entries, made.decoded.entries)
        return CandidateOutcome(
            candidate=one,
            sizes=made.sizes,
            mean_kept=len(kept.entries.ids) / num,
            missed_mass=tally.missed / num,
            quantisation=(variation / num, divergence / num),
            seconds=tally.seconds + made.seconds,
            losses=_average(tally.losses, num),
            decoded=made.decoded,
        )

    def _finish_dense(self, one: Candidate, other: CandidateOutcome) -> CandidateOutcome:
        """Makes the outcome of the dense policy; ``other`` is that of another one."""
        num, dense = other.sizes.num_positions, self._dense
        variation, divergence = dense.roundings[one.codec] / num
        return CandidateOutcome(
            candidate=one,
            sizes=other.sizes.with_entries(
                dense.entry_bytes[one.codec], self._sample.store_of(one.policy, one.codec)
            ),
            mean_kept=float(self._sample.generation.vocab),
            missed_mass=0.0,
            quantisation=(float(variation), float(divergence)),
            seconds=dense.seconds + dense.encode_s[one.codec],
            losses=_average(dense.losses, num),
            decoded=None,
        )


def _average(tallies: dict[LossName, LossTally], num: int) -> dict[LossName, LossOutcome]:
    return {
        loss: LossOutcome(
            total_variation=float(tally.sums[0]) / num,
            kl_to_full=float(tally.sums[1]) / num,
            kl_from_full=float(tally.sums[2]) / num,
            calibration_error=tally.bins.error(),
        )
        for loss, tally in tallies.items()
    }
