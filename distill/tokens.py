"""A corpus part tokenised for the student: done once, kept in mapped files, padded into batches.

A cache entry is a directory named by part fingerprint, tokenizer, maximum length and layout version:
``ids.npy`` (int32, all rows one after another), ``offsets.npy`` (int64[R + 1]), ``firsts.npy`` (int32[R],
tokens of the first segment) and ``tokens.json``, which holds their hashes.

Shapes: R rows of the part, B rows of a batch, L tokens of the batch's longest row.

Invariants (tests/distill/test_tokens.py):
    1. A batch is what the tokenizer itself makes of the rows' texts, truncated ``longest_first``.
    2. An entry appears whole or not at all, whoever races for it; a damaged one is made again.
    3. Texts that are not those of their text hashes are refused.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distill.corpus_part import CorpusPart
from distill.token_files import TokenFiles, TokenFilesError
from distill.tokenisation import describe_tokenizer, tokenise_part
from schemas.digest import hash_value, sync_directory
from schemas.errors import DataError, ResourceError

LAYOUT_VERSION = 1

_LOG = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Padding:
    """How a tokenizer pads.

    Attributes:
        pad_id, pad_type_id: Ids of padding.
        left: Whether padding comes first.
        token_types: Whether the model reads ``token_type_ids``.
    """

    pad_id: int
    pad_type_id: int
    left: bool
    token_types: bool

    @classmethod
    def of(cls, tokenizer: Any) -> Padding:
        """Reads a transformers tokenizer.

        Raises:
            DataError: It has no padding token.
        """
        if tokenizer.pad_token_id is None:
            raise DataError("the student's tokenizer has no padding token; set its pad_token")
        return cls(
            pad_id=int(tokenizer.pad_token_id),
            pad_type_id=int(tokenizer.pad_token_type_id),
            left=tokenizer.padding_side == "left",
            token_types="token_type_ids" in tokenizer.model_input_names,
        )


class CorpusTokens:
    """The tokens of a corpus's parts, by row of the corpus. Use ``CorpusTokens.open``.

    Attributes:
        parts: Mapped files, part after part.
        padding: How batches are padded.
    """

    def __init__(self, parts: tuple[TokenFiles, ...], padding: Padding) -> None:
        self.parts = parts
        self.padding = padding
        self._bounds = np.cumsum([0, *(part.num_rows for part in parts)], dtype=np.int64)

    @classmethod
    def open(
        cls, parts: Sequence[CorpusPart], tokenizer: Any, max_length: int, cache: str | Path
    ) -> CorpusTokens:
        """Opens the cached tokens of each part, tokenising the parts that have none.

        Args:
            parts: The corpus.
            tokenizer: The student's, from transformers.
            max_length: Longest row in tokens, special tokens included.
            cache: Directory of cache entries; several processes may use it at once.

        Raises:
            DataError: A text is not that of its text hash, or the tokenizer cannot be used.
            ResourceError: The cache cannot be written.
        """
        padding = Padding.of(tokenizer)
        key = describe_tokenizer(tokenizer)
        opened = tuple(_open_part(part, tokenizer, key, max_length, Path(cache)) for part in parts)
        return cls(opened, padding)

    @property
    def num_rows(self) -> int:
        """Rows of all parts."""
        return int(self._bounds[-1])

    def lengths(self, rows: Rows) -> Rows:
        """Returns the number of tokens of each row, int64[B]."""
        lengths = np.empty(len(rows), np.int64)
        for part, places, local in self._by_part(rows):
            lengths[places] = part.offsets[local + 1] - part.offsets[local]
        return lengths

    def collate(self, rows: Rows) -> dict[str, torch.Tensor]:
        """Copies rows into a batch, padded to its longest row.

        Args:
            rows: int64[B], rows of the corpus; B >= 1.

        Returns:
            ``input_ids`` and ``attention_mask``, int64[B, L], and ``token_type_ids`` where the model
            reads them.
        """
        lengths = self.lengths(rows)
        longest = int(lengths.max())
        columns = np.arange(longest, dtype=np.int64)
        if self.padding.left:
            columns = columns - (longest - lengths)[:, None]
            mask_BL = columns >= 0
        else:
            mask_BL = columns < lengths[:, None]
        tokens_BL = np.empty(mask_BL.shape, np.int32)
        firsts = np.empty(len(rows), np.int64)
        for part, places, local in self._by_part(rows):
            firsts[places] = part.firsts[local]
            here_BL = columns if columns.ndim == 1 else columns[places]
            # Beyond a row's end lie its neighbour's tokens, which the mask hides.
            tokens_BL[places] = part.ids.take(part.offsets[local][:, None] + here_BL, mode="clip")
        input_ids_BL = np.where(mask_BL, tokens_BL, np.int64(self.padding.pad_id))
        batch = {
            "input_ids": torch.from_numpy(input_ids_BL),
            "attention_mask": torch.from_numpy(mask_BL.astype(np.int64)),
        }
        if self.padding.token_types:
            types_BL = np.where(mask_BL, columns >= firsts[:, None], self.padding.pad_type_id)
            batch["token_type_ids"] = torch.from_numpy(types_BL.astype(np.int64, copy=False))
        return batch

    def _by_part(self, rows: Rows) -> list[tuple[TokenFiles, Rows | slice, Rows]]:
        """Returns of each part touched: the part, places in ``rows``, rows of the part."""
        if len(self.parts) == 1:
            return [(self.parts[0], slice(None), rows)]
        owners = np.searchsorted(self._bounds, rows, side="right") - 1
        found: list[tuple[TokenFiles, Rows | slice, Rows]] = []
        for owner in np.unique(owners).tolist():
            places = np.flatnonzero(owners == owner)
            found.append((self.parts[owner], places, rows[places] - self._bounds[owner]))
        return found


def _open_part(
    part: CorpusPart, tokenizer: Any, tokenizer_key: str, max_length: int, cache: Path
) -> TokenFiles:
    identity = {
        "layout": LAYOUT_VERSION,
        "part": part.source.fingerprint,
        "tokenizer": tokenizer_key,
        "max_length": max_length,
    }
    directory = cache / hash_value(identity)[:32]
    if directory.is_dir():
        try:
            return TokenFiles.open(directory, identity)
        except TokenFilesError as error:
            _LOG.warning("tokenising %s again: %s", part.source.rows, error)
            _discard(directory)
    temporary = cache / f".{directory.name}.{uuid.uuid4().hex}.tmp"
    try:
        temporary.mkdir(parents=True)
        tokenise_part(part, tokenizer, max_length, temporary)
        TokenFiles.seal(temporary, identity)
        _publish(temporary, directory)
    except OSError as error:
        raise ResourceError(f"{cache}: the student's tokens cannot be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        return TokenFiles.open(directory, identity)
    except TokenFilesError as error:
        raise DataError(f"{directory}: cannot be read back ({error})") from error


def _publish(temporary: Path, directory: Path) -> None:
    try:
        temporary.rename(directory)
    except OSError:
        # Renaming onto a directory that is not empty fails: another rank was first, with the same content.
        if not directory.is_dir():
            raise
    sync_directory(directory.parent)


def _discard(directory: Path) -> None:
    """Removes a damaged entry; maps that others have of it stay valid."""
    aside = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.damaged")
    try:
        directory.rename(aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)
