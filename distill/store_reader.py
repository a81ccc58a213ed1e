"""A logit store, read by rows of its corpus part (DESIGN sections 4 and 5).

Shapes: B rows asked for, C classes.

Invariants:
    1. Those of ``distill.row_store``.
    2. What ``gather`` returns is a copy; mapped memory is never handed out writable
       (tests/distill/test_store_reader.py).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from distill.row_store import Rows, StoreReader
from distill.shard_layout import BatchColumns, ShardLayout, logit_layout
from schemas.records import StoreIdentity

__all__ = ["BatchColumns", "LogitStore"]


class LogitStore(StoreReader[BatchColumns]):
    """One teacher's logits over one corpus part. Use ``LogitStore.open``."""

    level: Literal["classification", "token"] = "classification"

    @classmethod
    def make_layout(cls, identity: StoreIdentity, root: str) -> ShardLayout[BatchColumns]:
        """Returns the layout of shards with the identity's labels."""
        del root
        return logit_layout(len(identity.native_labels))

    @property
    def native_labels(self) -> tuple[str, ...]:
        """The teacher's label names in the order of its logits."""
        return self.identity.native_labels

    @property
    def num_labels(self) -> int:
        """C."""
        return len(self.identity.native_labels)

    def gather(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Copies the logits of ``rows``.

        Args:
            rows: int64[B], row numbers of the part, in any order.

        Returns:
            float32[B, C], raw logits in the native label order.

        Raises:
            DataError: A row is out of range or excluded.
            DamagedStoreError: A touched batch does not match its hash.
        """
        result = np.empty((len(rows), self.num_labels), np.float32)
        for positions, within, columns in self.locate(rows):
            result[positions] = columns.logits_RC[within]
        return result
