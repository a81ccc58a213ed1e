"""Reads a token-level shard without tmkd, of any codec and policy: ``python read_kept_entries.py SHARD``."""

import json
import sys

import numpy as np
import pyarrow as pa


def expand(frame, size):
    """Decompresses one zstd frame of ``size`` bytes."""
    return np.frombuffer(pa.decompress(frame.tobytes(), size, "zstd"), np.uint8) if size else frame


def unpack(data, num, width):
    """Reads integers from byte planes, lowest first, then bit planes, each padded to a byte."""
    planes = [data[i * num : (i + 1) * num].astype(np.int64) << 8 * i for i in range(width // 8)]
    for i, plane in enumerate(data[width // 8 * num :].reshape(width % 8, -(-num // 8)), width // 8 * 8):
        planes.append(np.unpackbits(plane, count=num, bitorder="little").astype(np.int64) << i)
    return sum(planes, np.zeros(num, np.int64))


def elias_fano(num, low, high, positions, vocab):
    """Reads how many ids each position has, and the ids, from low bits and a unary bitmap."""
    best = (vocab * positions // max(num, 1)).bit_length() - 1
    width = best if best in (8, 16) else max(1, best - 1)
    buckets = -(-vocab // 2**width)
    size = num + positions * buckets if num else 0
    ones = np.flatnonzero(np.unpackbits(expand(high, -(-size // 8)), count=size, bitorder="little"))
    place, part = divmod(ones - np.arange(num), buckets)
    return np.bincount(place, minlength=positions), (part << width) + unpack(low, num, width)


def read_row(row, codec, policy, vocab):
    """Reads how many exact and how many ids each position has, all ids, and the exact ones' probabilities.

    A position's exact ids come first; for ``hybrid`` those after them share exp(log_tail) evenly.
    """
    positions = len(row["log_tail"])
    if policy["kind"] == "dense":
        head = kept = np.full(positions, vocab)
        ids = np.tile(np.arange(vocab), positions)
    elif codec == "compact":
        head, ids = elias_fano(row["num_entries"], row["ids_low"], row["ids_high"], positions, vocab)
        kept = head
        if policy["kind"] == "hybrid":
            tail, more = elias_fano(row["num_tail"], row["tail_low"], row["tail_high"], positions, vocab)
            places = np.concatenate(
                [np.repeat(np.arange(positions), head), np.repeat(np.arange(positions), tail)]
            )
            kept, ids = head + tail, np.concatenate([ids, more])[np.argsort(places, kind="stable")]
    else:
        kept = row["num_kept"].astype(np.int64)
        head = row.get("num_head", kept)
        ids = (
            row["ids"]
            if codec == "fixed"
            else unpack(row["ids"], kept.sum(), max(1, (vocab - 1).bit_length()))
        )
    if codec != "compact":
        return head, kept, ids, np.exp(row["log_probs"].astype(np.float64))
    codes = expand(
        row["values"], positions + head.sum()
    )  # the lowest of each position, then what is above it
    return head, kept, ids, ((codes[positions:] + np.repeat(codes[:positions], head)) / 255) ** 6


def read_shard(path):
    """Yields ``(row, head, kept, ids, probs)`` of each row; ``row`` has all of its columns."""
    with pa.memory_map(path) as source:
        table = pa.ipc.open_file(source).read_all()
        about = json.loads(table.schema.metadata[b"tmkd.tokens"])
        for index in range(table.num_rows):
            cells = {name: table[name][index] for name in table.column_names}
            row = {
                name: cell.values.to_numpy() if hasattr(cell, "values") else cell.as_py()
                for name, cell in cells.items()
            }
            yield row, *read_row(row, about["codec"], about["policy"], about["vocab"])


if __name__ == "__main__":
    for row, head, kept, _, probs in read_shard(sys.argv[1]):
        print(row["example_id"], len(kept), "positions", kept.sum(), "ids", head.sum(), "exact", probs.sum())  # noqa: T201
