"""Packing: rows in the order of reading, put one after another into training sequences.

Rows of a sequence keep apart in a causal model by position ids that start at 0 for each row, with no
attention mask and no cache (with either, transformers lets them see each other: 0.66 in the logits of a
small Llama); in a bidirectional model by a mask of blocks.

Shapes: R rows in order, B sequences, L tokens of the longest one, T tokens of all rows.

Invariants (tests/distill/test_packing.py):
    1. Packs are runs of the order: they depend on order, lengths and limit alone, and from a pack's first
       row on they are what they were.
    2. Every row lies whole in one pack; no pack but that of a single row could take the row after it.
    3. A model sees a row of a pack as it sees the row alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Rows = npt.NDArray[np.int64]

NO_TOKEN = 0
"""Segment of padding."""


def cut_packs(lengths: Rows, max_length: int, *, pack: bool = True) -> Rows:
    """Cuts rows in order into packs: each takes rows until the next one does not fit.

    Args:
        lengths: int64[R], tokens of each row; none is above ``max_length``.
        max_length: Most tokens of a pack.
        pack: False: each row is its own pack.

    Returns:
        int64[P + 1], the rows at which packs start, from 0 to R.
    """
    if not pack:
        return np.arange(len(lengths) + 1, dtype=np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    following = np.searchsorted(ends, ends[:-1] + max_length, side="right") - 1
    after = following.tolist()
    bounds = [0]
    while bounds[-1] < len(lengths):
        bounds.append(after[bounds[-1]])
    return np.array(bounds, np.int64)


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """Where the tokens of rows lie in B sequences.

    Attributes:
        shape: (B, L).
        places: int64[T], of each token its place in the flattened sequences.
        positions_BL: int64, counted from 0 in each row; 0 for padding, which makes each its own row.
        segments_BL: int64, 1, 2, ... for the rows of a sequence, ``NO_TOKEN`` for padding.
    """

    shape: tuple[int, int]
    places: Rows
    positions_BL: Rows
    segments_BL: Rows

    @classmethod
    def lay_out(cls, lengths: Rows, bounds: Rows) -> PackedTokens:
        """Lays rows out.

        Args:
            lengths: int64[R], tokens of each row.
            bounds: int64[B + 1]: sequence b has the rows ``[bounds[b], bounds[b + 1])``.
        """
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        pack_starts = ends[bounds[:-1]]
        shape = (len(bounds) - 1, int(np.diff(ends[bounds]).max(initial=0)))
        packs = np.repeat(np.arange(shape[0]), np.diff(bounds))
        columns = ends[:-1] - pack_starts[packs]
        within = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)
        places = np.repeat(packs * shape[1] + columns, lengths) + within
        positions_BL = np.zeros(shape, np.int64)
        segments_BL = np.full(shape, NO_TOKEN, np.int64)
        positions_BL.reshape(-1)[places] = within
        numbers = np.arange(len(lengths)) - bounds[:-1][packs] + 1
        segments_BL.reshape(-1)[places] = np.repeat(numbers, lengths)
        return cls(shape, places, positions_BL, segments_BL)


def block_mask(segments_BL: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns what is added to attention scores so that tokens see those of their own row alone.

    Args:
        segments_BL: From ``PackedTokens``.
        dtype: That of the hidden states.

    Returns:
        ``[B, 1, L, L]``: 0 within a row (padding sees padding: a softmax over nothing is NaN), else the
        least finite number.
    """
    apart_BLL = segments_BL[:, :, None] != segments_BL[:, None, :]
    mask_BLL = torch.zeros(apart_BLL.shape, dtype=dtype, device=segments_BL.device)
    return mask_BLL.masked_fill_(apart_BLL, torch.finfo(dtype).min)[:, None]
