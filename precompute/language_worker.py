"""The worker of language models: one shard of chunks goes in, one committed token-level shard comes out.

Shapes: R chunks of a shard, T tokens of all of them.

Invariants: those of ``precompute.shard_worker`` (tests/precompute/test_language_worker.py), and
    1. A chunk's row depends on the job and the teacher alone, but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from precompute.encode_tokens import encode_chunks
from precompute.language_forward import ChunkRows, compute_kept, leave_out
from precompute.language_teacher import LoadedLanguageModel
from precompute.pretrained import check_length
from precompute.shard_worker import Computed, ShardWorkerBase, check_rows
from precompute.store_writer import StoreWriter
from precompute.tasks import LanguageWorkerSpec, ShardJob
from precompute.truncate import Truncation
from schemas.chunks import hash_chunk, view_chunks
from schemas.token_generation import TokenGeneration, read_generation


@dataclass(frozen=True, slots=True)
class PreparedChunks:
    """Chunks of a shard, and what their store keeps of them."""

    rows: ChunkRows
    generation: TokenGeneration


class LanguageWorker(ShardWorkerBase[LoadedLanguageModel, PreparedChunks]):
    """Runs one language model over shards; see ``ShardWorkerBase``."""

    def __init__(self, spec: LanguageWorkerSpec) -> None:
        super().__init__(spec.teacher.name)
        self._spec = spec

    def _load_model(self) -> LoadedLanguageModel:
        return LoadedLanguageModel.load(self._spec)

    def _prepare_rows(self, job: ShardJob, rows: pa.Table, store: StoreWriter) -> PreparedChunks:
        chunks = view_chunks(rows)
        bounds = chunks.offsets.tolist()
        pieces = [slice(bounds[i], bounds[i + 1]) for i in range(rows.num_rows)]
        hashes = [hash_chunk(chunks.input_ids[piece], chunks.loss_mask[piece]) for piece in pieces]
        check_rows(job, rows, hashes, store)
        generation = read_generation(store.identity, store=store.root)
        mask = generation.chunks.mask
        ids = tuple(rows.column("example_id").to_pylist())
        shift = 1 if generation.chunks.objective == "causal" else 0
        return PreparedChunks(ChunkRows(chunks, ids, shift, mask.token if mask else None), generation)

    def _compute(self, prepared: PreparedChunks, _job: ShardJob, store: StoreWriter) -> Computed:
        generation, rows = prepared.generation, prepared.rows
        model = self.load()
        check_length(model.model.config, generation.chunks.max_length, self._spec.teacher.name)
        truncation = Truncation(generation.policy, generation.vocab, generation.grid)
        result = compute_kept(model, rows, truncation, self._count_rows)
        finite_R = result.finite_R
        if not finite_R.all():
            kept_rows, kept_result = leave_out(result, rows)
        else:
            kept_rows, kept_result = rows, result

        def encode(table: pa.Table, batch_rows: int) -> Iterator[pa.RecordBatch]:
            return encode_chunks(table, kept_rows.chunks, kept_result, store.schema, batch_rows)

        num_tokens = int(rows.chunks.offsets[-1])
        return Computed(finite_R, encode, num_tokens, result.num_padded_tokens, result.seconds)
