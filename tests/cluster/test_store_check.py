"""Diagnosing stores: all that is wrong is named, and nothing that is right."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from xxhash import xxh3_64_hexdigest

from cluster.cli import run_command
from cluster.corpus_check import corpora_of
from cluster.diagnosis import Diagnosis
from cluster.store_check import diagnose_store
from precompute.store_writer import StoreWriter
from schemas.digest import decode_document, encode_document
from schemas.errors import DamagedStoreError, DataError, IncompleteStoreError, RefusedError
from schemas.plan import encode_plan, make_plan
from schemas.records import (
    DATA_DIRECTORY,
    MANIFEST_FILE,
    MAX_COMMIT_BYTES,
    PLAN_FILE,
    STORE_FILE,
    Manifest,
    encode_record,
    read_record,
)
from schemas.rows import fingerprint_rows, hash_texts
from tests.cluster.store_damage import DAMAGE, claim_format, flip_byte, read_commit
from tests.cluster.stores import make_rows, write_store
from tests.object_server import object_server
from tests.precompute.tiny import write_rows
from tests.store_factory import make_table


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_store(tmp_path / "out" / "stores" / "s")
    return tmp_path / "out" / "stores" / "s"


def data_files(root: Path) -> list[Path]:
    return sorted((root / DATA_DIRECTORY).glob("*.arrow"))


def found(diagnosis: Diagnosis) -> list[tuple[str, str, int | None, int | None]]:
    return [(p.place, p.fault, p.shard, p.batch) for p in diagnosis.problems]


@pytest.mark.parametrize("deep", [False, True])
def test_a_sound_store_has_no_problem(tmp_path: Path, deep: bool) -> None:
    write_store(tmp_path / "s", excluded=0)
    diagnosis = diagnose_store(tmp_path / "s", deep=deep)
    assert diagnosis.is_sound
    assert (diagnosis.num_shards, diagnosis.num_committed, diagnosis.num_rows) == (3, 3, 49)
    assert diagnosis.num_bytes == sum(path.stat().st_size for path in data_files(tmp_path / "s"))
    assert diagnosis.deep == deep
    diagnosis.raise_if_unsound()


def test_a_deep_look_notices_a_flip_anywhere_in_a_data_file(root: Path) -> None:
    path = data_files(root)[1]
    whole = path.read_bytes()
    for offset in range(0, len(whole), 97):
        flip_byte(path, offset)
        diagnosis = diagnose_store(root, deep=True)
        assert diagnosis.damaged_shards == (1,)
        with pytest.raises(DamagedStoreError, match=r"1 of 3 shards is damaged: shard 1") as caught:
            diagnosis.raise_if_unsound()
        record = read_commit(root, 1)[1]
        region = next(r for r in record.regions() if r.offset <= offset < r.offset + r.length)
        assert (caught.value.shard, caught.value.offset) == (1, region.offset)
        path.write_bytes(whole)


def test_one_fault_hides_no_other(root: Path) -> None:
    """A flip in every region of one file, another file cut, a record lost, and the three files beside."""
    record = read_commit(root, 1)[1]
    for region in record.regions():
        flip_byte(root / DATA_DIRECTORY / record.file, region.offset + 16)
    cut = root / DATA_DIRECTORY / read_commit(root, 0)[1].file
    cut.write_bytes(cut.read_bytes()[:-1])
    read_commit(root, 2)[0].unlink()
    for name in (STORE_FILE, PLAN_FILE, MANIFEST_FILE):
        flip_byte(root / name, 300)
    diagnosis = diagnose_store(root, deep=True)
    batches = range(len(record.batches))
    assert found(diagnosis)[:3] == [
        ("identity", "damaged", None, None),
        ("manifest", "damaged", None, None),
        ("plan", "damaged", None, None),
    ]
    assert found(diagnosis)[3:] == [
        ("data", "size", 0, None),
        ("data", "hash", 1, None),
        ("data", "hash", 1, None),
        *(("data", "hash", 1, batch) for batch in batches),
        ("data", "hash", 1, None),
    ]
    with pytest.raises(DamagedStoreError, match=r"STORE.json .*manifest.json.*plan.arrow.*shard 0.*shard 1"):
        diagnosis.raise_if_unsound()
    write_store(root.parent / "other")
    for name in (STORE_FILE, PLAN_FILE, MANIFEST_FILE):
        (root / name).write_bytes((root.parent / "other" / name).read_bytes())
    assert diagnose_store(root).damaged_shards == (0, 1, 2)


def cut_plan_otherwise(root: Path) -> None:
    (root / PLAN_FILE).write_bytes(encode_plan(make_plan(make_rows(), 25)))


@pytest.mark.parametrize(
    ("damage", "problem"), [*DAMAGE.items(), (cut_plan_otherwise, ("plan", "damaged", None))]
)
def test_each_damage_is_named_without_reading_the_data(
    root: Path, damage: Callable[[Path], None], problem: tuple[str, str, int | None]
) -> None:
    damage(root)
    for deep in (False, True):
        diagnosis = diagnose_store(root, deep=deep)
        assert problem in {(p.place, p.fault, p.shard) for p in diagnosis.problems}
        with pytest.raises(DamagedStoreError, match="run `tmkd store repair"):
            diagnosis.raise_if_unsound()


def forge_shard(root: Path, old: bytes, new: bytes, **changes: object) -> None:
    """Replaces bytes of the second shard and makes all hashes of the store agree with them."""
    path, record = read_commit(root, 1)
    data = (root / DATA_DIRECTORY / record.file).read_bytes()
    assert old in data
    data = data.replace(old, new, 1)
    (root / DATA_DIRECTORY / record.file).write_bytes(data)

    def rehash(region: Any) -> Any:
        return region.model_copy(
            update={"xxh3": xxh3_64_hexdigest(data[region.offset : region.offset + region.length])}
        )

    hashed: dict[str, object] = {
        "head": rehash(record.head),
        "batches": tuple(map(rehash, record.batches)),
        "tail": rehash(record.tail),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    encoded = encode_record(record.model_copy(update=hashed | changes))
    path.write_bytes(encoded)
    manifest = read_record(root / MANIFEST_FILE, Manifest, store=root)
    bound = manifest.shards[1].model_copy(update={"record_sha256": hashlib.sha256(encoded).hexdigest()})
    shards = (manifest.shards[0], bound, manifest.shards[2])
    (root / MANIFEST_FILE).write_bytes(encode_record(manifest.model_copy(update={"shards": shards})))


IDS = [f"train/{row}" for row in range(20, 40)]
SWAPPED = fingerprint_rows(
    ["train/99" if row == 23 else f"train/{row}" for row in range(20, 40)],
    [hash_texts([name]) for name in IDS],
)


@pytest.mark.parametrize(
    ("old", "new", "changes", "fault", "message"),
    [
        (np.float32(23).tobytes() * 2, np.float32("nan").tobytes() * 2, {}, "not finite", "at train/23"),
        (b"train/23", b"train/99", {}, "rows", "column example_id differs from the plan, first at train/23"),
        (b"train/23", b"train/99", {"ids_hash": SWAPPED}, "rows", "column example_id differs"),
        (b"train/23", b"train/24", {}, "rows", "column example_id differs"),
        (hash_texts(["train/23"]), bytes(16), {}, "rows", "column text_hash differs"),
        (b"", b"", {"ids_hash": SWAPPED}, "rows", "another hash of ids"),
        (np.int64(23).tobytes(), np.int64(24).tobytes(), {}, "rows", "rows are not those of the plan"),
        (b'["yes", "no"]', b'["no", "yes"]', {}, "labels", "does not name the store's labels in their order"),
        (b"", b"", {"sha256": "0" * 64}, "hash", "does not match its SHA-256"),
    ],
)  # fmt: skip
def test_a_deep_look_sees_rows_that_every_hash_agrees_with(
    root: Path, old: bytes, new: bytes, changes: dict[str, object], fault: str, message: str
) -> None:
    forge_shard(root, old, new, **changes)
    problems = diagnose_store(root, deep=True).problems
    assert {problem.shard for problem in problems} == {1}
    assert any(problem.fault == fault and message in problem.message for problem in problems)


def test_an_unfinished_store_is_incomplete_and_its_shards_are_checked_all_the_same(tmp_path: Path) -> None:
    write_store(tmp_path / "s", shards=2)
    diagnosis = diagnose_store(tmp_path / "s", deep=True)
    assert (diagnosis.is_complete, diagnosis.missing_shards, diagnosis.problems) == (False, (2,), ())
    with pytest.raises(IncompleteStoreError):
        diagnosis.raise_if_unsound()
    flip_byte(data_files(tmp_path / "s")[0], 3000)
    with pytest.raises(DamagedStoreError, match="1 of 3 shards is damaged: shard 0"):
        diagnose_store(tmp_path / "s", deep=True).raise_if_unsound()


def test_what_is_no_store_or_of_another_format_is_not_diagnosed(tmp_path: Path, root: Path) -> None:
    with pytest.raises(DataError, match=r"is no store, it has no STORE\.json"):
        diagnose_store(tmp_path)
    for name in (STORE_FILE, MANIFEST_FILE):
        kept = (root / name).read_bytes()
        claim_format(root, "2.0", name)
        with pytest.raises(RefusedError, match=r"has format '2\.0'"):
            diagnose_store(root)
        (root / name).write_bytes(kept)


def write_corpus(root: Path, texts: list[str]) -> Path:
    """Writes the materialised corpus of a store, or what has become of it."""
    table = make_table([(text,) for text in texts], [0] * len(texts))
    hashes = make_rows().column("text_hash")
    table = table.set_column(2, table.schema.field(2), hashes)
    fingerprint = StoreWriter.attach(root).plan.fingerprint
    path = root.parent.parent / "corpora" / f"{fingerprint[:16]}-{'0' * 16}" / "rows.arrow"
    path.parent.mkdir(parents=True)
    return write_rows(table, path)


def test_records_of_holes_are_not_all_held_at_once(root: Path) -> None:
    num_bytes = 8 * 2**20
    for shard in range(3, 27):
        with (root / "commit" / f"s{shard:06d}.r0.json").open("wb") as file:
            file.truncate(num_bytes)
    tracemalloc.start()
    try:
        diagnosis = diagnose_store(root)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert {3, 26} <= set(diagnosis.damaged_shards)
    # A read makes room for as much as it may take.
    assert peak_bytes < MAX_COMMIT_BYTES + 5 * num_bytes


def test_a_data_file_of_holes_is_not_hashed_to_its_end(root: Path) -> None:
    """Its record is right in itself, but no batch of three rows is so large."""
    path = read_commit(root, 1)[0]
    document = decode_document(path.read_bytes())
    document["tail"]["offset"] += 2**40
    document["batches"][-1]["length"] += 2**40
    document["num_bytes"] += 2**40
    path.write_bytes(encode_document(document))
    with (root / DATA_DIRECTORY / document["file"]).open("ab") as file:
        file.truncate(document["num_bytes"])
    problems = diagnose_store(root, deep=True).problems
    assert any("has a batch of" in problem.message for problem in problems if problem.shard == 1)


def test_texts_are_hashed_again_where_the_corpus_is_found(root: Path) -> None:
    corpora = corpora_of(str(root), None)
    assert "not found" in diagnose_store(root, deep=True, corpora=corpora).corpus
    texts = [f"train/{row}" for row in range(50)]
    path = write_corpus(root, texts)
    assert diagnose_store(root, deep=True, corpora=corpora).corpus == f"texts of {path} hashed again"
    assert diagnose_store(root, deep=True).corpus == "not looked for"
    texts[41] = "another text"
    path.unlink()
    path.parent.rmdir()
    write_corpus(root, texts)
    diagnosis = diagnose_store(root, deep=True, corpora=corpora)
    assert found(diagnosis) == [("corpus", "rows", None, None)]
    with pytest.raises(DataError, match=r"is whole, but its corpus is not.*text of train/41 has changed"):
        diagnosis.raise_if_unsound()


def test_verify_prints_one_object_and_exits_with_3(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["store", "verify", str(root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    for path in data_files(root):
        flip_byte(path, 40)
    assert run_command(["store", "verify", str(root), "--json"]) == 3
    captured = capsys.readouterr()
    assert [problem["shard"] for problem in json.loads(captured.out)["problems"]] == [0, 1, 2]
    assert "3 of 3 shards are damaged: shard 0" in captured.err
    assert run_command(["store", "verify", str(root)]) == 3
    captured = capsys.readouterr()
    assert "num_shards\t3\n" in captured.out
    assert "problems\t3\n" in captured.out


def test_an_object_store_is_read_itself_and_not_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMKD_CACHE_DIR", str(tmp_path / "cache"))
    with object_server() as server:
        store = write_store(server.url("s"))
        for deep in (False, True):
            assert diagnose_store(server.url("s"), deep=deep).is_sound
        record = store.commit_records()[1].record
        key = f"s/data/{record.file}"
        # A good copy is in the cache.
        store.storage.map_file(f"data/{record.file}", sha256=record.sha256)
        data = bytearray(server.get(key))
        data[record.batches[0].offset + 20] ^= 1
        server.put(key, bytes(data))
        assert diagnose_store(server.url("s")).is_sound
        assert found(diagnose_store(server.url("s"), deep=True))[0] == ("data", "hash", 1, 0)
        server.put(key, bytes(data[:-1]))
        assert found(diagnose_store(server.url("s"))) == [("data", "size", 1, None)]
