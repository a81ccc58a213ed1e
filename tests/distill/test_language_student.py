from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertTokenizer,
    LlamaForCausalLM,
    ModernBertConfig,
    PreTrainedTokenizerFast,
)

from distill.language_model import build_language_model, choose_layers
from distill.language_student import LanguageStudent, as_losses
from distill.stored_targets import StoredTargets
from distill.token_losses import LossSpec, LossTerm
from schemas.errors import DataError, RecipeError, RefusedError
from schemas.job import StudentInit
from schemas.language import LanguageConfigInit, LanguageLayersInit
from tests.distill.tiny_models import PIECES, save_tokenizer
from tests.tiny_language import LLAMA, VOCAB, TinyLanguage

AUTO: dict[str, Any] = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}
IDS = torch.tensor([[7, 12, 9, 20, 5, 11]])
POSITIONS = torch.arange(6)[None]
SEGMENTS = torch.ones(1, 6, dtype=torch.int64)


@pytest.fixture(scope="module", params=["causal", "masked"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyLanguage:
    return TinyLanguage(tmp_path_factory.mktemp("language"), request.param)


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> TinyLanguage:
    return TinyLanguage(tmp_path_factory.mktemp("language"))


def save_model(stage: TinyLanguage, directory: Path, **config: Any) -> Path:
    job = stage.job("made", config=config)
    LanguageStudent.from_job(job).save_pretrained(directory)
    return directory


def plain(stage: TinyLanguage, directory: Path) -> Any:
    return AUTO[stage.objective].from_pretrained(directory).eval()


def test_losses_are_those_of_the_plain_models_logits(stage: TinyLanguage, tmp_path: Path) -> None:
    student = LanguageStudent.from_job(stage.job("a")).eval()
    student.save_pretrained(tmp_path)
    places, targets = torch.tensor([1, 3, 4]), torch.tensor([8, 9, 10])
    spec = LossSpec((LossTerm("cross_entropy"),))
    stored = (StoredTargets.of_tokens(targets, VOCAB),)
    found = as_losses(student(IDS, POSITIONS, SEGMENTS, places, stored, spec))
    with torch.no_grad():
        logits = plain(stage, tmp_path)(input_ids=IDS).logits[0, places]
    expected = nn.functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=1e-5)
    found.total.backward()
    assert all(
        parameter.grad is not None for name, parameter in student.named_parameters() if "layers.0" in name
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_student_opens_in_plain_transformers_with_the_same_logits(
    stage: TinyLanguage, tmp_path: Path, tied: bool
) -> None:
    student = LanguageStudent.from_job(stage.job("a", config={"tie_word_embeddings": tied})).eval()
    before = student.logits(IDS, POSITIONS, SEGMENTS)
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    student.save_pretrained(tmp_path, state_dict=weights)
    with torch.no_grad():
        torch.testing.assert_close(plain(stage, tmp_path)(input_ids=IDS).logits, before, rtol=1e-5, atol=1e-5)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    # A weight that is tied is written once.
    written = load_file(tmp_path / "model.safetensors")
    assert sum(value.numel() for value in written.values()) == student.num_parameters
    # Saving leaves the student as it was.
    assert torch.equal(student.logits(IDS, POSITIONS, SEGMENTS), before)
    job = stage.job("b", init=StudentInit(kind="student", path=str(tmp_path), fingerprint="f"))
    again = LanguageStudent.from_job(job).eval()
    assert torch.equal(again.logits(IDS, POSITIONS, SEGMENTS), before)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == student.tokenizer.get_vocab()


def test_layers_are_taken_from_the_front_or_spread_from_the_first_to_the_last() -> None:
    assert choose_layers(12, 3, "first") == [0, 1, 2]
    assert choose_layers(12, 3, "spread") == [0, 6, 11]
    assert choose_layers(12, 12, "spread") == list(range(12))
    assert choose_layers(12, 1, "spread") == [0]
    assert len(set(choose_layers(30, 29, "spread"))) == 29
    with pytest.raises(RecipeError, match="the model has 4 layers, not 5"):
        choose_layers(4, 5, "first")


def test_a_cut_down_copy_has_the_chosen_layers_and_all_that_lies_round_them(
    stage: TinyLanguage, tmp_path: Path
) -> None:
    whole = save_model(stage, tmp_path / "whole", num_hidden_layers=5)
    init = LanguageLayersInit(kind="layers", model=str(whole), layers=3, take="spread")
    LanguageStudent.from_job(stage.job("a", init=init)).save_pretrained(tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["num_hidden_layers"] == 3
    cut = plain(stage, tmp_path / "cut")
    expected = plain(stage, whole)
    stack = next(
        module for module in expected.modules() if isinstance(module, nn.ModuleList) and len(module) == 5
    )
    for place, layer in enumerate((0, 2, 4)):
        stack[place] = stack[layer]
    del stack[3:]
    expected.config.num_hidden_layers = 3
    with torch.no_grad():
        # Caches are by layer number, which a moved layer keeps.
        cache = {"use_cache": False} if stage.objective == "causal" else {}
        torch.testing.assert_close(
            cut(input_ids=IDS).logits, expected(input_ids=IDS, **cache).logits, rtol=1e-5, atol=1e-5
        )


def test_what_a_configuration_says_of_each_layer_goes_with_the_layer(
    causal: TinyLanguage, tmp_path: Path
) -> None:
    # Of every fourth layer SmolLM3 rotates nothing.
    smollm3 = {"model_type": "smollm3", "num_hidden_layers": 5, "no_rope_layers": [1, 0, 0, 1, 0]}
    whole = save_model(causal, tmp_path / "whole", **smollm3)
    init = LanguageLayersInit(kind="layers", model=str(whole), layers=3, take="spread")
    cut = LanguageStudent.from_job(causal.job("a", init=init)).model
    assert cut.config.no_rope_layers == [1, 0, 0]
    assert [layer.self_attn.use_rope for layer in cut.model.layers] == [1, 0, 0]


def test_the_same_seed_gives_the_same_student(causal: TinyLanguage) -> None:
    one, two, other = (
        LanguageStudent.from_job(causal.job("a", seed=seed)).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_embeddings_can_be_frozen(causal: TinyLanguage) -> None:
    student = LanguageStudent.from_job(causal.job("a", freeze_embeddings=True))
    frozen = [name for name, parameter in student.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.model.embed_tokens.weight"]


def test_another_tokenizer_than_the_chunks_is_refused_in_one_line(
    causal: TinyLanguage, tmp_path: Path
) -> None:
    swapped = [*PIECES[:-2], PIECES[-1], PIECES[-2]]
    BertTokenizer(vocab={piece: place for place, piece in enumerate(swapped)}).save_pretrained(tmp_path)
    init = LanguageConfigInit(kind="config", config=LLAMA, tokenizer=str(tmp_path))
    with pytest.raises(RefusedError, match="another tokenizer than the teachers and the chunks") as caught:
        LanguageStudent.from_job(causal.job("a", init=init))
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_is_too_small_is_refused_and_a_padded_one_is_not(causal: TinyLanguage) -> None:
    with pytest.raises(
        RefusedError, match=f"{VOCAB - 1} tokens in its vocabulary, the teachers have {VOCAB}"
    ):
        LanguageStudent.from_job(causal.job("a", config={"vocab_size": VOCAB - 1}))
    padded = LanguageStudent.from_job(causal.job("a", config={"vocab_size": VOCAB + 6}))
    assert padded.head.weight.shape[0] == VOCAB + 6


def test_a_random_model_has_room_for_the_tokenizers_highest_id() -> None:
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 9}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    init = LanguageConfigInit(kind="config", config=LLAMA, tokenizer="unread")
    assert len(tokenizer) == 3
    assert build_language_model(init, "causal", tokenizer, 0).config.vocab_size == 10


def test_sequences_longer_than_the_models_positions_are_an_error(causal: TinyLanguage) -> None:
    with pytest.raises(RecipeError, match="max_length is 65, but the encoder has positions for 64"):
        LanguageStudent.from_job(causal.job("a", max_length=65))


class Masked(LlamaForCausalLM):
    """Adds a mask to the positions, as callers do: rows of a pack see each other."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, use_cache: Any = None) -> Any:
        mask = torch.ones_like(input_ids)
        return super().forward(input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False)


class Scaled(LlamaForCausalLM):
    """Does something to its logits that its configuration does not say."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, use_cache: Any = None) -> Any:
        found = super().forward(input_ids, position_ids=position_ids, use_cache=use_cache)
        found.logits = found.logits * 1.5
        return found


def plain_parts(causal: TinyLanguage) -> tuple[Any, Any]:
    student = LanguageStudent.from_job(causal.job("a"))
    student.model.set_submodule(student._head_name, student._linear[0])
    return student.model, student.tokenizer


def test_a_model_whose_rows_see_each_other_in_a_pack_is_refused(causal: TinyLanguage) -> None:
    model, tokenizer = plain_parts(causal)
    model.__class__ = Masked
    student = LanguageStudent(model, tokenizer, "causal")
    with pytest.raises(RecipeError, match="rows of a pack see each other in a llama"):
        student.check_packing()


def test_a_model_that_makes_its_logits_in_another_way_is_refused(causal: TinyLanguage) -> None:
    model, tokenizer = plain_parts(causal)
    model.__class__ = Scaled
    with pytest.raises(RecipeError, match="a llama makes its logits in a way that is not known"):
        LanguageStudent(model, tokenizer, "causal")


def test_a_masked_model_with_layers_of_a_window_is_refused() -> None:
    # The mask that keeps rows apart would replace the window, which a short probe does not show.
    config = ModernBertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    model = AutoModelForMaskedLM.from_config(config)
    with pytest.raises(RecipeError, match="layers of a modernbert see a window of tokens"):
        LanguageStudent(model, None, "masked")


def test_a_checkpoint_without_a_head_or_a_config_of_no_model_is_an_error(
    causal: TinyLanguage, tmp_path: Path
) -> None:
    save_tokenizer(tmp_path / "empty")
    for init, error in (
        (LanguageLayersInit(kind="layers", model=str(tmp_path / "empty")), DataError),
        (
            LanguageConfigInit(kind="config", config={"model_type": "no"}, tokenizer=str(causal.tokenizer)),
            RecipeError,
        ),
    ):
        with pytest.raises(error):
            LanguageStudent.from_job(causal.job("a", init=init))
