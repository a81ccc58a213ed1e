"""The chunks of an evaluation corpus, all parts together, as every model is measured on them.

Shapes: R chunks, P positions of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from precompute.chunking import ChunkedPart
from precompute.language_forward import ChunkRows
from schemas.chunks import ChunkSpec, open_chunks, view_chunks
from schemas.digest import hash_value
from schemas.errors import DataError
from schemas.kept_entries import Offsets

OnBadRow = Literal["fail", "exclude"]


@dataclass(frozen=True, slots=True, eq=False)
class EvaluatedText:
    """An evaluation corpus.

    Attributes:
        corpus: Its name.
        spec: What made the chunks.
        rows: R chunks.
        targets_P: The tokens to predict, int32.
        bounds: int64[R + 1]: the positions of each chunk.
        fingerprint: Of tokens, loss masks and ``spec``.
        on_bad_row: What to do with a chunk for which a model gives logits that are not numbers.
    """

    corpus: str
    spec: ChunkSpec
    rows: ChunkRows
    targets_P: npt.NDArray[np.int32]
    bounds: Offsets
    fingerprint: str
    on_bad_row: OnBadRow

    @classmethod
    def open(cls, corpus: str, parts: Sequence[ChunkedPart], on_bad_row: OnBadRow = "fail") -> EvaluatedText:
        """Reads a corpus's chunks.

        Raises:
            DataError: A file of chunks is damaged, or parts were not made alike.
        """
        spec = parts[0].spec
        tables = []
        for part in parts:
            found, table = open_chunks(part.rows_path)
            if found != spec:
                raise DataError(f"{part.rows_path}: its chunks were made in another way than planned")
            tables.append(table)
        table = pa.concat_tables(tables)
        rows = ChunkRows(
            chunks=view_chunks(table),
            example_ids=tuple(table.column("example_id").to_pylist()),
            objective_shift=1 if spec.objective == "causal" else 0,
            mask_token=spec.mask.token if spec.mask else None,
        )
        positions_P, bounds = rows.positions()
        return cls(
            corpus=corpus,
            spec=spec,
            rows=rows,
            targets_P=rows.chunks.input_ids[positions_P + rows.objective_shift],
            bounds=bounds,
            fingerprint=hash_value([[part.fingerprint for part in parts], spec.model_dump(mode="json")]),
            on_bad_row=on_bad_row,
        )

    @property
    def num_positions(self) -> int:
        """P."""
        return len(self.targets_P)
