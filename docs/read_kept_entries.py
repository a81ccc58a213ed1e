"""Reads a token-level shard of codec ``fixed`` or ``packed`` without tmkd: ``read_kept_entries.py SHARD``.

``docs/store-format.md`` says what the columns are; ``read_compact_entries.py`` reads the third codec.
"""

import json
import sys

import numpy as np
import pyarrow as pa


def unpack(data, num, width):
    """Reads ``num`` integers from byte planes, lowest first, then bit planes, each padded to a byte."""
    split = width // 8 * num
    bits = np.unpackbits(data[split:].reshape(width % 8, -(-num // 8)), axis=1, count=num, bitorder="little")
    low = 256 ** np.arange(width // 8) @ data[:split].reshape(width // 8, num)
    return low + 2 ** np.arange(width // 8 * 8, width) @ bits


def read_shard(path):
    """Yields of each row its columns; number of ids of each position; all ids; probabilities.

    ``dense``: each position has the same ids, given once. ``hybrid``: of a position's ids the first
    ``row["num_head"]`` are exact, and only they have one of the probabilities.
    """
    table = pa.ipc.open_file(pa.memory_map(path)).read_all()
    about = json.loads(table.schema.metadata[b"tmkd.tokens"])
    vocab = about["vocab"]
    for index in range(table.num_rows):
        cells = {name: table[name][index] for name in table.column_names}
        row = {n: np.asarray(c.values if hasattr(c, "values") else c.as_py()) for n, c in cells.items()}
        if about["policy"]["kind"] == "dense":
            row["num_kept"], row["ids"] = np.full(len(row["lse"]), vocab), np.arange(vocab)
        elif about["codec"] == "packed":
            row["ids"] = unpack(row["ids"], int(row["num_kept"].sum()), max(1, (vocab - 1).bit_length()))
        yield row, row["num_kept"], row["ids"], np.exp(row["log_probs"].astype(np.float64))


if __name__ == "__main__":
    for row, kept, _ids, probs in read_shard(sys.argv[1]):
        print(row["example_id"], len(kept), "positions", kept.sum(), "ids", probs.sum(), "of mass")  # noqa: T201
