"""Kept positions of several pieces as those of one, and some of them in another order.

Shapes: N positions, M of them taken, S kept entries.

Invariants (tests/precompute/test_language_forward.py):
    1. Each position keeps its entries and numbers, whatever is before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from precompute.truncate import KeptPositions
from schemas.kept_entries import KeptEntries, PositionStats, offsets_of


def concatenate_kept(pieces: Sequence[KeptPositions]) -> KeptPositions:
    """Returns the positions of all pieces, of which there is one at least, one after another."""
    entries = [piece.entries for piece in pieces]
    first = entries[0]
    draws = first.draws
    if draws is not None:
        found = [_given(item.draws) for item in entries]
        draws = replace(
            draws,
            counts=np.concatenate([item.counts for item in found]),
            log_norm=np.concatenate([item.log_norm for item in found]),
        )
    is_hybrid = first.num_head is not None
    return KeptPositions(
        KeptEntries(
            offsets=offsets_of(np.concatenate([item.counts for item in entries])),
            ids=np.concatenate([item.ids for item in entries]),
            log_probs=np.concatenate([item.log_probs for item in entries]),
            num_head=np.concatenate([_given(item.num_head) for item in entries]) if is_hybrid else None,
            tau=np.concatenate([_given(item.tau) for item in entries]) if is_hybrid else None,
            draws=draws,
        ),
        PositionStats(
            *(
                np.concatenate([getattr(piece.stats, field.name) for piece in pieces])
                for field in fields(PositionStats)
            )
        ),
        np.concatenate([piece.is_finite_N for piece in pieces]),
    )


def take_positions(kept: KeptPositions, places_M: npt.NDArray[np.int64]) -> KeptPositions:
    """Returns the positions at ``places_M``, in that order."""
    entries = kept.entries
    counts_M = entries.counts[places_M]
    offsets = offsets_of(counts_M)
    sources_S = np.arange(offsets[-1]) + np.repeat(entries.offsets[places_M] - offsets[:-1], counts_M)
    draws = entries.draws
    if draws is not None:
        draws = replace(draws, counts=draws.counts[sources_S], log_norm=draws.log_norm[places_M])
    return KeptPositions(
        KeptEntries(
            offsets=offsets,
            ids=entries.ids[sources_S],
            log_probs=entries.log_probs[sources_S],
            num_head=None if entries.num_head is None else entries.num_head[places_M],
            tau=None if entries.tau is None else entries.tau[places_M],
            draws=draws,
        ),
        PositionStats(*(getattr(kept.stats, field.name)[places_M] for field in fields(PositionStats))),
        kept.is_finite_N[places_M],
    )


def slice_positions(kept: KeptPositions, start: int, stop: int) -> KeptPositions:
    """Returns the positions ``[start, stop)``, which share the memory of all."""
    entries, stats = kept.entries, kept.stats
    some = slice(start, stop)
    inner = slice(int(entries.offsets[start]), int(entries.offsets[stop]))
    draws = entries.draws
    if draws is not None:
        draws = replace(draws, counts=draws.counts[inner], log_norm=draws.log_norm[some])
    return KeptPositions(
        KeptEntries(
            offsets=entries.offsets[start : stop + 1] - entries.offsets[start],
            ids=entries.ids[inner],
            log_probs=entries.log_probs[inner],
            num_head=None if entries.num_head is None else entries.num_head[some],
            tau=None if entries.tau is None else entries.tau[some],
            draws=draws,
        ),
        PositionStats(*(getattr(stats, field.name)[some] for field in fields(PositionStats))),
        kept.is_finite_N[some],
    )


def _given(value: Any) -> Any:
    if value is None:
        raise ValueError("pieces were made by different policies")
    return value
