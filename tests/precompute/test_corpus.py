"""Reading corpora: every kind of file gives the same rows, and every bad input one clear line."""

from __future__ import annotations

import csv
import errno
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import precompute.corpus
from precompute.corpus import materialise_corpus
from precompute.pydocqa import Pair
from schemas.errors import CorpusError, ResourceError
from schemas.plan import make_plan
from schemas.recipe import Corpus, PydocqaPart
from schemas.rows import corpus_schema, hash_texts, open_rows
from tests.precompute.corpora import ROWS, make_corpus, read_lines, write_lines

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_arrow(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    writer = (pa.ipc.new_stream if "stream" in path.name else pa.ipc.new_file)(str(path), table.schema)
    writer.write_table(table)
    writer.close()


def write_source(path: Path, rows: list[dict[str, Any]]) -> None:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".arrow"):
        write_arrow(path, rows)
    elif name.endswith(".csv"):
        write_csv(path, rows)
    elif name.endswith(".tsv"):
        write_tsv(path, rows)
    else:
        text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.jsonl.gz",
        "a.json",
        "a.json.gz",
        "a.parquet",
        "a.arrow",
        "stream.arrow",
        "a.csv",
        "a.csv.gz",
        "a.tsv",
        "a.tsv.gz",
    ],
)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    write_source(tmp_path / name, ROWS)
    corpus = make_corpus({"path": name})
    [part] = materialise_corpus("qnli", corpus, data_root=str(tmp_path), out=tmp_path / "out")
    table = open_rows(part.rows_path)
    assert table.schema.equals(corpus_schema(2))
    assert table.to_pylist() == [
        {
            "ordinal": i,
            "example_id": f"train/{i}",
            "text_hash": hash_texts((row["question"], row["sentence"])),
            "text_0": row["question"],
            "text_1": row["sentence"],
            "label": row["label"],
        }
        for i, row in enumerate(ROWS)
    ]
    assert (part.corpus, part.part, part.num_rows, part.num_labelled) == ("qnli", "train", 3, 2)
    assert part.fingerprint == make_plan(table, 2).fingerprint
    assert part.rows_path.parent.name.startswith(part.fingerprint[:16] + "-")
    assert not list((tmp_path / "out" / "corpora").glob(".*"))


def test_a_second_reading_writes_nothing(tmp_path: Path) -> None:
    first = read_lines(tmp_path, ROWS)
    before = first.rows_path.stat()
    second = read_lines(tmp_path, ROWS)
    assert second == first
    assert second.rows_path.stat().st_ino == before.st_ino
    assert second.rows_path.stat().st_mtime_ns == before.st_mtime_ns


def test_damaged_rows_are_written_again(tmp_path: Path) -> None:
    part = read_lines(tmp_path, ROWS)
    good = part.rows_path.read_bytes()
    part.rows_path.write_bytes(good.replace(b"ici", b"ICI"))
    read_lines(tmp_path, ROWS)
    assert part.rows_path.read_bytes() == good


def test_other_labels_get_another_directory_and_the_same_fingerprint(tmp_path: Path) -> None:
    first = read_lines(tmp_path, ROWS)
    second = read_lines(tmp_path, [row | {"label": 0} for row in ROWS])
    assert first.fingerprint == second.fingerprint
    assert first.rows_path != second.rows_path
    assert open_rows(first.rows_path)["label"].to_pylist() == [0, 1, -1]


def test_labels_may_be_names_numbers_as_text_or_nothing(tmp_path: Path) -> None:
    labels = ["Entailment", "not entailment", "1", "-1", "", None]
    part = read_lines(tmp_path, [ROWS[0] | {"label": label} for label in labels])
    assert open_rows(part.rows_path)["label"].to_pylist() == [0, 1, 1, -1, -1, -1]
    assert part.num_labelled == 3


def test_named_integer_labels_are_matched_by_name(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["not_entailment", "entailment"])
    features = datasets.Features(
        {"question": datasets.Value("string"), "sentence": datasets.Value("string"), "label": names}
    )
    dataset = datasets.Dataset.from_list(
        [row | {"label": i % 2} for i, row in enumerate(ROWS)], features=features
    )
    pq.write_table(dataset.data.table, tmp_path / "a.parquet")
    [part] = materialise_corpus(
        "qnli", make_corpus({"path": "a.parquet"}), data_root=str(tmp_path), out=tmp_path
    )
    assert open_rows(part.rows_path)["label"].to_pylist() == [1, 0, 1]


def test_ids_come_from_their_column_and_carry_the_parts_name(tmp_path: Path) -> None:
    part = read_lines(tmp_path, [row | {"idx": 10 * i} for i, row in enumerate(ROWS)], id="idx")
    assert open_rows(part.rows_path)["example_id"].to_pylist() == ["train/0", "train/10", "train/20"]


def test_limit_keeps_the_first_rows(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    corpus = make_corpus({"path": str(path), "limit": 2})
    [part] = materialise_corpus("qnli", corpus, data_root=None, out=tmp_path)
    assert part.num_rows == 2


def test_a_corpus_without_label_column_is_unlabelled(tmp_path: Path) -> None:
    part = read_lines(tmp_path, [{"question": "a", "sentence": "b"}], label=None)
    assert part.num_labelled == 0
    assert open_rows(part.rows_path)["label"].to_pylist() == [-1]


def test_null_texts_are_left_out_and_ids_stay(tmp_path: Path) -> None:
    rows = [ROWS[0], ROWS[1] | {"sentence": None}, ROWS[2]]
    part = read_lines(tmp_path, rows, on_bad_row="exclude")
    table = open_rows(part.rows_path)
    assert table["example_id"].to_pylist() == ["train/0", "train/2"]
    assert table["ordinal"].to_pylist() == [0, 1]
    assert part.excluded == (("train/1", "text column sentence is null"),)


BAD_ROWS = [
    ([ROWS[0], ROWS[1] | {"sentence": None}], {}, r"row train/1: text column sentence is null"),
    ([row | {"sentence": None} for row in ROWS], {"on_bad_row": "exclude"}, "has no usable rows"),
    ([ROWS[0], ROWS[1] | {"label": 7}], {}, r"row train/1: label 7 is not one of 0 entailment, 1 not_ent"),
    ([ROWS[0], ROWS[1] | {"label": -2}], {}, r"row train/1: label -2 is not one of"),
    ([ROWS[0] | {"label": "maybe"}], {}, r"row train/0: label 'maybe' is not one of"),
    ([ROWS[0] | {"label": 0.5}], {}, r"row train/0: label 0.5 is not one of"),
    ([ROWS[0] | {"label": True}], {}, r"row train/0: label True is not one of"),
    ([ROWS[0] | {"label": "--1"}], {}, r"row train/0: label '--1' is not one of"),
    ([ROWS[0] | {"label": [0]}], {}, r"column label holds list"),
    ([{"question": "a", "label": 0}], {}, r"has no column sentence; its columns are question, label"),
    ([{"question": "a", "sentence": "b"}], {}, r"has no column label; .*; set label: null"),
    ([ROWS[0] | {"sentence": 3}], {}, r"column sentence holds int64, expected text"),
    ([row | {"idx": 4} for row in ROWS], {"id": "idx"}, r"'train/4' occurs 3 times; ids must be unique"),
    ([ROWS[0] | {"idx": None}], {"id": "idx"}, r"column idx is null in row 0"),
    (ROWS, {"id": "idx"}, r"has no column idx; its columns are question, sentence, label"),
]


@pytest.mark.parametrize(("rows", "changes", "message"), BAD_ROWS, ids=[row[2][:40] for row in BAD_ROWS])
def test_rows_that_cannot_be_used_are_refused_in_one_line(
    rows: list[dict[str, Any]], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CorpusError, match=message) as caught:
        read_lines(tmp_path, rows, **changes)
    assert str(caught.value).startswith("corpus qnli")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("label", [float("nan"), float("inf")])
def test_a_label_that_is_no_number_is_refused(tmp_path: Path, label: float) -> None:
    path = tmp_path / "rows.parquet"
    columns = {"question": ["a"], "sentence": ["b"], "label": [label]}
    pq.write_table(pa.table(columns), path)
    with pytest.raises(CorpusError, match=f"row train/0: label {label} is not one of"):
        materialise_corpus("qnli", make_corpus({"path": str(path)}), data_root=None, out=tmp_path)


def test_a_library_without_files_is_a_corpus_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no documented Python files in the library directory /lib")

    monkeypatch.setattr("precompute.corpus.build_pairs", refuse)
    part = PydocqaPart(kind="pydocqa", split="train")
    corpus = Corpus(labels=("relevant", "irrelevant"), text=("question", "passage"), parts=(part,))
    with pytest.raises(CorpusError, match="no documented Python files"):
        materialise_corpus("pydocqa", corpus, data_root=None, out=tmp_path)


BAD_FILES = [
    ("a.jsonl", b"", "is empty"),
    ("a.json", b"[]", "holds no rows"),
    ("a.csv", b"question,sentence,label\n", "holds no rows"),
    ("a.jsonl", b'{"question": 1\n{', "cannot be read"),
    ("a.jsonl.gz", b"not gzip", "cannot be read|has no column"),
    ("a.parquet", b"garbage", "cannot be read"),
    ("a.arrow", b"garbage", "cannot be read"),
    ("a.csv", "question,sentence,label\né,b,0\n".encode("latin-1"), "cannot be read .*utf-8"),
    ("a.xlsx", b"x", "its kind is unknown; expected .jsonl"),
    ("a.parquet.gz", b"x", "its kind is unknown"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD_FILES, ids=[f"{f[0]}-{f[2]}" for f in BAD_FILES])
def test_files_that_cannot_be_read_are_refused_in_one_line(
    name: str, data: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    corpus = make_corpus({"path": name})
    with pytest.raises(CorpusError, match=message) as caught:
        materialise_corpus("qnli", corpus, data_root=str(tmp_path), out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out" / "corpora").iterdir())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"corpus qnli/train: there is no file .*absent.jsonl"):
        materialise_corpus("qnli", make_corpus({"path": "absent.jsonl"}), data_root=None, out=tmp_path)


HUB = {
    "kind": "hub",
    "repo": "nyu-mll/glue",
    "config": "qnli",
    "split": "train",
    "mirror": "qnli/train.jsonl",
}


def test_a_mirror_is_read_instead_of_the_hub_under_a_data_root(tmp_path: Path) -> None:
    (tmp_path / "qnli").mkdir()
    write_lines(tmp_path / "qnli" / "train.jsonl", ROWS)
    corpus = make_corpus(HUB)
    [part] = materialise_corpus("qnli", corpus, data_root=str(tmp_path), out=tmp_path)
    assert part.num_rows == 3


def test_a_hub_that_cannot_be_reached_says_how_to_go_without(tmp_path: Path) -> None:
    with pytest.raises(
        ResourceError, match=r"nyu-mll/glue \(qnli\) cannot be fetched.*data_root.*mirror"
    ) as caught:
        materialise_corpus("qnli", make_corpus(HUB), data_root=None, out=tmp_path)
    assert caught.value.exit_code == 6


def test_a_hub_part_is_loaded_with_config_split_and_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load(*names: str, **options: Any) -> datasets.Dataset:
        calls.append((names, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(precompute.corpus.datasets, "load_dataset", load)
    [part] = materialise_corpus("qnli", make_corpus({**HUB, "revision": "abc"}), data_root=None, out=tmp_path)
    assert calls == [(("nyu-mll/glue", "qnli"), {"split": "train", "revision": "abc"})]
    assert part.num_rows == 3


def test_an_unknown_split_of_a_hub_data_set_is_a_corpus_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*names: str, **options: Any) -> datasets.Dataset:
        raise ValueError("Unknown split \"train\". Should be one of ['test'].")

    monkeypatch.setattr(precompute.corpus.datasets, "load_dataset", load)
    with pytest.raises(CorpusError, match=r"split train, cannot be read .Unknown split"):
        materialise_corpus("qnli", make_corpus(HUB), data_root=None, out=tmp_path)


def test_parts_come_in_order_with_ids_of_their_own(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    corpus = make_corpus({"path": str(path), "name": "a"}, {"path": str(path), "name": "b"})
    parts = materialise_corpus("qnli", corpus, data_root=None, out=tmp_path)
    assert [part.part for part in parts] == ["a", "b"]
    assert open_rows(parts[1].rows_path)["example_id"].to_pylist() == ["b/0", "b/1", "b/2"]


def test_the_builtin_corpus_keeps_its_ids_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(split: str, *, passages_per_question: int) -> list[Pair]:
        return [Pair(f"{split}/os.path/{i}", f"q{i}", f"p{passages_per_question}", i % 2) for i in range(3)]

    monkeypatch.setattr(precompute.corpus, "build_pairs", build)
    corpus = make_corpus(
        {"kind": "pydocqa", "split": "train", "name": "t", "passages_per_question": 7},
        labels=["relevant", "irrelevant"],
        text=["question", "passage"],
    )
    [part] = materialise_corpus("qa", corpus, data_root=None, out=tmp_path)
    table = open_rows(part.rows_path)
    assert table["example_id"].to_pylist() == ["t/os.path/0", "t/os.path/1", "t/os.path/2"]
    assert table["text_1"].to_pylist() == ["p7"] * 3
    assert table["label"].to_pylist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "may not be read or written")]
)
def test_a_disk_that_takes_no_rows_is_a_resource_error(
    number: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr("precompute.materialised.os.fsync", fail)
    with pytest.raises(ResourceError, match=message):
        read_lines(tmp_path, ROWS)
    assert not list((tmp_path / "corpora").rglob("*.arrow"))
    assert not list((tmp_path / "corpora").rglob("*.tmp"))


def test_real_files_are_read_as_they_are(tmp_path: Path) -> None:
    if not DATA.is_dir():
        pytest.skip("the shared data directory is not there")
    corpus = make_corpus(
        {"path": "rte/train.jsonl.gz"},
        {"path": "rte/test_unlabelled.jsonl.gz", "name": "test"},
        text=["sentence1", "sentence2"],
    )
    train, test = materialise_corpus("rte", corpus, data_root=str(DATA), out=tmp_path)
    assert train.num_labelled == train.num_rows == 2490
    assert test.num_labelled == 0


def test_a_part_may_name_its_columns_and_ignore_its_labels(tmp_path: Path) -> None:
    rows = [{"premise": "p", "hypothesis": "h", "label": 2}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    part = {
        "kind": "file",
        "path": str(tmp_path / "m.jsonl"),
        "text": ["premise", "hypothesis"],
        "unlabelled": True,
    }
    corpus = Corpus.model_validate({"labels": ["a", "b"], "text": ["s1", "s2"], "parts": [part]})
    (found,) = materialise_corpus("c", corpus, data_root=None, out=tmp_path / "out")
    table = open_rows(found.rows_path)
    assert table.select(["text_0", "text_1", "label"]).to_pylist() == [
        {"text_0": "p", "text_1": "h", "label": -1}
    ]
