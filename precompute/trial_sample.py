"""What a trial of keep policies takes and gives: plain values.

Shapes: R chunks of the sample, P positions of them, N positions of a piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from precompute.candidates import Candidate
from precompute.language_forward import ChunkRows
from precompute.trial_bytes import RowBytes
from precompute.truncate import KeptPositions
from schemas.kept_entries import KeptEntries
from schemas.language import CodecName, LossName
from schemas.policy import AnyPolicy
from schemas.token_generation import TokenGeneration


@dataclass(frozen=True)
class TrialSample:
    """Chunks to try policies on.

    Attributes:
        table: ``ordinal``, ``example_id`` and ``text_hash`` of the R chunks.
        rows: The chunks, with a position each at least.
        generation: Of the recipe's own store; policy and codec are replaced by those of each candidate.
        batch_rows: Rows of a record batch.
    """

    table: pa.Table
    rows: ChunkRows
    generation: TokenGeneration
    batch_rows: int

    def store_of(self, policy: AnyPolicy, codec: CodecName) -> TokenGeneration:
        """Returns the generation of a store with another policy and codec."""
        return self.generation.model_copy(update={"policy": policy, "codec": codec})


@dataclass(frozen=True, slots=True)
class DensePiece:
    """Whole distributions of N positions.

    Attributes:
        places_N: int64, their places among the sample's P.
        exact: As the teacher gives them.
        decoded: As a dense store in a codec would, for the codecs of dense candidates.
    """

    places_N: npt.NDArray[np.int64]
    exact: KeptPositions
    decoded: Mapping[CodecName, KeptEntries]


@dataclass(frozen=True, slots=True)
class LossOutcome:
    """Means over the sample; see ``schemas.keep_trial.LossTrial``."""

    total_variation: float
    kl_to_full: float
    kl_from_full: float
    calibration_error: float


@dataclass(frozen=True, slots=True)
class CandidateOutcome:
    """One candidate over the sample.

    Attributes:
        sizes: Of its rows.
        mean_kept, missed_mass: Of a position.
        quantisation: Total variation and divergence of the codec, means.
        seconds: Policy and codec took.
        losses: By loss.
        decoded: What a reader of its store gets, in the sample's order; None for the dense policy.
    """

    candidate: Candidate
    sizes: RowBytes
    mean_kept: float
    missed_mass: float
    quantisation: tuple[float, float]
    seconds: float
    losses: Mapping[LossName, LossOutcome]
    decoded: KeptPositions | None


@dataclass(frozen=True, slots=True)
class TrialOutcome:
    """All candidates over the sample.

    Attributes:
        forward_s: What the model and its head took.
        perplexity: Of the teacher.
        calibration_error: Of its whole distributions.
    """

    candidates: tuple[CandidateOutcome, ...]
    forward_s: float
    perplexity: float
    calibration_error: float
