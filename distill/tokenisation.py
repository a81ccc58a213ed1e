"""Running the student's tokenizer over a corpus part.

Invariants (tests/distill/test_tokens.py):
    1. The tokenizer's key covers everything that changes its output, and not the padding and
       truncation state that earlier calls left in it.
    2. Every row's texts are checked against its text hash before they are tokenised.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distill.corpus_part import CorpusPart
from distill.token_files import TokenFilesWriter
from schemas.digest import hash_value
from schemas.errors import DataError, RefusedError
from schemas.rows import hash_texts

_BATCH_ROWS = 1024


def describe_tokenizer(tokenizer: Any) -> str:
    """Returns the SHA-256 (64 hex digits) of what decides a transformers tokenizer's output."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        body = json.loads(backend.to_str())
        body.pop("truncation", None)
        body.pop("padding", None)
    else:
        body = {"vocab": tokenizer.get_vocab(), "special": str(tokenizer.special_tokens_map)}
    return hash_value(
        {
            "class": type(tokenizer).__name__,
            "tokenizer": body,
            "inputs": list(tokenizer.model_input_names),
            "truncation_side": tokenizer.truncation_side,
        }
    )


def tokenise_part(part: CorpusPart, tokenizer: Any, max_length: int, directory: Path) -> None:
    """Tokenises a part into ``ids.npy``, ``offsets.npy`` and ``firsts.npy`` of a new directory.

    Args:
        part: The mapped part, with one or two text columns.
        tokenizer: From transformers.
        max_length: Longest row in tokens, special tokens included.
        directory: An empty directory.

    Raises:
        RefusedError: A row's text is not that of its text hash.
        DataError: The tokenizer marks segments in a way that the cache does not hold.
    """
    with TokenFilesWriter(directory) as writer:
        for start in range(0, part.num_rows, _BATCH_ROWS):
            rows = part.table.slice(start, _BATCH_ROWS)
            writer.write(*_tokenise(_checked_texts(rows, part), tokenizer, max_length))


def _checked_texts(rows: pa.Table, part: CorpusPart) -> list[list[str]]:
    names = [name for name in ("text_0", "text_1") if name in rows.column_names]
    texts = [rows.column(name).to_pylist() for name in names]
    hashes = rows.column("text_hash").to_pylist()
    for place, (values, expected) in enumerate(zip(zip(*texts, strict=True), hashes, strict=True)):
        if hash_texts(values) != expected:
            raise RefusedError(
                f"{part.source.rows}: the text of example {rows.column('example_id')[place].as_py()} is not "
                "that of its text hash: the corpus was changed; run `tmkd precompute` again"
            )
    return texts


def _tokenise(
    texts: list[list[str]], tokenizer: Any, max_length: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    encoded = tokenizer(
        *texts,
        truncation="longest_first",
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=True,
    )
    ids = encoded["input_ids"]
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    flat = np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(lengths.sum()))
    if "token_type_ids" not in tokenizer.model_input_names:
        return flat, lengths, lengths.astype(np.int32)
    types = np.fromiter(itertools.chain.from_iterable(encoded["token_type_ids"]), np.int32, len(flat))
    return flat, lengths, _first_segments(types, lengths)


def _first_segments(types: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Returns each row's number of leading tokens of type 0; the rest must be of type 1."""
    ends = np.cumsum(lengths)
    totals = np.concatenate([[0], np.cumsum(types)])
    firsts = lengths - (totals[ends] - totals[ends - lengths])
    within = np.arange(len(types)) - np.repeat(ends - lengths, lengths)
    if not np.array_equal(types, within >= np.repeat(firsts, lengths)):
        raise DataError("the student's tokenizer marks segments otherwise than 0...0 1...1")
    return firsts.astype(np.int32)
