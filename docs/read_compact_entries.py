"""Reads a token-level shard of codec ``compact`` without tmkd: ``read_compact_entries.py SHARD``.

``docs/store-format.md`` says what the columns are; ``read_kept_entries.py`` reads the other codecs.
"""

import json
import sys

import numpy as np
import pyarrow as pa


def expand(frame, num):
    """Decompresses one zstd frame of ``num`` bytes; nothing is stored as nothing."""
    return np.frombuffer(pa.decompress(frame.tobytes(), num, "zstd"), np.uint8) if len(frame) else frame


def read_ids(num, low, high, positions, vocab):
    """Reads each position's number of ids, and the ids: Elias-Fano, the low bits in planes."""
    best = (vocab * positions // max(num, 1)).bit_length() - 1
    width = best if best in (8, 16) else max(1, best - 1)
    buckets, split = -(-vocab // 2**width), width // 8 * num
    bitmap = expand(high, -(-(num + positions * buckets) // 8))
    place, high = divmod(np.flatnonzero(np.unpackbits(bitmap, bitorder="little")) - np.arange(num), buckets)
    bits = np.unpackbits(low[split:].reshape(width % 8, -(-num // 8)), axis=1, count=num, bitorder="little")
    low = 256 ** np.arange(width // 8) @ low[:split].reshape(width // 8, num)
    ids = (high << width) + 2 ** np.arange(width // 8 * 8, width) @ bits + low
    return np.bincount(place, minlength=positions), ids


def read_shard(path):
    """Yields of each row its columns; number of exact ids of each position; these ids; their probabilities.

    ``dense``: each position has the same ids, given once. ``hybrid``: ``row["tail"]`` has numbers and ids of
    the sampled tail. ``sampled``: ``row["draw_counts"]`` has the draws of each id.
    """
    table = pa.ipc.open_file(pa.memory_map(path)).read_all()
    about = json.loads(table.schema.metadata[b"tmkd.tokens"])
    num_bytes = 1 + (about["policy"].get("num_samples", 0) > 255)
    for index in range(table.num_rows):
        cells = {name: table[name][index] for name in table.column_names}
        row = {n: np.asarray(c.values) if hasattr(c, "values") else c.as_py() for n, c in cells.items()}
        size = (len(row["lse"]), about["vocab"])
        kept, ids = np.full(*size), np.arange(size[1])
        if "ids_low" in row:
            kept, ids = read_ids(row["num_entries"], row["ids_low"], row["ids_high"], *size)
        if "tail_low" in row:
            row["tail"] = read_ids(row["num_tail"], row["tail_low"], row["tail_high"], *size)
        if "draw_counts" in row:
            draws = expand(row["draw_counts"], num_bytes * len(ids)).reshape(num_bytes, len(ids))
            row["draw_counts"] = 256 ** np.arange(num_bytes) @ draws
        codes = expand(row["values"], size[0] + int(kept.sum()))
        yield row, kept, ids, ((codes[size[0] :] + np.repeat(codes[: size[0]], kept)) / 255) ** 6


if __name__ == "__main__":
    for row, kept, _ids, probs in read_shard(sys.argv[1]):
        print(row["example_id"], len(kept), "positions", kept.sum(), "ids", probs.sum(), "of mass")  # noqa: T201
