from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from cluster.language.gradient_angle import SampleStudent, WholeGradients, measure_turn
from distill.language_student import LanguageStudent
from precompute.draws import position_keys
from precompute.kept_positions import take_positions
from precompute.language_forward import ChunkRows
from precompute.trial_sample import DensePiece
from precompute.truncate import KeptPositions, Truncation, keep_entries
from schemas.kept_entries import offsets_of
from schemas.language import Objective
from schemas.policy import AnyPolicy, DensePolicy, HybridPolicy, SampledPolicy, TopKPolicy
from schemas.token_rows import TokenChunks
from tests.precompute.tiny_language import make_tokenizer

VOCAB = 73
LENGTHS = np.array([9, 4, 12, 6])
MASK_TOKEN = 4
TOP_2 = TopKPolicy(kind="top_k", k=2)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Several wait for each other where other tests run beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_student(objective: Objective, *, tied: bool = False) -> LanguageStudent:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "vocab_size": 80,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
    }
    model: Any = (
        LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0))
        if objective == "causal"
        else BertForMaskedLM(BertConfig(**sizes))
    )
    return LanguageStudent(model, make_tokenizer(), objective)


def make_rows(objective: Objective) -> ChunkRows:
    rng = np.random.default_rng(2)
    num = int(LENGTHS.sum())
    offsets = offsets_of(LENGTHS)
    mask = (rng.random(num) < 0.6).astype(np.uint8)
    mask[offsets[:-1] + 1] = 1
    shift = 1 if objective == "causal" else 0
    if shift:
        mask[offsets[:-1]] = 0
    chunks = TokenChunks(rng.integers(5, VOCAB, num).astype(np.int32), mask, offsets)
    names = tuple(f"doc#{n}" for n in range(len(LENGTHS)))
    return ChunkRows(chunks, names, shift, None if shift else MASK_TOKEN)


def teach(rows: ChunkRows, policy: AnyPolicy) -> KeptPositions:
    """Returns what a policy keeps of a random teacher's distributions at all positions, in order."""
    places, _ = rows.positions()
    logits = torch.from_numpy(np.random.default_rng(7).normal(0, 2, (len(places), VOCAB)).astype(np.float32))
    targets = torch.from_numpy(rows.chunks.input_ids[places + rows.objective_shift].astype(np.int64))
    return keep_entries(logits, targets, position_keys(3, "x", places), Truncation(policy, VOCAB))


def plain_gradient(
    student: LanguageStudent, rows: ChunkRows, loss: str, keep: AnyPolicy
) -> list[torch.Tensor]:
    """Returns the gradient that plain autograd gives, chunk by chunk, from dense float32 formulas."""
    kept = teach(rows, keep).entries
    model, chunks = student.model, rows.chunks
    student.zero_grad()
    total: Any = 0
    place = 0
    for start, stop in zip(chunks.offsets[:-1], chunks.offsets[1:], strict=True):
        ids = torch.from_numpy(chunks.input_ids[start:stop].astype(np.int64))
        mask = chunks.loss_mask[start:stop]
        if rows.mask_token is not None:
            ids[torch.from_numpy(mask == 1)] = rows.mask_token
        hidden = student.encode(
            ids[None], torch.arange(len(ids))[None], torch.ones(1, len(ids), dtype=torch.int64)
        )
        log_q = student.head(hidden[0], None, None)[:, :VOCAB].log_softmax(dim=1)
        for position in np.flatnonzero(mask) - rows.objective_shift:
            some = slice(int(kept.offsets[place]), int(kept.offsets[place + 1]))
            total = total + plain_loss(loss, log_q[position], kept, some)
            place += 1
    assert model is student.model
    total.backward()
    return [torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in student.parameters()]


def plain_loss(loss: str, log_q: torch.Tensor, kept: Any, some: slice) -> torch.Tensor:
    ids = torch.from_numpy(kept.ids[some].astype(np.int64))
    log_p = torch.from_numpy(kept.log_probs[some].copy())
    if loss == "unbiased_kl":
        weights = log_p.exp() if kept.weights is None else torch.from_numpy(kept.weights[some].copy())
        return -(weights * log_q[ids]).sum()
    if loss == "support_kl":
        return -(log_p.softmax(dim=0) * log_q[ids].log_softmax(dim=0)).sum()
    others = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, ids, False)
    tail = 1 - log_p.exp().sum()
    return -(log_p.exp() * log_q[ids]).sum() - tail * log_q[others].logsumexp(dim=0)


@pytest.mark.parametrize(
    ("loss", "policy"),
    [
        ("ghost_kl", TOP_2),
        ("support_kl", TOP_2),
        ("unbiased_kl", SampledPolicy(kind="sampled", num_samples=4)),
        ("unbiased_kl", HybridPolicy(kind="hybrid", k=2, m=3)),
        ("unbiased_kl", DensePolicy()),
    ],
    ids=["ghost", "support", "sampled", "hybrid", "dense"],
)
@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_the_gradient_is_that_of_the_whole_model_in_one_piece(
    objective: Objective, loss: Any, policy: AnyPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.language.gradient_angle._BATCH_TOKENS", 20)
    monkeypatch.setattr("cluster.language.gradient_angle._PIECE_POSITIONS", 5)
    rows, student = make_rows(objective), make_student(objective, tied=objective == "causal")
    expected = plain_gradient(student.eval(), rows, loss, policy)
    sample = SampleStudent(student, rows, VOCAB)
    found = sample.through_model(sample.add_kept(teach(rows, policy), policy, loss))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_embeddings_that_are_not_trained_take_no_part() -> None:
    rows, student = make_rows("causal"), make_student("causal", tied=True)
    student.model.get_input_embeddings().weight.requires_grad_(False)
    sample = SampleStudent(student, rows, VOCAB)
    gradient = sample.add_kept(teach(rows, TOP_2), TOP_2, "ghost_kl")
    assert gradient.weight_WD is None
    assert len(sample.through_model(gradient)) == sum(one.requires_grad for one in student.parameters())


def dense_pieces(rows: ChunkRows, decoded: bool) -> list[DensePiece]:
    whole = teach(rows, DensePolicy())
    places = np.random.default_rng(1).permutation(whole.entries.num_positions)
    pieces = []
    for some in np.array_split(places, 4):
        exact = take_positions(whole, some)
        pieces.append(DensePiece(some, exact, {"packed": exact.entries} if decoded else {}))
    return pieces


def test_whole_distributions_come_in_any_order_of_pieces_and_have_no_angle() -> None:
    rows, student = make_rows("causal"), make_student("causal")
    sample = SampleStudent(student, rows, VOCAB)
    watch = WholeGradients(sample)
    for piece in dense_pieces(rows, decoded=True):
        watch(piece)
    exact, decoded = sample.through_model(watch.exact), sample.through_model(watch.decoded["packed"])
    in_order = sample.through_model(sample.add_kept(teach(rows, DensePolicy()), DensePolicy(), "unbiased_kl"))
    for one, other in zip(exact, in_order, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert measure_turn(decoded, exact).angle == 0
    assert measure_turn(in_order, exact).angle < 1e-3


def test_renormalising_turns_the_gradient_more_than_the_tail_as_one_token() -> None:
    rows, student = make_rows("causal"), make_student("causal")
    sample = SampleStudent(student, rows, VOCAB)
    reference = sample.through_model(
        sample.add_kept(teach(rows, DensePolicy()), DensePolicy(), "unbiased_kl")
    )
    kept = teach(rows, TOP_2)
    ghost, support = (
        measure_turn(sample.through_model(sample.add_kept(kept, TOP_2, loss)), reference)
        for loss in ("ghost_kl", "support_kl")
    )
    assert 1 < ghost.angle < support.angle < 90


@pytest.mark.parametrize(
    ("one", "two", "angle", "ratio"),
    [
        ([[1.0, 0.0], [0.0]], [[1.0, 1.0], [0.0]], 45.0, 1 / math.sqrt(2)),
        ([[1.0, 0.0], [0.0]], [[0.0, 0.0], [3.0]], 90.0, 1 / 3),
        ([[2.0, 0.0], [2.0]], [[1.0, 0.0], [1.0]], 0.0, 2.0),
        ([[2.0, 0.0], [2.0]], [[-1.0, 0.0], [-1.0]], 180.0, 2.0),
        ([[1.0, 1e-6], [0.0]], [[1.0, 0.0], [0.0]], math.degrees(1e-6), 1.0),
        ([[0.0, 0.0], [0.0]], [[1.0, 0.0], [0.0]], 90.0, 0.0),
    ],
)
def test_angles_of_known_pairs(
    one: list[list[float]], two: list[list[float]], angle: float, ratio: float
) -> None:
    found = measure_turn(tuple(map(torch.tensor, one)), tuple(map(torch.tensor, two)))
    assert found.angle == pytest.approx(angle, rel=1e-5, abs=1e-12)
    assert found.ratio == pytest.approx(ratio)
