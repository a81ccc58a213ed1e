"""Each kind of wrong input to a language recipe through the command line: exit code, one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import yaml
from safetensors.torch import load_file, save_file

from cluster.cli import run_command
from distill.token_store import TokenStore
from schemas.list_column import make_list, view_list
from tests.cluster.language.project_stores import LanguageStoresOnDisk, make_language_stores
from tests.cluster.project_stores import ProjectStores, make_project_stores, use_here_pool
from tests.end_to_end.language_project import LanguageProject
from tests.precompute.tiny_language import VOCAB, WORDS, make_tokenizer, save_tiny_llama
from tests.store_factory import write_store

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process computes shards, in place of Ray."""
    use_here_pool(monkeypatch)


@pytest.fixture
def project(tmp_path: Path) -> LanguageProject:
    return LanguageProject(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> LanguageStoresOnDisk:
    return make_language_stores(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> ProjectStores:
    return make_project_stores(tmp_path_factory.mktemp("classifiers"))


def fail(arguments: list[str], capsys: Capture) -> tuple[int, str]:
    """Runs a command and returns its exit code and the one line that says what is wrong."""
    capsys.readouterr()
    code = run_command(arguments)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("tmkd: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return code, lines[0]


def no_shard(root: Path) -> bool:
    """Tells that no shard was computed and no step was done."""
    return not [*root.glob("runs/stores/*/data/*.arrow"), *root.glob("runs/**/metrics.jsonl")]


def given(*stores: str | Path, **changes: Any) -> dict[str, Any]:
    """Returns a recipe's changes: its one teacher has finished stores."""
    stage = {"corpus": "train", "teachers": ["kept"], "losses": [{"name": "ghost_kl"}], "max_steps": 1}
    teacher = {"name": "kept", "stores": [str(store) for store in stores]}
    return {"teachers": [teacher], "stages": [stage | changes], "compare": {}, "evaluation": {}}


# Tokenizers


def test_a_teacher_with_another_tokenizer_is_refused(project: LanguageProject, capsys: Capture) -> None:
    swapped = make_tokenizer(words=(WORDS[1], WORDS[0], *WORDS[2:]))
    other = save_tiny_llama(project.root / "other", tokenizer=swapped)
    code, line = fail(["precompute", project.recipe(), "--set", f"teachers.drawn.model={other}"], capsys)
    assert code == 2
    assert "teachers.drawn.model: its tokenizer is not the one that the corpus was cut" in line
    assert "name models that do" in line
    assert no_shard(project.root)


def test_a_student_with_another_tokenizer_is_refused_before_a_teacher_runs(
    project: LanguageProject, capsys: Capture
) -> None:
    swapped = make_tokenizer(words=(WORDS[1], WORDS[0], *WORDS[2:]))
    other = save_tiny_llama(project.root / "other", tokenizer=swapped)
    code, line = fail(["run", project.recipe(), "--set", f"student.init.model={other}"], capsys)
    assert (code, "student must share one" in line) == (2, True), line
    assert no_shard(project.root)


# Vocabularies


def test_a_teacher_with_fewer_logits_than_tokens_is_refused(
    project: LanguageProject, capsys: Capture
) -> None:
    save_tiny_llama(project.root / "small", vocab=VOCAB - 3)
    recipe = project.recipe()
    code, line = fail(["precompute", recipe, "--set", f"teachers.head.model={project.root}/small"], capsys)
    assert code == 5
    assert f"teacher head: it gives {VOCAB - 3} logits, the chunks' tokenizer has {VOCAB} tokens" in line
    assert "name a model with its own tokenizer" in line
    assert no_shard(project.root)


def test_a_student_with_a_smaller_vocabulary_is_refused_before_a_teacher_runs(
    project: LanguageProject, capsys: Capture
) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCAB - 1,
    }
    init = {"kind": "config", "config": config, "tokenizer": str(project.model)}
    recipe = project.recipe(student={"init": init, "max_length": 32})
    code, line = fail(["run", recipe], capsys)
    assert code == 2
    assert f"student.init.config.vocab_size: is {VOCAB - 1}, the tokenizer has {VOCAB} tokens" in line
    assert no_shard(project.root)


# Policies, temperatures, losses


@pytest.mark.parametrize(
    ("keep", "name"),
    [
        ("{kind: top_k, k: 74}", "k is 74"),
        ("{kind: top_p, p: 0.9, k_max: 80}", "k_max is 80"),
        ("{kind: hybrid, k: 70, m: 4}", "k + m is 74"),
    ],
)
def test_a_policy_that_keeps_more_than_the_vocabulary_is_refused(
    project: LanguageProject, capsys: Capture, keep: str, name: str
) -> None:
    losses = "[{name: ghost_kl}]"
    arguments = ["precompute", project.recipe(), "--set", f"teachers.head.keep={keep}"]
    code, line = fail([*arguments, "--set", f"stages.0.losses={losses}"], capsys)
    assert code == 2
    assert f"teachers.head.keep: {name}, above the vocabulary of {VOCAB} tokens; lower it" in line
    assert no_shard(project.root)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stages.0.losses.0.temperature=3",
            "temperature 3 of ghost_kl is not in the grid of teacher head (1, 2); use one of these",
        ),
        (
            "stages.0.teachers=[drawn]",
            "the sampled store of teacher drawn is unbiased at temperature 1 only, not at 2",
        ),
        ("stages.0.losses=[{name: unbiased_kl}]", "unbiased_kl is biased on the top_k store of teacher head"),
    ],
)
def test_losses_that_a_policy_does_not_fit_are_refused(
    project: LanguageProject, capsys: Capture, override: str, message: str
) -> None:
    code, line = fail(["run", project.recipe(), "--set", override], capsys)
    assert (code, message in line) == (2, True), line
    assert not (project.root / "runs").exists()


# Documents


def test_empty_documents_are_left_out_and_counted(project: LanguageProject, capsys: Capture) -> None:
    project.write_documents("train", ["w1 w2 w3", "", "  ", "w4 w5"])
    assert run_command(["precompute", project.recipe()]) == 0
    assert "train: 2 empty documents left out" in capsys.readouterr().err


def test_a_corpus_of_empty_documents_is_refused(project: LanguageProject, capsys: Capture) -> None:
    project.write_documents("train", ["", " \n"])
    code, line = fail(["precompute", project.recipe()], capsys)
    assert code == 3
    assert "corpus train/train: has no document that is not empty; give it texts, or leave it out" in line


def test_a_corpus_without_a_token_to_predict_is_refused(project: LanguageProject, capsys: Capture) -> None:
    project.write_documents("train", ["w1", "w2"])
    recipe = project.recipe(corpora={n: {**project.corpus(n), "add_special_tokens": False} for n in CORPORA})
    code, line = fail(["precompute", recipe], capsys)
    assert code == 3
    assert "corpus train/train: no document gives a chunk of two tokens with one to predict" in line


CORPORA = ("train", "test")


# Logits


def test_a_teacher_that_gives_nan_is_named_with_its_rows(project: LanguageProject, capsys: Capture) -> None:
    spoil_word(project, token=7 + 59)
    project.write_documents("train", ["w1 w2 w3", "w4 w5 w6", "w7 w59 w8"])
    code, line = fail(["precompute", project.recipe()], capsys)
    assert code == 5
    assert "teacher head, shard 0: logits are not finite for train/train row train/2#0" in line
    assert "set on_bad_row: exclude to leave such rows out" in line
    corpora = {name: {**project.corpus(name), "on_bad_row": "exclude"} for name in CORPORA}
    assert run_command(["precompute", project.recipe(corpora=corpora)]) == 0
    (store, *_) = (project.root / "runs" / "stores").iterdir()
    (excluded,) = json.loads((store / "manifest.json").read_text())["excluded"]
    assert excluded["example_id"] == "train/2#0"


def spoil_word(project: LanguageProject, token: int) -> None:
    path = project.model / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})


# Given stores


def test_a_store_of_classification_rows_is_refused_by_a_language_recipe(
    project: LanguageProject, classifiers: ProjectStores, capsys: Capture
) -> None:
    store = classifiers.roots["second", "train"]
    code, line = fail(["run", project.recipe(**given(store))], capsys)
    assert code == 4
    assert f"the store {store} is of level classification, this recipe needs one of level token" in line
    assert "name another in its `stores`" in line
    assert no_shard(project.root)


def test_a_token_level_store_is_refused_by_a_classifiers_recipe(
    made: LanguageStoresOnDisk, classifiers: ProjectStores, tmp_path: Path, capsys: Capture
) -> None:
    document = yaml.safe_load(Path(classifiers.recipe_path).read_text())
    document["teachers"][1] = {"name": "second", "stores": [made.roots["head"]]}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**document, "out": str(tmp_path / "runs")}))
    code, line = fail(["run", str(recipe)], capsys)
    assert code == 4
    assert "is of level token, this recipe needs one of level classification" in line
    assert no_shard(tmp_path)


def test_a_store_of_other_documents_is_refused(
    made: LanguageStoresOnDisk, project: LanguageProject, capsys: Capture
) -> None:
    project.write_documents("train", ["w1 w2 w3", "w4 w5 w6"])
    code, line = fail(["run", project.recipe(**given(made.roots["head"]))], capsys)
    assert code == 3
    assert "teacher kept: none of its stores covers train/train" in line
    assert "add one to its `stores`" in line
    assert no_shard(project.root)


def test_a_store_of_chunks_of_another_length_is_refused(
    made: LanguageStoresOnDisk, project: LanguageProject, capsys: Capture
) -> None:
    recipe = project.recipe(**given(made.roots["head"]))
    code, line = fail(["run", recipe, "--set", "corpora.train.max_length=12"], capsys)
    assert code == 4
    assert "teacher kept: its stores are of other chunks than train/train" in line
    assert "max_length: 16 -> 12" in line
    assert no_shard(project.root)


def test_a_store_of_another_tokenizer_and_vocabulary_is_refused(
    made: LanguageStoresOnDisk, project: LanguageProject, capsys: Capture
) -> None:
    save_tiny_llama(project.model, tokenizer=make_tokenizer(words=(*WORDS, "more")))
    code, line = fail(["run", project.recipe(**given(made.roots["head"]))], capsys)
    # The same documents give the same ids: only what made them says that they are others.
    assert code == 4
    assert "teacher kept: its stores are of other chunks than train/train" in line
    assert "tokenizer: " in line
    assert f"vocab: {VOCAB} -> {VOCAB + 1}" in line
    assert no_shard(project.root)


def test_a_store_of_the_other_objective_is_refused(
    made: LanguageStoresOnDisk, tmp_path: Path, capsys: Capture
) -> None:
    project = LanguageProject(tmp_path, "masked")
    code, line = fail(["run", project.recipe(**given(made.roots["head"]))], capsys)
    assert code == 4
    assert "objective: causal -> masked" in line
    assert no_shard(project.root)


@pytest.mark.parametrize(
    ("teacher", "loss", "message"),
    [
        ("head", {"name": "ghost_kl", "temperature": 3.0}, "temperature 3 of ghost_kl is not in the grid"),
        ("head", {"name": "unbiased_kl"}, "unbiased_kl is biased on the top_k store of teacher kept"),
        ("drawn", {"name": "unbiased_kl", "temperature": 2.0}, "is unbiased at temperature 1 only, not at 2"),
    ],
)
def test_a_given_store_that_a_loss_does_not_fit_is_refused_at_planning(
    made: LanguageStoresOnDisk,
    project: LanguageProject,
    capsys: Capture,
    teacher: str,
    loss: dict[str, Any],
    message: str,
) -> None:
    recipe = project.recipe(**given(made.roots[teacher], losses=[loss]))
    code, line = fail(["run", recipe], capsys)
    assert (code, message in line) == (2, True), line
    assert "use " in line or "keep " in line
    assert no_shard(project.root)


def test_a_given_store_that_fits_is_taken(
    made: LanguageStoresOnDisk, project: LanguageProject, capsys: Capture
) -> None:
    recipe = project.recipe(**given(made.roots["head"], losses=[{"name": "ghost_kl", "temperature": 2.0}]))
    assert run_command(["precompute", recipe]) == 0
    lock = json.loads((project.run / "stores.lock.json").read_text())
    assert lock["corpora"]["train"][0]["stores"] == {"kept": made.roots["head"]}


# What lies in a store


def test_a_kept_id_out_of_range_is_named_before_a_step(
    made: LanguageStoresOnDisk, tmp_path: Path, project: LanguageProject, capsys: Capture
) -> None:
    root = forge_ids(Path(made.roots["head"]), tmp_path / "forged")
    assert run_command(["store", "verify", str(root), "--deep"]) == 3
    assert f"is out of range; the vocabulary has {VOCAB} tokens" in capsys.readouterr().err
    code, line = fail(["run", project.recipe(**given(root))], capsys)
    assert code == 3
    assert "rows do not decode: a kept id" in line or "is out of range" in line
    assert f"the vocabulary has {VOCAB} tokens" in line
    assert "tmkd store repair" in line
    assert no_shard(project.root)


def forge_ids(source: Path, root: Path) -> Path:
    """Writes a store whose hashes are right and all of whose kept ids have every bit set."""
    honest = TokenStore.open(source)
    batches = [columns.batch for shard in range(len(honest.records)) for columns in honest.read_shard(shard)]
    whole = pa.Table.from_batches(batches)

    def make_rows(rows: npt.NDArray[np.int64]) -> pa.RecordBatch:
        (batch,) = whole.take(pa.array(rows)).combine_chunks().to_batches()
        planes, bounds = view_list(batch.column("ids"), np.uint8)
        forged = make_list(np.full_like(planes, 255), bounds)
        return batch.set_column(batch.schema.get_field_index("ids"), batch.schema.field("ids"), forged)

    return write_store(root, honest.plan, honest.identity, make_rows)
