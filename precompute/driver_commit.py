"""Commits by the driver, for storage that cannot create a file only if it is absent.

Of all processes only the driver then makes commit records, one at a time, and looks first: two attempts
at one shard end with one record, as they do elsewhere (tests/precompute/test_driver_commit.py).
"""

from __future__ import annotations

from dataclasses import replace

from precompute.store_writer import commit_shard
from precompute.tasks import ShardReceipt
from schemas.records import DATA_DIRECTORY
from schemas.storage.location import create_storage
from schemas.store_files import load_commit


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
    if load_commit(storage, record.shard, record.revision) is not None:
        storage.delete(f"{DATA_DIRECTORY}/{record.file}")
        return replace(receipt, record=None)
    _, committed = commit_shard(storage, record)
    return replace(receipt, committed=committed, record=None)
