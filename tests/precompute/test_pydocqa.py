"""Tests of the built-in corpus `pydocqa`."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from precompute.pydocqa import LABELS, SPLITS, Pair, build_pairs

LABELLED = ("train", "validation", "test")
EVALUATION = ("validation", "test")
REPOSITORY = Path(__file__).parents[2]

PRINT_DIGESTS = """
import sys
from hashlib import sha256
from precompute.pydocqa import SPLITS, build_pairs
for split in SPLITS:
    text = repr([(p.example_id, p.question, p.passage, p.label) for p in build_pairs(split)])
    sys.stdout.write(sha256(text.encode()).hexdigest() + "\\n")
unwanted = {"torch", "ray", "transformers", "tkinter", "nntplib", "turtle", "smtpd"}
loaded = unwanted & set(sys.modules)
sys.stdout.write(",".join(sorted(loaded)))
"""

SHUTIL = '''
"""Utility functions for copying and archiving files."""
raise SystemExit("imported")

class CopyJob:
    """CopyJob(src, dst=(1, 2)) -> job

    A job that copies `src`. It is slow."""

    def runNow(self):
        """runNow() -- Run the job at once, e.g. in tests."""

if True:
    def copy_tree(a, b):
        """copy_tree(a, b,
        c) is odd."""

def copymode(src, dst):
    """Copy the mode bits from one file to another."""
    def inner():
        """A local function that nobody sees."""

def again():
    """copy the mode bits from one file to another"""

def short():
    """Too short."""

def status():
    """(typ, [data]) = <instance>.status(name)

    Ask the server for its status."""
'''


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Pair]]:
    return {split: build_pairs(split) for split in SPLITS}


@pytest.fixture
def small_library(tmp_path: Path) -> Path:
    (tmp_path / "shutil.py").write_text(SHUTIL, encoding="utf-8")
    (tmp_path / "broken.py").write_text("def broken(:", encoding="utf-8")
    for folder in ("test", "site-packages"):
        (tmp_path / folder).mkdir()
        hidden = f'"""A file of {folder} that is skipped."""'
        (tmp_path / folder / "hidden.py").write_text(hidden, encoding="utf-8")
    return tmp_path


def collect_passages(library: Path) -> dict[str, str]:
    """Returns the relevant passage of every question of a small library, by qualified name."""
    found = {}
    for split in LABELLED:
        for pair in build_pairs(split, stdlib_dir=library):
            if pair.label == LABELS.index("relevant"):
                found[pair.example_id.split("/")[1]] = pair.passage
    for pair in build_pairs("unlabelled", stdlib_dir=library):
        found.setdefault(pair.example_id.split("/")[1], "")
    return found


def test_pairs_are_the_same_in_another_process(splits: dict[str, list[Pair]]) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", PRINT_DIGESTS],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=REPOSITORY,
    )
    *digests, loaded = done.stdout.split("\n")
    assert loaded == ""
    for split, digest in zip(SPLITS, digests, strict=True):
        rows = [(p.example_id, p.question, p.passage, p.label) for p in splits[split]]
        assert hashlib.sha256(repr(rows).encode()).hexdigest() == digest, split


def test_library_files_are_parsed_and_never_imported(small_library: Path) -> None:
    # The small library raises SystemExit at import; the real one is checked in another process.
    assert "shutil.copymode" in collect_passages(small_library)


def test_no_question_and_no_passage_is_in_two_splits(splits: dict[str, list[Pair]]) -> None:
    for evaluation in EVALUATION:
        for attribute in ("question", "passage"):
            held_out = {getattr(pair, attribute).lower() for pair in splits[evaluation]}
            for other in set(SPLITS) - {evaluation}:
                seen = {getattr(pair, attribute).lower() for pair in splits[other]}
                assert not held_out & seen, (evaluation, other, attribute)


def test_ids_are_unique_and_start_with_the_split(splits: dict[str, list[Pair]]) -> None:
    ids = [pair.example_id for split in SPLITS for pair in splits[split]]
    assert len(ids) == len(set(ids))
    for split in SPLITS:
        assert all(pair.example_id.startswith(f"{split}/") for pair in splits[split])


def test_every_labelled_question_has_one_relevant_passage_and_distinct_others(
    splits: dict[str, list[Pair]],
) -> None:
    for split in LABELLED:
        by_question: dict[str, list[Pair]] = defaultdict(list)
        for pair in splits[split]:
            by_question[pair.question].append(pair)
        for pairs in by_question.values():
            assert [pair.label for pair in pairs].count(0) == 1
            assert len({pair.passage for pair in pairs}) == len(pairs)


def test_training_labels_are_balanced_in_every_prefix_of_whole_questions(
    splits: dict[str, list[Pair]],
) -> None:
    counts = Counter(pair.label for pair in splits["train"][:1000])
    assert counts == {0: 500, 1: 500}


def test_every_split_has_a_useful_size(splits: dict[str, list[Pair]]) -> None:
    assert len(splits["train"]) > 3000
    assert len(splits["validation"]) > 500
    assert len(splits["test"]) > 500
    assert len(splits["unlabelled"]) > 40_000
    assert {pair.label for pair in splits["unlabelled"]} == {-1}


def test_unlabelled_has_the_asked_number_of_distinct_passages_per_question() -> None:
    pairs = build_pairs("unlabelled", passages_per_question=3)
    by_question: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        by_question[pair.question].add(pair.passage)
    assert {len(passages) for passages in by_question.values()} == {3}
    assert len(pairs) == 3 * len(by_question)


def test_passages_are_first_sentences_without_signatures(small_library: Path) -> None:
    expected = {
        "shutil": "Utility functions for copying and archiving files.",
        "shutil.CopyJob": "A job that copies src.",
        "shutil.CopyJob.runNow": "Run the job at once, e.g. in tests.",
        "shutil.copymode": "Copy the mode bits from one file to another.",
        "shutil.status": "Ask the server for its status.",
    }
    found = collect_passages(small_library)
    assert found.keys() == expected.keys()
    assert all(passage in ("", expected[name]) for name, passage in found.items())


def test_no_passage_of_the_library_starts_with_a_signature(splits: dict[str, list[Pair]]) -> None:
    for split in SPLITS:
        for pair in splits[split]:
            assert not pair.passage.startswith(("->", "(typ, [data]) ="))
            assert not re.match(r"[A-Za-z_][\w.]*\(", pair.passage), pair.passage


def test_questions_spell_names_as_words(small_library: Path) -> None:
    questions = {
        pair.example_id.split("/")[1]: pair.question
        for pair in build_pairs("unlabelled", stdlib_dir=small_library)
    } | {
        pair.example_id.split("/")[1]: pair.question
        for split in LABELLED
        for pair in build_pairs(split, stdlib_dir=small_library)
    }
    expected_words = {
        "shutil": ["shutil", "module"],
        "shutil.CopyJob": ["copy job", "shutil"],
        "shutil.CopyJob.runNow": ["run now", "copy job"],
        "shutil.copymode": ["copymode", "shutil"],
    }
    for name, words in expected_words.items():
        assert questions[name].endswith("?")
        assert all(word in questions[name] for word in words), questions[name]


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown pydocqa split 'dev'"):
        build_pairs("dev")


def test_a_passage_count_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="passages_per_question is 0"):
        build_pairs("unlabelled", passages_per_question=0)


def test_a_directory_without_documented_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no documented Python files"):
        build_pairs("train", stdlib_dir=tmp_path)
