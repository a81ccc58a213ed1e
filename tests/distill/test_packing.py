from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from distill.language_student import LanguageStudent
from distill.packing import NO_TOKEN, PackedTokens, block_mask, cut_packs
from distill.skeleton import quiet_transformers
from schemas.language import Objective
from tests.distill.tiny_models import BERT, CONFIGS, PIECES, save_tokenizer
from tests.tiny_language import LLAMA

VOCAB = len(PIECES)
LENGTHS = np.array([4, 2, 7, 3, 5])
# Two sequences: rows 0 to 2 and rows 3 to 4, of 13 and 8 tokens.
BOUNDS = np.array([0, 3, 5])
MODELS: list[tuple[Objective, dict[str, Any]]] = [
    ("causal", LLAMA),
    ("causal", {**LLAMA, "model_type": "qwen3", "head_dim": 8}),
    ("causal", {**LLAMA, "model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 5.0}),
    ("causal", {**LLAMA, "model_type": "granite", "logits_scaling": 4.0}),
    ("causal", {**LLAMA, "model_type": "cohere", "logit_scale": 0.3}),
    ("causal", {**LLAMA, "model_type": "mixtral", "num_local_experts": 2}),
    (
        "causal",
        {
            "model_type": "gpt2",
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 64,
            "initializer_range": 0.3,
        },
    ),
    ("masked", BERT),
    ("masked", CONFIGS["roberta"]),
    ("masked", CONFIGS["distilbert"]),
    ("masked", CONFIGS["electra"]),
]


def make_model(objective: Objective, fields: dict[str, Any]) -> Any:
    auto: Any = AutoModelForCausalLM if objective == "causal" else AutoModelForMaskedLM
    rest = {**fields, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = AutoConfig.for_model(rest.pop("model_type"), **rest)
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(3)
        return auto.from_config(config, dtype=torch.float32).eval()


def rows_of_tokens() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, VOCAB, (int(length),), generator=generator) for length in LENGTHS]


def lay_out(rows: list[torch.Tensor]) -> tuple[PackedTokens, torch.Tensor]:
    laid = PackedTokens.lay_out(LENGTHS, BOUNDS)
    input_ids = torch.zeros(laid.shape, dtype=torch.int64)
    input_ids.view(-1)[torch.from_numpy(laid.places)] = torch.cat(rows)
    return laid, input_ids


def test_a_pack_takes_rows_until_the_next_one_does_not_fit() -> None:
    lengths = np.array([4, 2, 7, 3, 5, 10, 1])
    assert cut_packs(lengths, 10).tolist() == [0, 2, 4, 5, 6, 7]
    assert cut_packs(lengths, 100).tolist() == [0, 7]
    assert cut_packs(lengths, 10, pack=False).tolist() == list(range(8))
    assert cut_packs(np.empty(0, np.int64), 10).tolist() == [0]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(9, 30), st.data())
def test_packs_are_the_same_from_any_packs_first_row_on(lengths: list[int], limit: int, data: Any) -> None:
    bounds = cut_packs(np.array(lengths), limit)
    assert all(sum(lengths[a:b]) <= limit for a, b in itertools.pairwise(bounds))
    assert all(sum(lengths[a : b + 1]) > limit for a, b in itertools.pairwise(bounds[:-1]))
    pack = data.draw(st.integers(0, len(bounds) - 2))
    again = cut_packs(np.array(lengths[bounds[pack] :]), limit)
    assert (again + bounds[pack]).tolist() == bounds[pack:].tolist()


def test_positions_count_from_0_in_each_row_and_padding_is_no_row() -> None:
    laid = PackedTokens.lay_out(LENGTHS, BOUNDS)
    assert laid.shape == (2, 13)
    assert laid.positions_BL.tolist() == [
        [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 0, 1, 2, 3, 4, 0, 0, 0, 0, 0],
    ]
    assert laid.segments_BL.tolist() == [
        [1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3],
        [1, 1, 1, 2, 2, 2, 2, 2, *[NO_TOKEN] * 5],
    ]
    assert laid.places.tolist() == [*range(13), *range(13, 21)]


def test_the_block_mask_lets_tokens_see_their_own_row_alone() -> None:
    mask = block_mask(torch.tensor([[1, 1, 2, 0]]), torch.float32)
    assert mask.shape == (1, 1, 4, 4)
    assert (mask[0, 0] == 0).tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
    ]
    assert torch.isfinite(mask).all()


@pytest.mark.parametrize(("objective", "fields"), MODELS, ids=lambda value: str(value)[:24])
def test_a_row_in_a_pack_has_the_logits_that_plain_transformers_gives_it_alone(
    tmp_path: Path, objective: Objective, fields: dict[str, Any]
) -> None:
    model = make_model(objective, fields)
    rows = rows_of_tokens()
    with torch.no_grad():
        alone = [model(input_ids=row[None]).logits[0] for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path))
    student = LanguageStudent(model, tokenizer, objective).eval()
    laid, input_ids = lay_out(rows)
    positions, segments = torch.from_numpy(laid.positions_BL), torch.from_numpy(laid.segments_BL)
    packed = student.logits(input_ids, positions, segments).flatten(0, 1)[torch.from_numpy(laid.places)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-4)
    student.check_packing()


def test_rows_leak_into_each_other_where_transformers_gets_a_mask_beside_the_positions() -> None:
    model = make_model("causal", LLAMA)
    rows = rows_of_tokens()
    laid, input_ids = lay_out(rows)
    positions = torch.from_numpy(laid.positions_BL)
    with torch.no_grad():
        alone = torch.cat([model(input_ids=row[None]).logits[0] for row in rows])
        leaking = model(
            input_ids=input_ids,
            position_ids=positions,
            attention_mask=torch.from_numpy((laid.segments_BL > 0).astype(np.int64)),
            use_cache=False,
        ).logits
    packed = leaking.flatten(0, 1)[torch.from_numpy(laid.places)]
    assert (packed - alone).abs().max() > 0.1
