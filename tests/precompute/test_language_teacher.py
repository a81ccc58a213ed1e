"""A loaded language model: head by itself against the whole model, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from precompute.language_teacher import LoadedLanguageModel
from precompute.pretrained import check_length
from precompute.tasks import LanguageWorkerSpec
from schemas.errors import TeacherError
from schemas.language import Objective
from tests.precompute.tiny_language import PADDED_VOCAB, VOCAB, make_teacher, save_tiny_llama

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = SIZES | {"num_key_value_heads": 1} | MARKS


def spec_of(
    directory: Path, objective: Objective = "causal", vocab: int = VOCAB, **teacher: Any
) -> LanguageWorkerSpec:
    return LanguageWorkerSpec(
        make_teacher(directory, **teacher), str(directory), None, 1, "cpu", objective, vocab
    )


def make_opt() -> Any:
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    return OPTForCausalLM(OPTConfig(**sizes, **MARKS, ffn_dim=64, word_embed_proj_dim=32))


MODELS: dict[str, tuple[Objective, Any]] = {
    "llama": ("causal", lambda: LlamaForCausalLM(LlamaConfig(**SMALL))),
    "gpt2": (
        "causal",
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, **MARKS)),
    ),
    "soft cap": (
        "causal",
        lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=0.05)),
    ),
    "scaled up": ("causal", lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.3))),
    "scaled down": ("causal", lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0))),
    "experts": ("causal", lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2))),
    "decoder inside": ("causal", make_opt),
    "bert": ("masked", lambda: BertForMaskedLM(BertConfig(**SIZES))),
    "roberta": ("masked", lambda: RobertaForMaskedLM(RobertaConfig(**SIZES))),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_head_over_pieces_gives_what_the_whole_model_gives(name: str, tmp_path: Path) -> None:
    objective, make = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path)
    # Gemma's other soft cap has no place in the fused attention.
    attention = "eager" if name == "soft cap" else "sdpa"
    teacher = LoadedLanguageModel.load(spec_of(tmp_path, objective, 100, attention=attention))
    ids_BL = torch.randint(3, 100, (2, 7))
    with torch.no_grad():
        expected_BLW = model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL)).logits
    output = teacher.encode(ids_BL, torch.ones_like(ids_BL))
    pieces = [teacher.predict(output, part) for part in output.last_hidden_state.flatten(0, 1).split(3)]
    torch.testing.assert_close(torch.cat(pieces), expected_BLW.flatten(0, 1), rtol=1e-5, atol=1e-5)
    assert teacher.num_logits == 100
    # The model is as it was: nothing answers for its base any more.
    with torch.no_grad():
        torch.testing.assert_close(teacher.model(input_ids=ids_BL).logits, expected_BLW)


def test_a_padded_vocabulary_is_told_from_the_true_one(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    assert LoadedLanguageModel.load(spec_of(tmp_path)).num_logits == PADDED_VOCAB
    with pytest.raises(TeacherError, match=f"gives {PADDED_VOCAB} logits, the chunks' tokenizer has 81"):
        LoadedLanguageModel.load(spec_of(tmp_path, vocab=PADDED_VOCAB + 1))


def test_a_checkpoint_without_an_output_head_is_refused(tmp_path: Path) -> None:
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=r"checkpoint lacks .*no trained masked language model"):
        LoadedLanguageModel.load(spec_of(tmp_path, "masked", 100))


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TeacherError, match="teacher tiny: cannot be loaded"):
        LoadedLanguageModel.load(spec_of(tmp_path))


def test_a_head_that_uses_more_than_the_base_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_llama(tmp_path)
    original = LlamaForCausalLM.forward

    def forward(self: Any, input_ids: Any = None, **options: Any) -> Any:
        output = original(self, input_ids=input_ids, **options)
        output.logits = output.logits + self.get_input_embeddings()(input_ids).sum(-1, keepdim=True)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(TeacherError, match="cannot be run apart from the model"):
        LoadedLanguageModel.load(spec_of(tmp_path))


def test_a_model_keeps_no_keys_and_values(tmp_path: Path) -> None:
    teacher = LoadedLanguageModel.load(spec_of(save_tiny_llama(tmp_path)))
    ids_BL = torch.ones(1, 4, dtype=torch.int64)
    assert teacher.encode(ids_BL, torch.ones_like(ids_BL)).past_key_values is None


@pytest.mark.parametrize(("given", "expected"), [(None, 0), (3, 3), (-1, 0), (PADDED_VOCAB, 0)])
def test_a_padding_token_that_has_no_embedding_is_not_used(
    given: int | None, expected: int, tmp_path: Path
) -> None:
    teacher = LoadedLanguageModel.load(spec_of(save_tiny_llama(tmp_path)))
    # As some old checkpoints of Llama say.
    teacher.model.config.pad_token_id = given
    assert teacher.padding_token == expected


def test_a_dtype_is_that_of_the_recipe(tmp_path: Path) -> None:
    teacher = LoadedLanguageModel.load(spec_of(save_tiny_llama(tmp_path), dtype="bfloat16"))
    assert teacher.model.dtype == torch.bfloat16


def test_chunks_that_are_longer_than_the_model_are_refused(tmp_path: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path)).config
    check_length(config, 64, "tiny")
    with pytest.raises(TeacherError, match="max_length is 65, the model has 64 positions"):
        check_length(config, 65, "tiny")
