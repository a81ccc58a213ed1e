"""What a token-level store keeps, and what that takes, for people.

Invariants (tests/cluster/test_token_store_check.py):
    1. Positions are counted by the lengths of columns: neither tokens nor entries are read.
"""

from __future__ import annotations

import contextlib
from typing import Any

from distill.token_store import TokenStore
from schemas.errors import DataError
from schemas.records import StoreIdentity
from schemas.storage.storage import StoreSource
from schemas.token_generation import read_generation


def describe_tokens(source: StoreSource, identity: StoreIdentity) -> dict[str, Any]:
    """Describes what a token-level store keeps, and what a position takes.

    Returns:
        ``num_positions`` and what follows from it are None for a store that is not finished, is damaged,
        or lies in an object store, from where whole shards would have to be fetched.

    Raises:
        DamagedStoreError: Its identity does not say what is kept.
    """
    made = read_generation(identity, store=source.root)
    described: dict[str, Any] = {
        "objective": made.chunks.objective,
        "max_length": made.chunks.max_length,
        "codec": made.codec,
        "grid": list(made.grid),
        "vocab": made.vocab,
        "num_positions": None,
        "bytes_per_position": None,
        "entry_bytes_per_position": None,
    }
    if source.is_local:
        # `tmkd store verify` says what is wrong; what is known of the store is shown all the same.
        with contextlib.suppress(DataError):
            described |= _measure(TokenStore.open(source.root, verify=False))
    return described


def _measure(store: TokenStore) -> dict[str, Any]:
    names = [field.name for field in store.layout.codec.fields(store.layout.entries)]
    num_positions = num_bytes = 0
    for shard in range(len(store.records)):
        for columns in store.read_shard(shard):
            num_positions += len(columns.batch.column("log_tail").flatten())
            num_bytes += sum(columns.batch.column(name).nbytes for name in names)
    whole = sum(record.num_bytes for record in store.records)
    return {
        "num_positions": num_positions,
        "bytes_per_position": round(whole / num_positions, 1) if num_positions else None,
        "entry_bytes_per_position": round(num_bytes / num_positions, 1) if num_positions else None,
    }
