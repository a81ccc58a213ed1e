"""Size, error and speed of the codecs of kept entries.

``python -m benchmarks.codecs`` prints one JSON object, measured on one core.

Without ``--logits`` the logits are synthetic and Zipf-like, which flatters no codec: real ids crowd at low
values. ``--model DIR [--gguf-file NAME] --text FILE`` makes real ones (GGUF needs the packages ``gguf`` and
``accelerate``) and ``--save FILE`` keeps them for the next run.

Goals: at k = 64 ``fixed`` decodes 5 million tokens/s and ``compact`` 1 million; total variation of the
quantisation at most 0.0005 and 0.005; ``compact`` takes at most 110 bytes at k = 50, V = 49152, and stays
within 15 % of log2 C(V, k) / 8 and the bits of its values for every k (``over_bound``). What truncation
leaves out (``truncated_mass``) is the same for all codecs; ``total_variation`` is that of quantisation
alone. ``entry_bytes`` are of kept entries, ``row_bytes`` of a position's whole share of a row.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from precompute.truncate import KeptPositions, Truncation, keep_entries
from schemas.codec import CODECS
from schemas.entry_layout import EntryLayout
from schemas.kept_entries import KeptEntries, offsets_of
from schemas.policy import TopKPolicy
from schemas.value_code import quantise, split_base

KEPT = (12, 50, 64, 128)
CHUNK = 8
REPEATS = 9
# input_ids, loss_mask, log_tail, lse, entropy, target_logprob and one temperature of a grid.
BYTES_BESIDE_ENTRIES = 4 + 1 + 5 * 4
LEGACY_SLOT_BYTES = 5
# Decoding is measured on micro-batches of so many positions, the stored ones over and over.
NUM_DECODED = 4096

Logits = npt.NDArray[np.float32]


def make_logits(args: argparse.Namespace) -> Logits:
    """Returns float32[R, T, V]: R chunks of T positions."""
    if args.logits:
        return np.load(args.logits, mmap_mode="r")
    if not args.model:
        rng = np.random.default_rng(0)
        shape = (1, 16, 1024) if args.quick else (2, 256, 49152)
        ranks = np.log(rng.permutation(shape[2]) + 1.0)
        return (rng.gumbel(0, 2, shape) - 1.1 * ranks).astype(np.float32)
    extra = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(args.model, **extra)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **extra).eval()
    opener = gzip.open if args.text.endswith(".gz") else open
    with opener(args.text, "rt") as file:
        tokens = tokenizer(file.read(200_000))["input_ids"]
    chunks = torch.tensor(tokens[: args.chunks * args.length]).reshape(args.chunks, args.length)
    with torch.inference_mode():
        logits = np.stack([model(chunk[None]).logits[0, :-1].numpy() for chunk in chunks])
    if args.save:
        np.save(args.save, logits)
    return logits


def keep(logits: Logits, k: int) -> KeptPositions:
    """Keeps the k largest entries of all positions."""
    truncation = Truncation(TopKPolicy(kind="top_k", k=k), logits.shape[2], (2.0,))
    flat = logits.reshape(-1, logits.shape[2])
    parts = []
    for start in range(0, len(flat), CHUNK):
        chunk = torch.from_numpy(np.array(flat[start : start + CHUNK]))
        parts.append(keep_entries(chunk, torch.zeros(len(chunk), dtype=torch.int64), None, truncation))
    entries = KeptEntries(
        offsets_of(np.concatenate([part.entries.counts for part in parts])),
        np.concatenate([part.entries.ids for part in parts]),
        np.concatenate([part.entries.log_probs for part in parts]),
    )
    stats = parts[0].stats
    for name in stats.__dataclass_fields__:
        object.__setattr__(stats, name, np.concatenate([getattr(part.stats, name) for part in parts]))
    return KeptPositions(entries, stats, np.concatenate([part.is_finite_N for part in parts]))


def measure(kept: KeptPositions, name: str, k: int, vocab: int, row_positions: int) -> dict[str, Any]:
    """Returns what one codec makes of the entries, cut into rows of so many positions."""
    codec, layout = CODECS[name], EntryLayout(TopKPolicy(kind="top_k", k=k), vocab)
    num = kept.entries.num_positions
    rows = np.append(np.arange(0, num, row_positions), num)
    started = time.process_time()
    columns = codec.encode(kept.entries, rows, layout)
    encode_s = time.process_time() - started
    found = codec.decode(columns, rows, layout, kept.stats.log_tail)
    exact, rounded = (np.exp(one.log_probs.astype(np.float64)) for one in (kept.entries, found))
    size = sum(column.nbytes for column in columns.values()) / num
    return {
        "entry_bytes": round(size, 2),
        "row_bytes": round(size + BYTES_BESIDE_ENTRIES, 2),
        "total_variation": round(float(np.abs(exact - rounded).sum() / 2 / num), 6),
        "encode_tokens_per_s": round(num / encode_s),
        **decode_speed(kept.entries, name, layout, row_positions),
    }


def decode_speed(entries: KeptEntries, name: str, layout: EntryLayout, row_positions: int) -> dict[str, int]:
    """Returns tokens/s of ``view`` and ``decode`` over some megabytes of entries."""
    k = int(entries.counts[0])
    times = -(-NUM_DECODED // entries.num_positions)
    many = KeptEntries(
        np.arange(times * entries.num_positions + 1) * k,
        np.tile(entries.ids, times),
        np.tile(entries.log_probs, times),
    )
    num = many.num_positions
    rows = np.append(np.arange(0, num, row_positions), num)
    columns = CODECS[name].encode(many, rows, layout)
    log_tail = np.zeros(num, np.float32)
    speeds = {}
    for way in ("view", "decode"):
        read = getattr(CODECS[name], way)
        seconds = median_s(lambda read=read: read(columns, rows, layout, log_tail))
        speeds[f"{way}_tokens_per_s"] = round(num / seconds)
    return speeds


def median_s(work: Callable[[], Any]) -> float:
    """Returns the median processor time of some runs, after one that does not count."""
    work()
    seconds = []
    for _ in range(REPEATS):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return statistics.median(seconds)


def bounds(kept: KeptPositions, k: int, vocab: int) -> dict[str, float]:
    """Returns what other layouts would take, and what is in the data whatever the codec."""
    bits = math.lgamma(vocab + 1) - math.lgamma(k + 1) - math.lgamma(vocab - k + 1)
    ids = bits / math.log(2) / 8
    bases, above = split_base(quantise(kept.entries.log_probs), kept.entries.offsets)
    values = (entropy_bytes(above) + entropy_bytes(bases)) / kept.entries.num_positions
    return {
        "truncated_mass": round(float(np.exp(kept.stats.log_tail).mean()), 4),
        "id_bound_bytes": round(ids, 2),
        "value_bytes": round(values, 2),
        "ids_of_17_bits_and_float16_bytes": round(k * (17 + 16) / 8, 2),
        "five_bytes_a_slot_bytes": k * LEGACY_SLOT_BYTES,
    }


def compare_sizes(entry_bytes: float, bounds: dict[str, Any]) -> dict[str, float]:
    """Returns an entry size over the bound, and over the other layouts'."""
    others = {
        "over_bound": bounds["id_bound_bytes"] + bounds["value_bytes"],
        "over_ids_of_17_bits_and_float16": bounds["ids_of_17_bits_and_float16_bytes"],
        "over_five_bytes_a_slot": bounds["five_bytes_a_slot_bytes"],
    }
    return {name: round(entry_bytes / size, 3) for name, size in others.items()}


def entropy_bytes(codes: npt.NDArray[np.uint8]) -> float:
    """Returns the bytes that an ideal coder, which knows their frequencies, spends on codes."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def main(arguments: list[str] | None = None) -> None:
    """Measures every k, codec and length of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few synthetic logits")
    parser.add_argument("--logits", help="an .npy file of float32[chunks, positions, vocabulary]")
    parser.add_argument("--model")
    parser.add_argument("--gguf-file")
    parser.add_argument("--text")
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--row-positions", type=int, nargs="*", default=[511, 64])
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logits = make_logits(args)
    vocab = logits.shape[2]
    results: dict[str, Any] = {"vocab": vocab, "positions": logits.shape[0] * logits.shape[1]}
    for k in KEPT:
        kept = keep(logits, k)
        found: dict[str, Any] = bounds(kept, k, vocab)
        for name in CODECS:
            for row_positions in args.row_positions:
                measured = measure(kept, name, k, vocab, row_positions)
                measured |= compare_sizes(measured["entry_bytes"], found)
                found[f"{name}, rows of {row_positions}"] = measured
        results[f"k={k}"] = found
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
