"""The multi-head student: building, heads, saving and opening."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from distill.export import fold_student, open_classifier
from distill.heads import HeadLayout, mean_probabilities
from distill.student import MultiHeadStudent
from schemas.errors import DataError, RecipeError, ResourceError
from schemas.job import StudentInit
from schemas.recipe import ConfigInit, LayersInit
from tests.distill.tiny_models import BERT, CONFIGS, TEXTS, config_init, save_classifier, save_tokenizer

HEADS = ("golden", "alice", "bob")
LABELS = ("relevant", "irrelevant")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("pretrained"), num_labels=3)


def build(tokenizer: Path, heads=HEADS, labels=LABELS, seed=3, kind="bert", **options) -> MultiHeadStudent:
    options.setdefault("max_length", 32)
    return MultiHeadStudent.from_init(config_init(tokenizer, kind), heads, labels, seed, **options).eval()


def logits(student: MultiHeadStudent) -> torch.Tensor:
    inputs = student.tokenizer(*map(list, zip(*TEXTS, strict=True)), padding=True, return_tensors="pt")
    with torch.inference_mode():
        return student(**inputs)


def later(path: Path) -> StudentInit:
    return StudentInit(kind="student", path=str(path), fingerprint="0" * 64)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_architecture_gives_one_row_of_logits_per_head(tokenizer: Path, kind: str):
    student = build(tokenizer, kind=kind)
    logits_BHC = logits(student)
    assert logits_BHC.shape == (len(TEXTS), 3, 2)
    # Each head is its own rows of the bank, over the same input.
    bank = student.bank
    seen: list[torch.Tensor] = []
    hook = bank.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    logits(student)
    hook.remove()
    for index in range(3):
        weight_CD, bias_C = bank.weight[bank.rows(index)], bank.bias[bank.rows(index)]
        with torch.inference_mode():
            torch.testing.assert_close(seen[0] @ weight_CD.T + bias_C, logits_BHC[:, index])


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "modernbert"])
def test_a_bank_as_wide_as_the_layer_below_it_is_not_mistaken_for_it(
    tokenizer: Path, tmp_path: Path, kind: str
):
    names = [f"teacher-{number}" for number in range(16)]
    student = build(tokenizer, names, kind=kind)
    assert student.bank.weight.shape == (32, 32)
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(MultiHeadStudent.from_pretrained(tmp_path)), logits(student))
    fold_student(student, tmp_path / "plain")
    plain = open_classifier(tmp_path / "plain", max_length=32)
    torch.testing.assert_close(logits(plain)[:, 0], logits(student).mean(dim=1))


def test_the_same_seed_gives_the_same_student(tokenizer: Path):
    first = build(tokenizer)
    # Whatever the state of torch's own generator.
    torch.rand(3)
    second, other = build(tokenizer), build(tokenizer, seed=4)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(logits(first), logits(other))


def test_building_a_student_leaves_the_random_state_of_torch_alone(tokenizer: Path):
    before = torch.get_rng_state()
    build(tokenizer)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_a_head_starts_the_same_whatever_other_heads_there_are(tokenizer: Path, kind: str):
    many, one = build(tokenizer, kind=kind), build(tokenizer, ("golden",), kind=kind)
    turned = build(tokenizer, ("bob", "golden"), kind=kind)
    torch.testing.assert_close(logits(many)[:, :1], logits(one))
    torch.testing.assert_close(logits(many)[:, 2], logits(turned)[:, 0])
    assert not torch.allclose(many.bank.weight[:2], many.bank.weight[2:4])


def test_first_layers_and_embeddings_and_pooler_come_from_the_pretrained_model(pretrained: Path):
    init = LayersInit(kind="layers", model=str(pretrained), layers=1)
    student = MultiHeadStudent.from_init(init, HEADS, LABELS, 3, max_length=32)
    theirs = load_file(pretrained / "model.safetensors")
    ours = student.skeleton.state_dict()
    copied = [name for name in ours if not name.startswith("classifier")]
    assert any("pooler" in name for name in copied)
    assert any("layer.0" in name for name in copied)
    assert not any("layer.1" in name for name in copied)
    for name in copied:
        assert torch.equal(ours[name], theirs[name]), name
    assert student.skeleton.config.num_hidden_layers == 1
    # The three-label head of the pretrained classifier is of no use.
    assert student.bank.weight.shape == (6, 32)


def test_all_layers_are_kept_when_no_number_is_given(pretrained: Path):
    student = MultiHeadStudent.from_init(
        LayersInit(kind="layers", model=str(pretrained)), HEADS, LABELS, 3, max_length=32
    )
    assert student.skeleton.config.num_hidden_layers == 2


def test_overrides_change_the_configuration_and_nothing_else(pretrained: Path):
    init = LayersInit(kind="layers", model=str(pretrained), overrides={"hidden_dropout_prob": 0.25})
    student = MultiHeadStudent.from_init(init, HEADS, LABELS, 3, max_length=32)
    assert student.skeleton.config.hidden_dropout_prob == 0.25
    plain = MultiHeadStudent.from_init(
        LayersInit(kind="layers", model=str(pretrained)), HEADS, LABELS, 3, max_length=32
    )
    for name, value in plain.state_dict().items():
        assert torch.equal(value, student.state_dict()[name]), name


def test_an_override_of_no_field_is_refused(pretrained: Path):
    init = LayersInit(kind="layers", model=str(pretrained), overrides={"hiden_dropout_prob": 0.0})
    with pytest.raises(RecipeError, match="hiden_dropout_prob"):
        MultiHeadStudent.from_init(init, HEADS, LABELS, 3, max_length=32)


def test_layers_of_modernbert_can_be_cut(tmp_path: Path):
    model = save_classifier(tmp_path, "modernbert", num_hidden_layers=4)
    init = LayersInit(kind="layers", model=str(model), layers=2)
    student = MultiHeadStudent.from_init(init, HEADS, LABELS, 3, max_length=32).eval()
    assert len(student.skeleton.config.layer_types) == 2
    student.save_pretrained(tmp_path / "student")
    assert torch.equal(logits(MultiHeadStudent.from_pretrained(tmp_path / "student")), logits(student))


def test_more_layers_than_the_model_has_are_refused(pretrained: Path):
    init = LayersInit(kind="layers", model=str(pretrained), layers=3)
    with pytest.raises(RecipeError, match=r"student\.init\.layers: .* has 2 layers, not 3"):
        MultiHeadStudent.from_init(init, HEADS, LABELS, 3)


def test_a_checkpoint_without_encoder_weights_is_refused(tmp_path: Path):
    model = save_classifier(tmp_path)
    weights = load_file(model / "model.safetensors")
    weights.pop("bert.encoder.layer.1.output.dense.weight")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    init = LayersInit(kind="layers", model=str(model), layers=2)
    with pytest.raises(DataError, match=r"lacks 1 weights .* bert\.encoder\.layer\.1\.output"):
        MultiHeadStudent.from_init(init, HEADS, LABELS, 3)
    cut = LayersInit(kind="layers", model=str(model), layers=1)
    MultiHeadStudent.from_init(cut, HEADS, LABELS, 3, max_length=32)


def test_building_a_student_prints_nothing(
    pretrained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    # The handler of transformers holds the stderr of its own first import, which capfd does not see.
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    transformers_logging.add_handler(handler)
    try:
        init = LayersInit(kind="layers", model=str(pretrained), layers=1)
        MultiHeadStudent.from_init(init, HEADS, LABELS, 3, max_length=32).save_pretrained(tmp_path)
        MultiHeadStudent.from_pretrained(tmp_path)
    finally:
        transformers_logging.remove_handler(handler)
    assert log.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_the_vocabulary_follows_the_tokenizer_unless_it_is_given(tokenizer: Path):
    assert build(tokenizer).skeleton.config.vocab_size == len(build(tokenizer).tokenizer)
    given = ConfigInit(kind="config", config={**BERT, "vocab_size": 99}, tokenizer=str(tokenizer))
    student = MultiHeadStudent.from_init(given, HEADS, LABELS, 3, max_length=32)
    assert student.skeleton.config.vocab_size == 99


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bertt"}, "model_type is 'bertt'"),
        ({}, "model_type is None"),
        ({**BERT, "vocab_size": 3}, "vocab_size is 3, but the tokenizer has"),
        ({**BERT, "hidden_size": 33}, "not a multiple"),
        ({**BERT, "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "vit"}, "makes no classifier"),
    ],
)
def test_a_configuration_that_makes_no_student_is_refused_in_one_short_line(
    tokenizer: Path, config: dict[str, object], message: str
):
    init = ConfigInit(kind="config", config=config, tokenizer=str(tokenizer))
    with pytest.raises(RecipeError, match=message) as caught:
        MultiHeadStudent.from_init(init, HEADS, LABELS, 3)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(("kind", "limit"), [("bert", 64), ("roberta", 63), ("distilbert", 64)])
def test_a_length_beyond_the_positions_is_refused(tokenizer: Path, kind: str, limit: int):
    student = build(tokenizer, kind=kind, max_length=limit)
    with torch.inference_mode():
        student(input_ids=torch.full((1, limit), 5), attention_mask=torch.ones(1, limit, dtype=torch.int64))
    with pytest.raises(RecipeError, match=f"positions for {limit} tokens"):
        build(tokenizer, kind=kind, max_length=limit + 1)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_a_saved_student_comes_back_with_the_same_logits(tokenizer: Path, tmp_path: Path, kind: str):
    student = build(tokenizer, kind=kind, prediction_heads=("alice", "bob"))
    student.save_pretrained(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "heads.json", "tokenizer.json"} <= names
    assert {Path(name).suffix for name in names} <= {".json", ".safetensors", ".jinja"}
    again = MultiHeadStudent.from_pretrained(tmp_path)
    assert again.layout == student.layout
    assert not again.training
    assert torch.equal(logits(again), logits(student))


def test_weights_from_elsewhere_are_saved_in_place_of_its_own(tokenizer: Path, tmp_path: Path):
    student, other = build(tokenizer), build(tokenizer, seed=9)
    student.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert torch.equal(logits(MultiHeadStudent.from_pretrained(tmp_path)), logits(other))


def test_heads_of_the_same_name_and_labels_carry_on_and_others_start_fresh(tokenizer: Path, tmp_path: Path):
    student = build(tokenizer)
    student.save_pretrained(tmp_path)
    init = later(tmp_path)
    following = MultiHeadStudent.from_init(init, ("golden", "bob", "carol"), LABELS, 11, max_length=32).eval()
    assert following.carried_heads == ("golden", "bob")
    torch.testing.assert_close(logits(following)[:, :2], logits(student)[:, [0, 2]])
    fresh = build(tokenizer, ("carol",), seed=11)
    torch.testing.assert_close(following.bank.weight[4:], fresh.bank.weight)


def test_a_carried_head_follows_its_labels_to_their_new_order(tokenizer: Path, tmp_path: Path):
    student = build(tokenizer)
    student.save_pretrained(tmp_path)
    init = later(tmp_path)
    turned = MultiHeadStudent.from_init(init, HEADS, LABELS[::-1], 11, max_length=32).eval()
    assert turned.carried_heads == HEADS
    torch.testing.assert_close(logits(turned).flip(-1), logits(student))


def test_no_head_carries_on_to_other_labels_but_the_encoder_does(tokenizer: Path, tmp_path: Path):
    student = build(tokenizer)
    student.save_pretrained(tmp_path)
    init = later(tmp_path)
    following = MultiHeadStudent.from_init(init, HEADS, ("yes", "no", "maybe"), 11, max_length=32)
    assert following.carried_heads == ()
    assert logits(following).shape == (len(TEXTS), 3, 3)
    for name, value in student.skeleton.base_model.state_dict().items():
        assert torch.equal(value, following.skeleton.base_model.state_dict()[name])


def test_the_prediction_is_the_mean_of_the_prediction_heads_probabilities(tokenizer: Path):
    # Odds 3:1 and 1:1: (3/4 + 1/2) / 2 = 5/8. The golden head, which would turn it over, is left out.
    logits_BHC = torch.tensor([[[0.0, 9.0], [3.0, 1.0], [1.0, 1.0]]]).log()
    student = build(tokenizer, prediction_heads=("alice", "bob"))
    expected_BC = torch.tensor([[0.625, 0.375]])
    torch.testing.assert_close(student.predict_proba(logits_BHC), expected_BC)
    torch.testing.assert_close(mean_probabilities(logits_BHC, (1, 2)), expected_BC)
    torch.testing.assert_close(student.predict_proba(logits_BHC, ("bob",)), torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize(
    ("heads", "labels", "prediction"),
    [
        (("a", "a"), LABELS, ("a",)),
        (("a",), ("x", "x"), ("a",)),
        (("a",), LABELS, ("b",)),
        (("a",), LABELS, ()),
    ],
)
def test_a_layout_with_double_or_unknown_names_is_refused(heads, labels, prediction):
    with pytest.raises(ValueError, match=r"distinct|no head|at least"):
        HeadLayout(heads=heads, labels=labels, prediction_heads=prediction, max_length=8)


def _edit_heads(path: Path) -> None:
    document = json.loads((path / "heads.json").read_text())
    document["labels"] = document["labels"][::-1]
    (path / "heads.json").write_text(json.dumps(document))


def _cut_weights(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def _drop_weight(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    weights.pop("classifier.bias")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "heads.json").unlink(), "is no student"),
        (_edit_heads, "does not match its own digest"),
        (lambda path: (path / "model.safetensors").unlink(), "weights cannot be loaded"),
        (_cut_weights, "weights cannot be loaded"),
        (_drop_weight, "classifier.bias"),
        (lambda path: (path / "config.json").unlink(), "no model configuration"),
        (lambda path: [file.unlink() for file in path.glob("tokenizer*")], "no tokenizer"),
    ],
)
def test_a_damaged_student_is_a_data_error_in_one_line(tokenizer: Path, tmp_path: Path, damage, message: str):
    build(tokenizer).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        MultiHeadStudent.from_pretrained(tmp_path)
    assert "\n" not in caught.value.message


def test_a_directory_that_cannot_be_written_is_a_resource_error(tokenizer: Path, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="cannot be written"):
        build(tokenizer).save_pretrained(tmp_path / "file")
