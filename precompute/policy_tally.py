"""Running sums of a trial: what each policy keeps of positions, and how far that is from the whole.

Shapes: N positions of a slice, W the model's padded vocabulary, V true vocabulary.

Invariants (tests/precompute/test_keep_trial.py):
    1. Sums do not depend on slices or batches.
    2. Of dense positions nothing but sums stays.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from precompute.deviation import (
    USES,
    CalibrationBins,
    Distances,
    Doubles,
    Support,
    fitting_losses,
    rounding,
)
from precompute.draws import Keys
from precompute.trial_bytes import encode_positions
from precompute.truncate import KeptPositions, Truncation, keep_entries
from schemas.kept_entries import KeptEntries
from schemas.language import CodecName, LossName
from schemas.policy import AnyPolicy
from schemas.token_generation import TokenGeneration


@dataclass(frozen=True, slots=True)
class Slice:
    """Some positions of a batch.

    Attributes:
        logits_NW: Of the model.
        log_probs_NV: Their log-softmax over the true vocabulary.
        targets_N: int64, the tokens to predict.
        whole_N: p of the most probable token.
        is_hit_N: Whether that is the target.
    """

    logits_NW: Tensor
    log_probs_NV: Tensor
    targets_N: Tensor
    whole_N: Doubles
    is_hit_N: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, logits_NW: Tensor, targets_N: Tensor, vocab: int) -> Slice:
        """Normalises logits over the true vocabulary."""
        log_probs_NV = logits_NW[:, :vocab].float().log_softmax(dim=1)
        top = log_probs_NV.max(dim=1)
        whole_N = top.values.double().exp().cpu().numpy()
        return cls(logits_NW, log_probs_NV, targets_N, whole_N, (top.indices == targets_N).cpu().numpy())


@dataclass
class LossTally:
    """Sums of the distances that one loss's masses have."""

    sums: Doubles = field(default_factory=lambda: np.zeros(3))
    bins: CalibrationBins = field(default_factory=CalibrationBins.empty)

    def add(self, piece: Slice, found: Distances) -> None:
        """Adds positions."""
        self.sums += [found.total_variation.sum(), found.kl_to_full.sum(), found.kl_from_full.sum()]
        self.bins.add(piece.whole_N, found.confidence, piece.is_hit_N)


class PolicyTally:
    """One policy over the sample.

    Attributes:
        pieces: What it keeps, slice after slice.
        missed: Sum of the mass of tokens that are not kept.
        seconds: What keeping took.
        losses: By loss that fits the policy.
    """

    def __init__(self, policy: AnyPolicy, generation: TokenGeneration) -> None:
        self._truncation = Truncation(policy, generation.vocab, generation.grid)
        self.pieces: list[KeptPositions] = []
        self.missed = 0.0
        self.seconds = 0.0
        self.losses: dict[LossName, LossTally] = {loss: LossTally() for loss in fitting_losses(policy)}

    def add(self, piece: Slice, keys_N: Keys | None) -> KeptPositions:
        """Keeps the entries of a slice."""
        began = time.perf_counter()
        kept = keep_entries(piece.logits_NW, piece.targets_N, keys_N, self._truncation)
        self.seconds += time.perf_counter() - began
        support = Support.of(piece.log_probs_NV, kept.entries)
        self.missed += float(support.missed_mass().sum())
        for loss, tally in self.losses.items():
            tally.add(piece, USES[loss](support))
        self.pieces.append(kept)
        return kept


class DenseTally:
    """The dense policy over the sample: by codec, sums alone.

    Attributes:
        seconds: What keeping took.
        losses: Distances of 0, and the calibration of the whole distributions.
        entry_bytes, encode_s, roundings: By codec.
    """

    def __init__(self, generation: TokenGeneration, codecs: Iterable[CodecName]) -> None:
        self._generations = {codec: generation.model_copy(update={"codec": codec}) for codec in codecs}
        self._truncation = Truncation(generation.policy, generation.vocab, generation.grid)
        self.seconds = 0.0
        self.losses: dict[LossName, LossTally] = {"unbiased_kl": LossTally()}
        self.entry_bytes: dict[CodecName, int] = dict.fromkeys(self._generations, 0)
        self.encode_s: dict[CodecName, float] = dict.fromkeys(self._generations, 0.0)
        self.roundings: dict[CodecName, Doubles] = {codec: np.zeros(2) for codec in self._generations}

    def add(self, piece: Slice) -> tuple[KeptPositions, dict[CodecName, KeptEntries]]:
        """Returns whole distributions, exact and as each codec gives them back."""
        began = time.perf_counter()
        kept = keep_entries(piece.logits_NW, piece.targets_N, None, self._truncation)
        self.seconds += time.perf_counter() - began
        zeros_N = np.zeros(len(piece.whole_N))
        self.losses["unbiased_kl"].add(piece, Distances(zeros_N, zeros_N, zeros_N, piece.whole_N))
        decoded: dict[CodecName, KeptEntries] = {}
        for codec, generation in self._generations.items():
            began = time.perf_counter()
            num_bytes, decoded[codec] = encode_positions(kept, generation)
            self.encode_s[codec] += time.perf_counter() - began
            self.entry_bytes[codec] += num_bytes
            self.roundings[codec] += rounding(kept.entries, decoded[codec])
        return kept, decoded
