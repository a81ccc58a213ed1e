"""Codecs of kept entries, by name. A store's schema names its codec and version.

======== ============================================= =================== =======================
codec    ids                                           values              meant for
======== ============================================= =================== =======================
fixed    uint16 or uint32                              float16             fast local disks
packed   ceil(log2 V) bits                             float16             fast, larger vocabularies
compact  Elias-Fano, the high parts under zstd         8 bits, zstd        object storage
======== ============================================= =================== =======================

Shapes: B rows (chunks of a document), N positions and S entries of all of them, V true vocabulary.

Invariants (tests/schemas/test_codec.py):
    1. Every codec brings back offsets, ids and counts exactly and values within its stated bound,
       whatever the policy, positions without entries included.
    2. Whatever bytes come in, ``decode`` returns entries whose ids lie in the vocabulary and whose
       log-probabilities are at or below 0, or raises ``CodecError``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas import codec_compact, codec_fixed, codec_packed
from schemas.entry_columns import Columns
from schemas.entry_layout import CodecError, EntryLayout
from schemas.kept_entries import Integers, KeptEntries, Offsets
from schemas.policy import most_kept

__all__ = ["CODECS", "Codec", "CodecError", "CodecName", "EntryLayout"]

CodecName: TypeAlias = Literal["fixed", "packed", "compact"]


@dataclass(frozen=True, slots=True)
class Codec:
    """One way to lay kept entries out in columns.

    Attributes:
        name: In the schema's metadata.
        version: Likewise; a reader refuses one that it does not know.
        fields: ``layout -> Arrow fields``, each with its meaning and units.
    """

    name: CodecName
    version: int
    fields: Callable[[EntryLayout], list[pa.Field]]
    _encode: Callable[[KeptEntries, Offsets, EntryLayout], dict[str, pa.Array]]
    _decode: Callable[[Columns, Offsets, EntryLayout, npt.NDArray[np.float32]], KeptEntries]

    def encode(self, entries: KeptEntries, rows: Offsets, layout: EntryLayout) -> dict[str, pa.Array]:
        """Encodes the entries of a record batch.

        Args:
            entries: Of N positions.
            rows: int64[B + 1]: row b has the positions ``[rows[b], rows[b + 1])``.
            layout: Policy and vocabulary.

        Returns:
            One array of B rows for each of ``fields``.

        Raises:
            CodecError: The entries are not those of the layout: an id is out of range or out of order, a
                value is NaN, or parts are missing.
        """
        check_entries(entries, rows, layout)
        return self._encode(entries, rows, layout)

    def view(
        self, columns: Columns, rows: Offsets, layout: EntryLayout, log_tail: npt.NDArray[np.float32]
    ) -> KeptEntries:
        """Decodes the entries of a record batch, with ids and values as narrow as they are stored.

        For ``fixed`` both are views of the columns' memory, not to be written to: widen them in torch.

        Args:
            columns: Arrays of B rows, at least those of ``fields``; slices are fine.
            rows: int64[B + 1]: the positions of each row.
            layout: Policy and vocabulary.
            log_tail: float32[N]; only ``hybrid`` looks at it.

        Raises:
            CodecError: The columns are not what ``encode`` writes.
        """
        if len(log_tail) != rows[-1]:
            raise CodecError(f"log_tail has {len(log_tail)} positions, expected {rows[-1]}")
        try:
            return self._decode(columns, rows, layout, log_tail)
        except KeyError as error:
            raise CodecError(f"codec {self.name}: column {error.args[0]} is missing") from error

    def decode(
        self, columns: Columns, rows: Offsets, layout: EntryLayout, log_tail: npt.NDArray[np.float32]
    ) -> KeptEntries:
        """Decodes the entries of a record batch into int32 ids and float32 values; see ``view``."""
        return self.view(columns, rows, layout, log_tail).widen()


CODECS: Mapping[str, Codec] = MappingProxyType(
    {
        "fixed": Codec("fixed", 1, codec_fixed.fields, codec_fixed.encode, codec_fixed.decode),
        "packed": Codec("packed", 1, codec_packed.fields, codec_packed.encode, codec_packed.decode),
        "compact": Codec("compact", 1, codec_compact.fields, codec_compact.encode, codec_compact.decode),
    }
)


def check_entries(entries: KeptEntries, rows: Offsets, layout: EntryLayout) -> None:
    """Checks that entries are those of a policy over a vocabulary: bounds, counts, order of the ids.

    Args:
        entries: Of N positions.
        rows: int64[B + 1], from 0 to N.
        layout: Policy and vocabulary.

    Raises:
        CodecError: They are not.
    """
    counts = entries.counts
    if len(rows) < 1 or rows[0] != 0 or rows[-1] != entries.num_positions or (np.diff(rows) < 0).any():
        raise CodecError(f"rows do not cut {entries.num_positions} positions")
    if (counts < 0).any() or entries.offsets[0] != 0 or entries.offsets[-1] != len(entries.ids):
        raise CodecError("offsets do not cut the entries")
    if len(counts) and int(counts.max()) > most_kept(layout.policy, layout.vocab):
        raise CodecError(f"a position keeps {counts.max()} entries, more than the policy allows")
    if layout.is_dense and (counts != layout.vocab).any():
        raise CodecError("a dense position does not have all ids")
    if len(entries.log_probs) != len(entries.ids) or np.isnan(entries.log_probs).any():
        raise CodecError("log-probabilities are missing or not numbers")
    if layout.is_hybrid != (entries.num_head is not None):
        raise CodecError(f"num_head and policy {layout.policy.kind} do not go together")
    if (layout.draws is not None) != (entries.draws is not None):
        raise CodecError(f"draws and policy {layout.policy.kind} do not go together")
    _check_order(entries, layout.vocab)


def _check_order(entries: KeptEntries, vocab: int) -> None:
    if not len(entries.ids):
        return
    ids: Integers = entries.ids.astype(np.int64)
    if int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise CodecError(f"a kept id is out of range; the vocabulary has {vocab} tokens")
    # One increasing sequence over positions, or over heads and tails.
    parts = np.repeat(np.arange(entries.num_positions), entries.counts) * 2 + (~entries.head_mask()).astype(
        np.int64
    )
    if (np.diff(parts * vocab + ids) <= 0).any():
        raise CodecError("kept ids of a position do not increase")
