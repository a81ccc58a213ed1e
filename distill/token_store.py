"""A token-level store, read by rows (chunks) of its corpus part.

Shapes: B rows asked for, R rows of a batch, N stored positions of the rows asked for.

Invariants (tests/distill/test_token_store.py):
    1. Those of ``distill.row_store``; the schema of every shard names the codec, policy, vocabulary and
       grid of the store's identity.
    2. Rows come in the order asked for, whatever batches they lie in.
    3. Values are checked whenever they are decoded (``schemas.token_rows``, ``schemas.codec``), also
       where hashes match: ids lie in the vocabulary, log-probabilities are numbers at or below 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import pyarrow as pa

from distill.row_store import Rows, StoreReader
from distill.shard_layout import KeyColumns, ShardLayout, view_keys
from schemas.codec import CodecError
from schemas.errors import DamagedStoreError
from schemas.records import StoreIdentity
from schemas.token_generation import TokenGeneration, read_generation
from schemas.token_rows import TokenLayout, TokenRows, decode_token_rows, read_layout


@dataclass(frozen=True, slots=True)
class TokenColumns(KeyColumns):
    """One record batch of chunks.

    Attributes:
        batch: All of its columns.
    """

    batch: pa.RecordBatch


class TokenStore(StoreReader[TokenColumns]):
    """One language model's kept entries over one corpus part. Use ``TokenStore.open``."""

    level: Literal["classification", "token"] = "token"

    @classmethod
    def make_layout(cls, identity: StoreIdentity, root: str) -> ShardLayout[TokenColumns]:
        """Returns the layout of the shards that the identity describes.

        Raises:
            DamagedStoreError: It describes none.
        """
        schema = read_generation(identity, store=root).shard_schema()
        layout = read_layout(schema.metadata)

        def find_foreign(metadata: Mapping[bytes, bytes]) -> str | None:
            try:
                return None if read_layout(metadata) == layout else "its codec, policy or grid is another"
            except CodecError as error:
                return str(error)

        return ShardLayout(schema, _split, find_foreign=find_foreign)

    @cached_property
    def layout(self) -> TokenLayout:
        """Codec, policy, vocabulary and grid."""
        return read_layout(self._layout.schema.metadata)

    @cached_property
    def generation(self) -> TokenGeneration:
        """What the store says of its chunks and of what is kept."""
        return read_generation(self.identity, store=self.root)

    def gather(self, rows: Rows) -> TokenRows:
        """Decodes ``rows``.

        Args:
            rows: int64[B], row numbers of the part, in any order.

        Returns:
            The B rows in that order; ids and log-probabilities as narrow as they are stored. It may
            share mapped memory: it is not to be written to.

        Raises:
            DataError: A row is out of range or excluded.
            DamagedStoreError: A touched batch does not match its hash, or does not decode.
        """
        pieces: list[pa.RecordBatch] = [None] * len(rows)
        for positions, within, columns in self.locate(rows):
            for position, row in zip(positions.tolist(), within.tolist(), strict=True):
                pieces[position] = columns.batch.slice(row, 1)
        if not pieces:
            return self._decode(pa.RecordBatch.from_pylist([], schema=self._layout.schema))
        # Whole rows are copied: Arrow's ``take`` would gather lists number by number.
        return self._decode(pa.concat_batches(pieces))

    def _decode(self, batch: pa.RecordBatch) -> TokenRows:
        try:
            return decode_token_rows(batch, self.layout, narrow=True)
        except CodecError as error:
            raise DamagedStoreError(f"rows do not decode: {error}", store=self.root) from error


def _split(batch: pa.RecordBatch) -> TokenColumns:
    keys = view_keys(batch)
    return TokenColumns(keys.rows, keys.example_ids, keys.text_hashes, batch)
