"""Training a tiny language model through the trainer: in this process, and on several ranks."""

from __future__ import annotations

import json
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from distill.engine import stop_process_group
from distill.stage_directory import StageDirectory
from distill.stop_request import StopRequest
from distill.trainer import main
from schemas.errors import RecipeError, TemperatureError
from schemas.job import StageJob, StudentInit, TokenTeacher
from schemas.language import LossTerm
from schemas.policy import DensePolicy, HybridPolicy, SampledPolicy, TopPPolicy
from tests.child_ranks import Kill, read_rows, run_ranks
from tests.distill.tiny_training import assert_same, assert_same_record, train
from tests.store_factory import target
from tests.tiny_language import GRID, NUM_ROWS, VOCAB, TinyLanguage
from tests.tiny_stage import TinyStage, no_launcher_environment, read_metrics, read_weights, write_job
from tests.token_store_factory import make_token_store, sources_and_goals

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
]
TERMS = (
    LossTerm(name="ghost_kl", temperature=2.0),
    LossTerm(name="reverse_kl", weight=0.5),
    LossTerm(name="cross_entropy", weight=0.3),
)
# By this metric the last step is the best, so that the finished weights are those after all steps.
KILLABLE: dict[str, Any] = {
    "checkpoint_every_steps": 2,
    "config": {"attention_dropout": 0.2},
    "losses": TERMS,
    "teachers": ("first", "second"),
    "epochs": 3,
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> TinyLanguage:
    return TinyLanguage(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> TinyLanguage:
    return TinyLanguage(tmp_path_factory.mktemp("masked"), "masked")


def losses_of(output: str | Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read_metrics(output) if line["kind"] == "step"]


def test_a_stage_leaves_a_model_a_record_and_a_complete_status(stage: TinyLanguage) -> None:
    job = stage.job("plain", losses=TERMS, teachers=("first", "second"), epochs=8)
    assert train(job) == "complete"
    directory = StageDirectory(Path(job.output))
    status = directory.read_status()
    assert status is not None
    assert status.state == "complete"
    assert status.fingerprint == job.fingerprint()
    assert not directory.checkpoints.exists()
    model: Any = AutoModelForCausalLM.from_pretrained(directory.model)
    assert model.config.vocab_size == VOCAB
    lines = read_metrics(job.output)
    first = lines[0]
    parts = first["ghost_kl_t2"] + 0.5 * first["reverse_kl"] + 0.3 * first["cross_entropy"]
    assert first["loss"] == pytest.approx(parts, rel=1e-5)
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    assert {"loss", "ghost_kl_t2", "perplexity", "accuracy", "ece"} <= set(evaluations[0])
    assert evaluations[-1]["perplexity"] < evaluations[0]["perplexity"] < VOCAB * 2
    assert status.best_value == min(line["loss"] for line in evaluations)


def test_the_first_steps_loss_is_that_of_single_rows_in_plain_transformers(stage: TinyLanguage) -> None:
    job = stage.job("reference", teachers=(), global_batch=64, max_steps=1, learning_rate=1e-30)
    train(job.model_copy(update={"training": job.training.model_copy(update={"selection_fraction": 0.0})}))
    model: Any = AutoModelForCausalLM.from_pretrained(StageDirectory(Path(job.output)).model).eval()
    total, count = 0.0, 0
    for ids, mask in zip(stage.chunks.tokens, stage.chunks.masks, strict=True):
        sources, goals = sources_and_goals(mask, "causal")
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(ids).long()[None]).logits[0, sources]
        wanted = torch.from_numpy(ids[goals]).long()
        total += float(nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        count += len(goals)
    assert losses_of(job.output) == [pytest.approx(total / count, rel=1e-5)]


def test_a_masked_models_loss_is_that_of_single_rows_with_their_tokens_hidden(masked: TinyLanguage) -> None:
    job = masked.job(
        "reference", teachers=(), global_batch=64, max_steps=1, learning_rate=1e-30, selection_fraction=0.0
    )
    train(job)
    model: Any = AutoModelForMaskedLM.from_pretrained(StageDirectory(Path(job.output)).model).eval()
    assert masked.spec.mask is not None
    total, count = 0.0, 0
    for ids, mask in zip(masked.chunks.tokens, masked.chunks.masks, strict=True):
        hidden = torch.from_numpy(mask).bool()
        wanted = torch.from_numpy(ids).long()
        seen = wanted.masked_fill(hidden, masked.spec.mask.token)
        with torch.no_grad():
            logits = model(input_ids=seen[None]).logits[0, hidden]
        total += float(nn.functional.cross_entropy(logits, wanted[hidden], reduction="sum"))
        count += int(hidden.sum())
    assert losses_of(job.output) == [pytest.approx(total / count, rel=1e-5)]
    assert train(masked.job("taught", losses=TERMS)) == "complete"


def test_a_store_that_is_off_by_one_is_seen_in_the_loss(stage: TinyLanguage, tmp_path: Path) -> None:
    """A teacher that is the student itself leaves no loss, unless positions are mixed up."""
    job = stage.job("itself", max_steps=1, learning_rate=1e-30, selection_fraction=0.0, losses=TERMS[1:2])
    train(job)
    model: Any = AutoModelForCausalLM.from_pretrained(StageDirectory(Path(job.output)).model).eval()

    def itself(row: int) -> Any:
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(stage.chunks.tokens[row]).long()[None]).logits[0].numpy()

    found = {}
    for shift in (0, 1):
        root = make_token_store(
            tmp_path / f"shift-{shift}", stage.chunks, itself, policy=DensePolicy(), shift=shift
        )
        teachers = (TokenTeacher(name="first", stores=(str(root),)),)
        shifted = stage.job(f"shift-{shift}", max_steps=1, learning_rate=1e-30, selection_fraction=0.0)
        train(shifted.model_copy(update={"teachers": teachers}))
        (found[shift],) = losses_of(shifted.output)
    assert abs(found[0]) < 1e-3
    assert found[1] > 0.5


def test_the_step_is_independent_of_accumulation_and_of_packing(stage: TinyLanguage) -> None:
    fields: dict[str, Any] = {"losses": TERMS, "teachers": ("first", "second")}
    train(stage.job("whole", **fields))
    train(stage.job("quarters", max_micro_batch=1, **fields))
    assert_same(read_weights(stage.root / "whole"), read_weights(stage.root / "quarters"), 2e-5)
    assert_same_record(stage.root / "whole", stage.root / "quarters")
    # One step of all rows: in packs of 24 tokens, of 60, and each row by itself.
    single: dict[str, Any] = {**fields, "global_batch": 64, "max_steps": 1, "selection_fraction": 0.0}
    train(stage.job("packed", **single))
    train(stage.job("packed-more", max_length=60, **single))
    train(stage.job("single", pack=False, **single))
    packed = read_weights(stage.root / "packed")
    assert_same(packed, read_weights(stage.root / "packed-more"), 2e-5)
    assert_same(packed, read_weights(stage.root / "single"), 2e-5)


@pytest.mark.parametrize("zero", [0, 3])
def test_the_step_is_independent_of_the_number_of_ranks(stage: TinyLanguage, zero: int) -> None:
    # Small weights are partitioned, too; the head is tied to the embeddings.
    deepspeed = {"zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0}}
    fields: dict[str, Any] = {
        "global_batch": 5,
        "max_micro_batch": 2,
        "deepspeed": deepspeed,
        "epochs": 1,
        "losses": TERMS,
        "config": {"tie_word_embeddings": True},
    }
    one, two = f"one-{zero}", f"two-{zero}"
    assert run_ranks(stage.job(one, **fields)) == [0]
    assert run_ranks(stage.job(two, **fields), num_ranks=2) == [0, 0]
    assert_same(read_weights(stage.root / one), read_weights(stage.root / two), 2e-5)
    assert_same_record(stage.root / one, stage.root / two)


def test_the_record_says_how_many_tokens_were_predicted_a_second(stage: TinyLanguage) -> None:
    job = stage.job("speed", max_steps=2, losses=TERMS)
    train(job)
    lines = [json.loads(line) for line in (Path(job.output) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    for line in steps:
        # Chunks have 1 to 11 tokens to predict.
        assert 1 <= line["tokens_per_s"] / line["rows_per_s"] <= 11


@pytest.fixture(scope="module")
def uninterrupted(stage: TinyLanguage) -> Path:
    job = stage.job("uninterrupted", **KILLABLE)
    assert run_ranks(job) == [0]
    return Path(job.output)


@pytest.mark.parametrize("step", [1, 5])
def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(
    stage: TinyLanguage, uninterrupted: Path, step: int
) -> None:
    job = stage.job(f"killed-{step}", **KILLABLE)
    assert run_ranks(job, kill=Kill(step)) == [-signal.SIGKILL]
    assert run_ranks(job) == [0]
    assert_same(read_weights(job.output), read_weights(uninterrupted), 0)
    assert read_metrics(job.output) == read_metrics(uninterrupted)
    expected = dict(read_rows(uninterrupted))
    for number, rows in read_rows(job.output):
        assert rows == expected[number]


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_a_stage_trains_in_bfloat16(stage: TinyLanguage, masked: TinyLanguage, objective: str) -> None:
    made = stage if objective == "causal" else masked
    deepspeed = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    fields: dict[str, Any] = {"losses": TERMS, "epochs": 6}
    train(made.job("bf16", deepspeed=deepspeed, **fields))
    train(made.job("fp32", **fields))
    half, whole = losses_of(made.root / "bf16"), losses_of(made.root / "fp32")
    assert half[0] == pytest.approx(whole[0], rel=0.03)
    assert half[-1] < 0.9 * half[0]


POLICIES = {
    "dense": DensePolicy(),
    "top_p": TopPPolicy(kind="top_p", p=0.9, k_max=12),
    "sampled": SampledPolicy(kind="sampled", num_samples=8),
    "hybrid": HybridPolicy(kind="hybrid", k=3, m=4),
}


@pytest.mark.parametrize("kind", POLICIES)
def test_every_policy_trains(stage: TinyLanguage, kind: str) -> None:
    root = make_token_store(
        stage.root / "stores" / kind, stage.chunks, stage.teach(0), policy=POLICIES[kind], codec="compact"
    )
    name = "ghost_kl" if kind in ("dense", "top_p") else "unbiased_kl"
    job = stage.job(f"policy-{kind}", losses=(LossTerm(name=name),), epochs=6)
    train(job.model_copy(update={"teachers": (TokenTeacher(name="first", stores=(str(root),)),)}))
    losses = losses_of(job.output)
    assert losses[-1] < losses[0]


def test_weights_of_teachers_scale_their_losses(stage: TinyLanguage) -> None:
    fields: dict[str, Any] = {"max_steps": 1, "selection_fraction": 0.0, "global_batch": 64}
    found = {}
    for name, weights in {"first": (1.0, 0.0), "second": (0.0, 1.0), "mixed": (0.3, 0.7)}.items():
        job = stage.job(f"weights-{name}", teachers=("first", "second"), **fields)
        teachers = tuple(
            teacher.model_copy(update={"weight": weight})
            for teacher, weight in zip(job.teachers, weights, strict=True)
        )
        train(job.model_copy(update={"teachers": teachers}))
        (found[name],) = losses_of(job.output)
    assert found["mixed"] == pytest.approx(0.3 * found["first"] + 0.7 * found["second"], rel=1e-6)


def test_a_temperature_outside_the_grid_is_an_error_before_the_first_step(stage: TinyLanguage) -> None:
    job = stage.job("cold", losses=(LossTerm(name="ghost_kl", temperature=3.0),))
    with pytest.raises(TemperatureError, match=f"besides 1 it has: {GRID[0]:g}") as caught:
        train(job)
    assert "\n" not in str(caught.value)
    assert not StageDirectory(Path(job.output)).metrics.exists()


def test_an_unbiased_loss_on_a_truncated_store_is_an_error_before_the_first_step(stage: TinyLanguage) -> None:
    job = stage.job("biased", losses=(LossTerm(name="unbiased_kl"),))
    with pytest.raises(RecipeError, match="biased on a top_k or top_p store"):
        train(job)
    assert not StageDirectory(Path(job.output)).metrics.exists()


def test_a_stage_starts_from_an_earlier_one(stage: TinyLanguage) -> None:
    first = stage.job("stage-1", epochs=1)
    train(first)
    path = str(StageDirectory(Path(first.output)).model)
    init = StudentInit(kind="student", path=path, fingerprint=first.fingerprint())
    second = stage.job("stage-2", init=init, learning_rate=1e-12)
    train(second)
    assert_same(read_weights(second.output), read_weights(first.output), 1e-6)


def test_a_store_of_the_other_level_leaves_a_refusal_of_one_line(
    stage: TinyLanguage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StopRequest, "install", lambda self: None)
    classifiers = TinyStage(tmp_path / "classifiers")
    language = stage.job("crossed").model_copy(
        update={"teachers": (TokenTeacher(name="t", stores=(str(classifiers.stores["first"]),)),)}
    )
    crossed: StageJob = classifiers.job("crossed", soft_targets=(target(("t", [stage.stores["first"]])),))
    for job in (language, crossed):
        with no_launcher_environment(), warnings.catch_warnings():
            assert main(["--job", str(write_job(job))]) == 4
        status = StageDirectory(Path(job.output)).read_status()
        assert status is not None
        assert status.error is not None
        assert "holds" in status.error
        assert "\n" not in status.error
        stop_process_group()


def test_every_row_is_read_in_an_epoch(stage: TinyLanguage, uninterrupted: Path) -> None:
    steps = read_rows(uninterrupted)
    rows = [row for _, rows in steps for row in rows]
    # A fifth is held out; three epochs.
    assert len(rows) == 3 * (NUM_ROWS - NUM_ROWS // 5)
    assert all(rows.count(row) == 3 for row in set(rows))
