"""From documents through chunks and a teacher's store to a student's loss: the teacher itself has none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from precompute.language_worker import LanguageWorker
from precompute.store_writer import StoreWriter
from precompute.stores import StoreRequest, StoreSettings, describe_targets, make_job
from schemas.job import LanguageJob, PartSource, TokenTeacher
from schemas.language import LanguageLayersInit, LanguageStage, LossTerm, Objective, TokenStoreOptions
from tests.distill.tiny_training import train
from tests.precompute.tiny_language import (
    chunk_corpus,
    make_corpus,
    make_documents,
    make_teacher,
    save_tiny_llama,
    save_tiny_masked,
    write_corpus,
)
from tests.tiny_stage import read_metrics

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
]
OPTIONS = TokenStoreOptions(shard_rows=4, batch_rows=3)


def make_stage(root: Path, objective: Objective, **teacher: Any) -> LanguageJob:
    """Runs a tiny teacher over a tiny corpus; the job's student is the teacher whole."""
    save = save_tiny_llama if objective == "causal" else save_tiny_masked
    model = save(root / "model")
    rows = [{"text": text} for text in make_documents(10)]
    corpus = make_corpus(write_corpus(root / "text.jsonl", rows))
    (part,) = chunk_corpus(corpus, model, root, objective)
    settings = StoreSettings(str(root / "stores"), root / "weights.json", OPTIONS)
    request = StoreRequest(make_teacher(model, **teacher), str(model), None, corpus, part)
    (target,) = describe_targets([request], settings)
    store = StoreWriter.open(target.root, target.identity, target.plan)
    worker = LanguageWorker(target.spec)  # type: ignore[arg-type]
    for task in store.plan.tasks():
        worker.process(make_job(target, store, task, OPTIONS))
    worker.close()
    store.finish()
    source = PartSource(
        rows=str(part.rows_path),
        fingerprint=part.fingerprint,
        plan_hash=target.plan.plan_hash,
        num_rows=part.num_rows,
        shard_rows=OPTIONS.shard_rows,
    )
    training = LanguageStage(
        corpus="toy",
        teachers=("tiny",),
        losses=(LossTerm(name="ghost_kl"), LossTerm(name="ghost_kl", temperature=2.0)),
        global_batch=4,
        max_micro_batch=4,
        max_steps=3,
        learning_rate=1e-30,
        selection_fraction=0.0,
    )
    dropout = ("hidden_dropout_prob", "attention_probs_dropout_prob") if objective == "masked" else ()
    return LanguageJob(
        name="toy",
        output=str(root / "student"),
        init=LanguageLayersInit(kind="layers", model=str(model), overrides=dict.fromkeys(dropout, 0.0)),
        objective=objective,
        tokenizer=part.spec.tokenizer,
        vocab=part.spec.vocab,
        max_length=48,
        parts=(source,),
        teachers=(TokenTeacher(name="tiny", stores=(str(target.root),)),),
        training=training,
        selection_seed=1,
        seed=1,
    )


@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("codec", ["fixed", "compact"])
def test_a_student_that_is_its_teacher_has_no_loss(tmp_path: Path, objective: Objective, codec: str) -> None:
    job = make_stage(tmp_path, objective, codec=codec, temperatures=(2.0,), keep={"kind": "top_k", "k": 20})
    assert train(job) == "complete"
    steps = [line for line in read_metrics(job.output) if line["kind"] == "step"]
    assert len(steps) == 3
    for line in steps:
        assert line["ghost_kl"] == pytest.approx(0, abs=2e-3)
        assert line["ghost_kl_t2"] == pytest.approx(0, abs=2e-3)
    # The student keeps the teacher's vocabulary, padding included.
    config = json.loads((Path(job.output) / "model" / "config.json").read_text())
    assert config["vocab_size"] > job.vocab
