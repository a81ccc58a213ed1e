"""What the columns of kept entries depend on besides the codec, and the error of all codecs.

Invariants:
    1. Dtypes follow from policy and vocabulary alone, so that readers need nothing but the schema's
       metadata (tests/schemas/test_codec.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from schemas.policy import AnyPolicy, DensePolicy, HybridPolicy, SampledPolicy, most_kept

_UINT16_VALUES = 65536


class CodecError(ValueError):
    """Columns that are not what the codec wrote, or entries that it cannot carry."""


@dataclass(frozen=True, slots=True)
class EntryLayout:
    """Policy and vocabulary of a store.

    Attributes:
        policy: What is kept.
        vocab: V, the true vocabulary; ids lie in ``[0, V)``.
    """

    policy: AnyPolicy
    vocab: int

    @property
    def is_dense(self) -> bool:
        """Whether every id is kept, so that none is stored."""
        return isinstance(self.policy, DensePolicy)

    @property
    def is_hybrid(self) -> bool:
        """Whether positions have a sampled tail."""
        return isinstance(self.policy, HybridPolicy)

    @property
    def draws(self) -> SampledPolicy | None:
        """The policy, if it is ``sampled``."""
        return self.policy if isinstance(self.policy, SampledPolicy) else None

    @property
    def id_dtype(self) -> np.dtype[np.unsignedinteger]:
        """The narrowest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.vocab <= _UINT16_VALUES else np.uint32)

    @property
    def id_bits(self) -> int:
        """``ceil(log2 V)``, at least 1."""
        return max(1, (self.vocab - 1).bit_length())

    @property
    def count_dtype(self) -> np.dtype[np.unsignedinteger]:
        """The narrowest of uint16 and uint32 that holds the entries of a position."""
        kept = most_kept(self.policy, self.vocab)
        return np.dtype(np.uint16 if kept < _UINT16_VALUES else np.uint32)
