from pathlib import Path

import numpy as np
import pytest
import yaml

from cluster.language.planning import PlannedText, plan_chunks, say_dropped
from cluster.run_directory import RunDirectory
from schemas.chunks import open_chunks
from schemas.errors import CorpusError, RecipeError, RefusedError
from schemas.language import LanguageRecipe
from tests.end_to_end.language_project import LanguageProject
from tests.precompute.tiny_language import make_documents, make_tokenizer, save_tiny_llama


@pytest.fixture
def project(tmp_path: Path) -> LanguageProject:
    return LanguageProject(tmp_path)


def plan(project: LanguageProject, **changes: object) -> dict[str, PlannedText]:
    recipe = LanguageRecipe.model_validate(yaml.safe_load(Path(project.recipe(**changes)).read_text()))
    directory = RunDirectory.of(recipe)
    directory.run.mkdir(parents=True, exist_ok=True)
    return plan_chunks(recipe, directory)


def test_corpora_are_cut_by_the_students_tokenizer(project: LanguageProject) -> None:
    found = plan(project)
    assert list(found) == ["train", "test"]
    tokenizer = make_tokenizer()
    (part,) = found["test"].parts
    spec, table = open_chunks(part.rows_path)
    assert spec == found["test"].spec == found["train"].spec
    assert spec.vocab == len(tokenizer)
    documents = make_documents(8, seed=2)
    pieces = table.column("input_ids").to_pylist()
    assert pieces[0] == tokenizer(documents[0])["input_ids"][:16]


def test_documents_of_an_evaluation_corpus_are_not_trained_on(
    project: LanguageProject, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = make_documents(30, seed=1), make_documents(8, seed=2)
    assert plan(project)["train"].dropped_rows is None
    longest = max(test, key=len)
    project.write_documents("train", [*train[:3], longest, *train[3:], ""])
    found = plan(project, name="other")["train"]
    (part,) = found.parts
    assert found.dropped_rows is not None
    rows = np.load(found.dropped_rows)
    ids = open_chunks(part.rows_path)[1].column("example_id").to_pylist()
    owners = {name.rsplit("#", 1)[0] for name in ids}
    dropped = {ids[row].rsplit("#", 1)[0] for row in rows}
    (shared,) = dropped
    assert shared == "train/3"
    assert len(rows) == found.num_dropped == sum(name.startswith("train/3#") for name in ids) > 1
    assert len(owners) > 1
    say_dropped({"train": found})
    said = capsys.readouterr().err
    assert f"dropped {len(rows)} chunks of documents of an evaluation corpus" in said
    assert "1 empty documents left out" in said


def test_a_corpus_of_evaluation_documents_alone_is_refused(project: LanguageProject) -> None:
    project.write_documents("train", make_documents(8, seed=2)[:5])
    with pytest.raises(RecipeError, match=r"stages.0.corpus: all documents of train are those of an evalu"):
        plan(project)


def test_chunks_longer_than_the_students_sequences_are_refused(project: LanguageProject) -> None:
    init = {"kind": "layers", "model": str(project.model)}
    with pytest.raises(RecipeError, match=r"corpora.train.max_length: chunks of 16 tokens .* sequences of 8"):
        plan(project, student={"init": init, "max_length": 8})


def test_a_corpus_that_changed_since_the_run_was_planned_is_refused(project: LanguageProject) -> None:
    plan(project)
    project.write_documents("train", make_documents(30, seed=9))
    with pytest.raises(RefusedError, match="corpus train/train has changed since this run was planned"):
        plan(project)


def test_a_tokenizer_that_changed_is_another_corpus(project: LanguageProject) -> None:
    plan(project)
    words = [f"w{i}" for i in reversed(range(60))]
    save_tiny_llama(project.model, tokenizer=make_tokenizer(words=words))
    # Another file of the same path: nothing of the old one may be remembered.
    with pytest.raises(RefusedError, match="has changed since this run was planned"):
        plan(project)


def test_a_corpus_without_a_document_is_refused(project: LanguageProject) -> None:
    project.write_documents("train", ["", " "])
    with pytest.raises(CorpusError, match="corpus train"):
        plan(project)
