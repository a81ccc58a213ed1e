"""Whether a commit record adds up: regions, rows and exclusions, whoever made it.

Invariants (tests/schemas/test_record_sums.py):
    1. Of a record that adds up, regions cut the file without gap or overlap, and each row of the shard is
       either in a batch or excluded, once.
    2. The file is no larger than its rows and batches account for: hashing goes through all of its bytes,
       and the apparent size of a file of holes costs a stranger nothing.
"""

from __future__ import annotations

from schemas.arrow_message import MAX_BATCH_METADATA_BYTES
from schemas.records import CommitRecord, Level

# What a row may take of a file, on average over a record batch.
MAX_ROW_BYTES = 64 * 1024
# A chunk's kept entries; dense, a chunk of 512 tokens of a vocabulary of 50,000 takes 50 MB.
MAX_CHUNK_BYTES = 256 * 1024 * 1024
# Of a batch's message without its rows: metadata, prefix and padding.
_MAX_MESSAGE_BYTES = 2 * MAX_BATCH_METADATA_BYTES
# Of head or tail: schema metadata, or a footer that lists all batches.
MAX_REGION_BYTES = 64 * 1024 * 1024


def find_contradiction(record: CommitRecord, level: Level) -> str | None:
    """Says how a commit record contradicts itself, as the rest of a sentence, or returns None.

    Args:
        record: The record.
        level: Of the record's store; a row of a token-level one is a chunk, which may be large.
    """
    row_bytes = MAX_CHUNK_BYTES if level == "token" else MAX_ROW_BYTES
    return _find_wrong_region(record, row_bytes) or _find_wrong_rows(record)


def _find_wrong_region(record: CommitRecord, row_bytes: int) -> str | None:
    offset = 0
    for region in record.regions():
        if region.offset != offset:
            return f"leaves a gap before byte {region.offset}"
        offset += region.length
    for region in (record.head, record.tail):
        if region.length > MAX_REGION_BYTES:
            return f"has a head or tail of {region.length} bytes"
    for batch in record.batches:
        if not 0 < batch.length <= _MAX_MESSAGE_BYTES + batch.rows * row_bytes:
            return f"has a batch of {batch.length} bytes for {batch.rows} rows"
    return None if offset == record.num_bytes else f"covers {offset} bytes of {record.num_bytes}"


def _find_wrong_rows(record: CommitRecord) -> str | None:
    excluded = [row.ordinal for row in record.excluded]
    if not all(record.start <= ordinal < record.stop for ordinal in excluded):
        return "excludes a row of another shard"
    if len(set(excluded)) != len(excluded):
        return "excludes a row twice"
    rows = sum(batch.rows for batch in record.batches)
    if not rows == record.num_rows == record.stop - record.start - len(excluded):
        return f"has {rows} rows in its batches, which are not those of its shard"
    return None
