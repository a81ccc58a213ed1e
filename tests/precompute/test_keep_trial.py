"""Keep policies on a sample: what they keep, count and weigh is what a store of them holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from precompute.candidates import Candidate
from precompute.chunking import ChunkedPart
from precompute.keep_trial import Pilot, run_trial
from precompute.language_forward import ChunkRows
from precompute.language_teacher import LoadedLanguageModel
from precompute.language_worker import LanguageWorker
from precompute.store_writer import StoreWriter
from precompute.stores import StoreRequest, StoreSettings, StoreTarget, describe_targets, make_job
from precompute.trial_bytes import CorpusSize
from precompute.trial_sample import DensePiece, TrialOutcome, TrialSample
from schemas.chunks import open_chunks, view_chunks
from schemas.errors import TeacherError
from schemas.language import Objective, TokenStoreOptions
from schemas.policy import POLICY_ADAPTER, AnyPolicy, DensePolicy, TopKPolicy
from schemas.text_corpus import TextCorpus
from schemas.token_generation import read_generation
from schemas.token_rows import decode_token_rows, read_layout
from tests.precompute.tiny_language import (
    PADDED_VOCAB,
    VOCAB,
    chunk_corpus,
    make_corpus,
    make_documents,
    make_teacher,
    save_tiny_llama,
    save_tiny_masked,
    write_corpus,
)

OPTIONS = TokenStoreOptions(shard_rows=7, batch_rows=3)
TOP_5 = TopKPolicy(kind="top_k", k=5)
POLICIES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"kind": "top_k", "k": 5}, "packed"),
    ({"kind": "top_p", "p": 0.8, "k_max": 20}, "compact"),
    ({"kind": "sampled", "num_samples": 12, "seed": 3}, "fixed"),
    ({"kind": "hybrid", "k": 4, "m": 3, "seed": 3}, "compact"),
    ({"kind": "dense"}, "fixed"),
    ({"kind": "dense"}, "compact"),
)


@dataclass(frozen=True)
class Here:
    """A tiny teacher and the chunks of a corpus, all of them in the sample."""

    root: Path
    model: Path
    corpus: TextCorpus
    part: ChunkedPart

    def target(self, **teacher: Any) -> StoreTarget:
        settings = StoreSettings(str(self.root / "stores"), self.root / "weights.json", OPTIONS)
        fields = {"temperatures": (2.0,), **teacher}
        request = StoreRequest(
            make_teacher(self.model, **fields), str(self.model), None, self.corpus, self.part
        )
        (target,) = describe_targets([request], settings)
        return target

    def load(self, **teacher: Any) -> LoadedLanguageModel:
        return LoadedLanguageModel.load(self.target(**teacher).spec)  # type: ignore[arg-type]

    def sample(self) -> TrialSample:
        spec, table = open_chunks(self.part.rows_path)
        rows = ChunkRows(
            view_chunks(table),
            tuple(table.column("example_id").to_pylist()),
            1 if spec.objective == "causal" else 0,
            spec.mask.token if spec.mask else None,
        )
        target = self.target()
        generation = read_generation(target.identity, store=target.root)
        return TrialSample(table, rows, generation, OPTIONS.batch_rows)

    def size(self) -> CorpusSize:
        shards = [task.num_rows for task in self.target().plan.tasks()]
        num_batches = sum(-(-rows // OPTIONS.batch_rows) for rows in shards)
        part = self.part
        return CorpusSize(part.num_rows, part.num_tokens, part.num_positions, len(shards), num_batches)


def make_here(root: Path, objective: Objective) -> Here:
    model = (save_tiny_llama if objective == "causal" else save_tiny_masked)(root / "model")
    rows = [{"text": text} for text in make_documents(12)]
    corpus = make_corpus(write_corpus(root / "text.jsonl", rows))
    (part,) = chunk_corpus(corpus, model, root, objective)
    return Here(root, model, corpus, part)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Here:
    return make_here(tmp_path_factory.mktemp("here"), "causal")


def candidates() -> tuple[Candidate, ...]:
    return tuple(Candidate(POLICY_ADAPTER.validate_python(keep), codec) for keep, codec in POLICIES)  # type: ignore[arg-type]


def run_store(target: StoreTarget) -> list[pa.RecordBatch]:
    """Makes the store and returns its record batches in order."""
    store = StoreWriter.open(target.root, target.identity, target.plan)
    worker = LanguageWorker(target.spec)  # type: ignore[arg-type]
    for task in store.plan.tasks():
        worker.process(make_job(target, store, task, OPTIONS))
    worker.close()
    batches = []
    for _, commit in sorted(store.commit_records().items()):
        with pa.memory_map(f"{store.root}/data/{commit.record.file}") as source:
            reader = pa.ipc.open_file(source)
            batches += [reader.get_batch(i) for i in range(reader.num_record_batches)]
    return batches


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_bytes_and_entries_are_those_of_the_real_store(tmp_path: Path, objective: Objective) -> None:
    here = make_here(tmp_path, objective)
    outcome = run_trial(here.load(), here.sample(), candidates())
    for (keep, codec), found in zip(POLICIES, outcome.candidates, strict=True):
        target = here.target(keep=keep, codec=codec)
        batches = run_store(target)
        layout = read_layout(batches[0].schema.metadata)
        names = [field.name for field in layout.codec.fields(layout.entries)]
        entries = sum(batch.column(name).nbytes for batch in batches for name in names)
        files = sum(path.stat().st_size for path in Path(target.root, "data").iterdir())
        # The dense policy's pieces are others than its rows; with so few tokens frames of zstd count.
        is_dense = keep["kind"] == "dense"
        assert found.sizes.entries == pytest.approx(entries, rel=0.12 if is_dense else 0.01)
        assert found.sizes.project(here.size()) == pytest.approx(files, rel=0.03 if is_dense else 0.01)
        assert found.mean_kept * found.sizes.num_positions == pytest.approx(
            sum(len(decode_token_rows(batch, layout).entries.ids) for batch in batches)
        )
        if found.decoded is None:
            assert keep["kind"] == "dense"
            continue
        stored = [decode_token_rows(batch, layout).entries for batch in batches]
        np.testing.assert_array_equal(found.decoded.entries.ids, np.concatenate([one.ids for one in stored]))
        if codec == "packed":
            assert found.sizes.entries == entries
            np.testing.assert_array_equal(
                found.decoded.entries.log_probs, np.concatenate([one.log_probs for one in stored])
            )


def test_a_part_of_the_corpus_gives_about_the_same_projection(here: Here) -> None:
    whole = here.sample()
    spec, table = open_chunks(here.part.rows_path)
    some = table.take(pa.array(range(0, table.num_rows, 2)))
    rows = replace(
        whole.rows, chunks=view_chunks(some), example_ids=tuple(some.column("example_id").to_pylist())
    )
    assert spec.vocab == VOCAB
    model, one = here.load(), (Candidate(TOP_5, "packed"),)
    (all_,) = run_trial(model, whole, one).candidates
    (half,) = run_trial(model, replace(whole, table=some, rows=rows), one).candidates
    assert half.sizes.num_positions < 0.7 * all_.sizes.num_positions
    assert half.sizes.project(here.size()) == pytest.approx(all_.sizes.project(here.size()), rel=0.03)


def sums_of(outcome: TrialOutcome) -> list[float]:
    sums = [outcome.perplexity, outcome.calibration_error]
    for one in outcome.candidates:
        sums += [one.missed_mass, one.mean_kept, *one.quantisation]
        for loss in one.losses.values():
            sums += [loss.total_variation, loss.kl_to_full, loss.calibration_error]
    return sums


def test_sums_do_not_depend_on_batches_or_slices(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sums_of(run_trial(here.load(), here.sample(), candidates()))
    monkeypatch.setattr("precompute.keep_trial._CACHED_BYTES", 4 * VOCAB * 11)
    monkeypatch.setattr("precompute.keep_trial._DENSE_POSITIONS", 17)
    model = here.load(tokens_per_batch=40, chunk_positions=23)
    found = run_trial(model, here.sample(), candidates())
    assert sums_of(found) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_numbers_are_those_of_the_models_logits(here: Here) -> None:
    model, sample = here.load(), here.sample()
    nats, tails, hits = [], [], []
    chunks = sample.rows.chunks
    for start, stop in zip(chunks.offsets[:-1], chunks.offsets[1:], strict=True):
        ids = torch.from_numpy(chunks.input_ids[start:stop].astype(np.int64))
        with torch.no_grad():
            logits = model.model(input_ids=ids[None]).logits[0, :-1, :VOCAB].double()
        p = logits.softmax(dim=1)
        nats += (-p.log()[torch.arange(len(p)), ids[1:]]).tolist()
        tails += (1 - p.topk(5).values.sum(dim=1)).tolist()
        hits += [(float(row.max()), bool(row.argmax() == goal)) for row, goal in zip(p, ids[1:], strict=True)]
    outcome = run_trial(model, sample, (Candidate(TOP_5, "packed"), Candidate(DensePolicy(), "packed")))
    assert outcome.perplexity == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    first, dense = outcome.candidates
    assert first.missed_mass == pytest.approx(np.mean(tails), rel=1e-4)
    assert first.losses["support_kl"].total_variation == pytest.approx(np.mean(tails), rel=1e-4)
    bins: dict[int, list[float]] = {}
    for confidence, hit in hits:
        bins.setdefault(math.ceil(confidence * 15), []).append(hit - confidence)
    error = sum(abs(sum(one)) for one in bins.values()) / len(hits)
    assert outcome.calibration_error == pytest.approx(error, abs=1e-5)
    # The head's probabilities are the teacher's own; without its tail they are too high.
    assert first.losses["ghost_kl"].calibration_error == pytest.approx(error, abs=1e-5)
    assert dense.losses["unbiased_kl"].calibration_error == pytest.approx(error, abs=1e-5)
    assert dense.losses["unbiased_kl"].total_variation == 0
    assert dense.missed_mass == 0


def test_who_watches_gets_every_position_once_and_whole(here: Here) -> None:
    pieces: list[DensePiece] = []
    sample = here.sample()
    tried = (Candidate(TOP_5, "packed"), Candidate(DensePolicy(), "compact"))
    run_trial(here.load(), sample, tried, pieces.append)
    places = np.concatenate([piece.places_N for piece in pieces])
    assert sorted(places.tolist()) == list(range(sample.rows.positions()[1][-1]))
    for piece in pieces:
        entries = piece.exact.entries
        assert (entries.counts == VOCAB).all()
        masses = np.exp(entries.log_probs.reshape(-1, VOCAB).astype(np.float64)).sum(axis=1)
        assert masses == pytest.approx(np.ones(len(masses)), abs=1e-5)
        assert list(piece.decoded) == ["compact"]
        gap = np.abs(np.exp(piece.decoded["compact"].log_probs) - np.exp(entries.log_probs))
        assert 0 < gap.max() < 0.02


class _Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return made


def test_no_tensor_of_all_positions_and_the_vocabulary_is_made(here: Here) -> None:
    model, sample = here.load(tokens_per_batch=16, chunk_positions=8), here.sample()
    num_positions = int(sample.rows.positions()[1][-1])
    with _Largest() as seen:
        run_trial(model, sample, candidates()[2:5], lambda _: None)
    # The widest of the model itself: 64 numbers a token of a batch; of the policies: a piece's logits.
    assert seen.elements <= max(16 * 64, 8 * PADDED_VOCAB) < VOCAB * num_positions / 20


def test_a_logit_that_is_not_a_number_names_its_chunk(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sample = here.load(tokens_per_batch=8), here.sample()
    plain = LoadedLanguageModel.predict
    calls = 0

    def predict(self: LoadedLanguageModel, output: Any, hidden_ND: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = plain(self, output, hidden_ND)
        return logits.index_fill(1, torch.tensor([4]), torch.nan) if calls == 2 else logits

    monkeypatch.setattr(LoadedLanguageModel, "predict", predict)
    # A batch is one chunk, longest first.
    lengths = np.diff(sample.rows.chunks.offsets)
    second = sample.rows.example_ids[int(np.argsort(-lengths, kind="stable")[1])]
    with pytest.raises(TeacherError, match=rf"tiny.*{second} are not numbers"):
        run_trial(model, sample, (Candidate(TOP_5, "packed"),))


@pytest.mark.parametrize("codec", ["packed", "compact"])
def test_the_pilot_measures_bytes_of_a_row(here: Here, codec: Any) -> None:
    pilot = Pilot(here.load(), here.sample(), codec)
    sizes = [pilot.measure(TopKPolicy(kind="top_k", k=k)) for k in (1, 5, 20)]
    assert sizes == sorted(sizes)
    drawn: AnyPolicy = POLICY_ADAPTER.validate_python({"kind": "sampled", "num_samples": 9})
    assert pilot.measure(drawn) == pilot.measure(drawn) > 0
