"""From the bytes of a token-level shard to the tensors of a micro-batch: tokens/s on one core.

    python -m benchmarks.token_decode --model DIR

Prints one JSON object. What is kept of a few chunks of real text is repeated until a shard has some
megabytes, once for each policy, codec and length of rows; the file is in the page cache and its hashes are
checked before the clock runs. A micro-batch of some 4096 positions in random order of the shard's rows is
then read again and again, and processor time taken:

    decode: rows found, copied out of their record batch and decoded (``TokenStore.gather``): ids, values,
        statistics, tokens, all checked as always.
    collate: kept entries and statistics padded and copied into tensors (``StoredTargets.of_entries``).
    tokens_per_s: of both together. Goals at k = 64 and rows of 511: fixed 5 million, compact 1 million.
    loader_tokens_per_s: of whole steps of ``LanguageLoader``, which besides compares tokens with the
        chunks', packs them, and makes positions and weights.

A token is a stored position. Torch and numpy use one thread; nothing is read ahead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from benchmarks.language_inputs import Inputs, add_inputs, open_worker
from distill.language_corpus import LanguageCorpus
from distill.language_loader import LanguageLoader, PackOptions
from distill.loader import LoaderOptions
from distill.stored_targets import StoredTargets, TargetOrigin
from distill.token_store import TokenStore
from precompute.kept_positions import take_positions
from precompute.language_forward import ChunkRows, compute_kept
from precompute.truncate import KeptPositions, Truncation
from schemas.chunks import ChunkSpec, open_chunks, view_chunks
from schemas.digest import hash_value
from schemas.job import LanguageJob, TokenTeacher
from schemas.kept_entries import offsets_of
from schemas.language import LanguageConfigInit, LanguageStage, LossTerm, TokenStoreOptions
from schemas.policy import POLICY_ADAPTER
from schemas.records import StoreIdentity
from schemas.token_generation import TokenGeneration
from schemas.token_rows import TokenChunks, TokenRows, encode_token_rows
from tests.store_factory import take_keys, write_store
from tests.token_store_factory import MadeChunks, make_chunks

CODECS = ("fixed", "packed", "compact")
POLICIES = ("top_k", "top_p")
LENGTH = 512
BATCH_POSITIONS = 4096
SHARD_BATCHES = 4
REPEATS = 11
GOALS = {"fixed": 5_000_000, "compact": 1_000_000}


@dataclass(frozen=True)
class Shape:
    """How rows are cut.

    Attributes:
        positions: Of a row.
        rows: Of a micro-batch.
    """

    positions: int
    rows: int

    @classmethod
    def of(cls, positions: int, batch_positions: int) -> Shape:
        """Fills a micro-batch."""
        return cls(positions, max(1, round(batch_positions / positions)))


def keep_real(inputs: Inputs, name: str, num_chunks: int, threads: int) -> KeptPositions:
    """Runs the model over the first chunks."""
    worker = open_worker(inputs.target(name, TokenStoreOptions(), cpus_per_actor=threads))
    _, table = open_chunks(inputs.part.rows_path)
    rows = table.slice(0, num_chunks)
    chunks = ChunkRows(view_chunks(rows), tuple(rows.column("example_id").to_pylist()), 1, None)
    policy = POLICY_ADAPTER.validate_python(inputs.policies[name])
    kept = compute_kept(worker.load(), chunks, Truncation(policy, inputs.part.spec.vocab, (2.0,))).kept
    worker.close()
    return kept


def cut_chunks(root: Path, spec: ChunkSpec, shape: Shape) -> MadeChunks:
    """Writes a part of chunks that have so many positions; their tokens do not matter to the clock."""
    rng = np.random.default_rng(0)
    length, num = shape.positions + 1, shape.rows * SHARD_BATCHES
    tokens = [rng.integers(0, spec.vocab, length).astype(np.int32) for _ in range(num)]
    mask = np.ones(length, np.uint8)
    mask[0] = 0
    path = root / f"rows-of-{shape.positions}" / "chunks.arrow"
    longer = spec.model_copy(update={"max_length": max(length, 2)})
    return make_chunks(path, tokens, [mask] * num, longer, shard_rows=num)


def write_tokens(
    root: Path, chunks: MadeChunks, kept: KeptPositions, policy: dict[str, Any], codec: str
) -> Path:
    """Writes a store with what is kept, over and over."""
    spec = chunks.spec
    made = TokenGeneration(
        policy=POLICY_ADAPTER.validate_python(policy),
        grid=(2.0,),
        codec=codec,
        vocab=spec.vocab,
        tokenizer=spec.tokenizer,
        chunks=spec,
    )
    generation = {"teacher": "teacher", **made.model_dump(mode="json")}
    identity = StoreIdentity(
        level="token",
        plan_hash=chunks.part.plan.plan_hash,
        generation_hash=hash_value(generation),
        generation=generation,
        native_labels=(),
        teacher="teacher",
        corpus="corpus",
        part="train",
    )
    per_row = len(chunks.tokens[0]) - 1

    def make_rows(rows: npt.NDArray[np.int64]) -> pa.RecordBatch:
        places = (rows[:, None] * per_row + np.arange(per_row)).reshape(-1) % kept.entries.num_positions
        found = take_positions(kept, places)
        flat = TokenChunks(
            np.concatenate([chunks.tokens[row] for row in rows.tolist()]),
            np.concatenate([chunks.masks[row] for row in rows.tolist()]),
            offsets_of(np.full(len(rows), per_row + 1)),
        )
        bounds = offsets_of(np.full(len(rows), per_row))
        token_rows = TokenRows(flat, found.entries, found.stats, bounds)
        return encode_token_rows(take_keys(chunks.part.plan, rows), token_rows, made.shard_schema())

    return write_store(root, chunks.part.plan, identity, make_rows, batch_rows=TokenStoreOptions().batch_rows)


def measure(root: Path, chunks: MadeChunks, shape: Shape) -> dict[str, float]:
    """Times a store."""
    store = TokenStore.open(root)
    layout = store.layout
    origin = TargetOrigin(layout.entries.policy.kind, layout.entries.vocab, layout.grid)
    num_rows = chunks.part.source.num_rows
    rng = np.random.default_rng(1)
    orders = [rng.permutation(num_rows)[: shape.rows] for _ in range(REPEATS + 1)]
    num = shape.rows * shape.positions
    target_ids_N = torch.zeros(num, dtype=torch.int64)
    # Hashes of the shard are checked at first touch.
    store.gather(np.arange(num_rows))
    decode, collate = [], []
    for rows in orders:
        began = time.process_time()
        found = store.gather(rows)
        decoded = time.process_time()
        StoredTargets.of_entries(found.entries, found.stats, origin, target_ids_N)
        collate.append(time.process_time() - decoded)
        decode.append(decoded - began)
    decode_s, collate_s = statistics.median(decode[1:]), statistics.median(collate[1:])
    data = next((root / "data").iterdir())
    return {
        "tokens_per_s": round(num / (decode_s + collate_s)),
        "decode_tokens_per_s": round(num / decode_s),
        "collate_tokens_per_s": round(num / collate_s),
        "loader_tokens_per_s": round(measure_loader(root, chunks, shape)),
        "kept_per_token": round(len(found.entries.ids) / num, 1),
        "shard_bytes_per_token": round(data.stat().st_size / (num_rows * shape.positions), 1),
    }


def measure_loader(root: Path, chunks: MadeChunks, shape: Shape) -> float:
    """Returns tokens/s of a stage's micro-batches, the median of some steps."""
    spec = chunks.spec
    job = LanguageJob(
        name="benchmark",
        output=str(root),
        init=LanguageConfigInit(kind="config", config={}, tokenizer="none"),
        tokenizer=spec.tokenizer,
        vocab=spec.vocab,
        max_length=max(LENGTH, spec.max_length),
        parts=(chunks.part.source,),
        teachers=(TokenTeacher(name="teacher", stores=(str(root),)),),
        training=LanguageStage(corpus="corpus", teachers=("teacher",), losses=(LossTerm(name="ghost_kl"),)),
        selection_seed=0,
        seed=0,
    )
    corpus = LanguageCorpus.open(job)
    # So many packs as give about the rows of a micro-batch.
    packs = max(1, shape.rows // max(1, job.max_length // spec.max_length))
    options = LoaderOptions(seed=0, global_batch=packs, max_micro_batch=packs, window=1, prefetch=0)
    loader = LanguageLoader(corpus, corpus.usable_rows(), options, PackOptions(job.max_length))
    speeds = []
    began = time.process_time()
    for step in loader.steps(loader.start(), REPEATS + 1):
        seconds = time.process_time() - began
        speeds.append(sum(batch.targets[0].num_positions for batch in step.batches) / seconds)
        began = time.process_time()
    return statistics.median(speeds[1:])


def summarise(found: dict[str, dict[str, float]], shapes: Sequence[Shape]) -> dict[str, Any]:
    """Returns the goals' figures over the goals."""
    return {
        codec: {
            "goal_tokens_per_s": goal,
            "tokens_per_s_over_goal": round(
                found[f"top_k, {codec}, rows of {shapes[0].positions}"]["tokens_per_s"] / goal, 2
            ),
        }
        for codec, goal in GOALS.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures every policy, codec and length of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_inputs(parser)
    parser.add_argument("--chunks", type=int, default=4, help="chunks that the model runs over")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the model")
    parser.add_argument("--row-positions", type=int, nargs="*", default=[511, 64])
    options = parser.parse_args(arguments)
    batch_positions = BATCH_POSITIONS
    if options.quick:
        options.row_positions, batch_positions = [15, 4], 60
    shapes = [Shape.of(positions, batch_positions) for positions in options.row_positions]
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        inputs = Inputs.make(options, root, LENGTH)
        kept = {name: keep_real(inputs, name, options.chunks, options.threads) for name in POLICIES}
        torch.set_num_threads(1)
        for shape in shapes:
            chunks = cut_chunks(root, inputs.part.spec, shape)
            for name in POLICIES:
                for codec in CODECS:
                    store = root / f"{name}-{codec}-{shape.positions}"
                    write_tokens(store, chunks, kept[name], dict(inputs.policies[name]), codec)
                    key = f"{name}, {codec}, rows of {shape.positions}"
                    result[key] = measure(store, chunks, shape)
        policies = {name: inputs.policies[name] for name in POLICIES}
    goals = summarise(result, shapes)
    print(json.dumps({"policies": policies, "goals": goals, "measurements": result}, indent=1))


if __name__ == "__main__":
    main()
