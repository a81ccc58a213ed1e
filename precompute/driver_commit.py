"""Commits by the driver, for storage that cannot create a file only if it is absent.

Of all processes only the driver then makes commit records, one at a time, and its storage looks before it
creates: two attempts at one shard end with one record, as they do elsewhere
(tests/precompute/test_driver_commit.py).
"""

from __future__ import annotations

from dataclasses import replace

from precompute.store_writer import commit_shard
from precompute.tasks import ShardReceipt
from schemas.storage.location import create_storage


def commit_receipt(receipt: ShardReceipt) -> ShardReceipt:
    """Commits what a receipt brings along; one that brings nothing is returned as it is.

    Raises:
        ResourceError: The storage is unreachable, or may not be written.
        DamagedStoreError: Another attempt's record is there, damaged.
    """
    record = receipt.record
    if record is None:
        return receipt
    # Opened for reading, it would ask the service for the condition that it does not know.
    storage = create_storage(receipt.store_root, single_committer=True)
    _, committed = commit_shard(storage, record)
    return replace(receipt, committed=committed, record=None)
