"""A corpus joined with its stores: labels by name, rows by plan, nothing of another corpus."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import distill.join as join_module
from distill.averaging import Averaging
from distill.join import JoinedCorpus, RowCounts
from schemas.errors import DamagedStoreError, DataError, LabelError, RefusedError
from schemas.job import PartSource
from tests.store_factory import MadePart, make_part, make_store, target

LABELS = ("a", "b", "c")
SIZES = (25, 12)


def _logits(rows: int, shift: float) -> np.ndarray:
    return (np.arange(rows * 3, dtype=np.float32).reshape(rows, 3) + shift).astype(np.float32)


@pytest.fixture
def parts(tmp_path: Path) -> list[MadePart]:
    return [
        make_part(
            tmp_path / f"corpus{number}" / "rows.arrow",
            [(f"q {number} {row}", f"p {row}") for row in range(size)],
            [(row + number) % 3 if row != 4 else -1 for row in range(size)],
            shard_rows=10 - number * 3,
            name=f"part{number}",
        )
        for number, size in enumerate(SIZES)
    ]


def _stores(
    tmp_path: Path, parts: list[MadePart], teacher: str, shift: float, **options: object
) -> list[Path]:
    return [
        make_store(
            tmp_path / f"{teacher}{number}",
            part.plan,
            _logits(part.plan.num_rows, shift + 1000 * number),
            teacher=teacher,
            **options,  # type: ignore[arg-type]
        )
        for number, part in enumerate(parts)
    ]


def _sources(parts: list[MadePart]) -> list[PartSource]:
    return [part.source for part in parts]


def test_parts_lie_one_after_another_and_targets_side_by_side(tmp_path: Path, parts: list[MadePart]) -> None:
    first, second = _stores(tmp_path, parts, "t1", 0.0), _stores(tmp_path, parts, "t2", 0.5)
    joined = JoinedCorpus.open(_sources(parts), [target(("t1", first)), target(("t2", second))], LABELS)
    found = joined.gather(np.array([26, 3, 24, 25]))
    # Row 26 is row 1 of the second part.
    assert found.labels.tolist() == [2, 0, 0, 1]
    assert found.logits_BNC[0].tolist() == [[1003, 1004, 1005], [1003.5, 1004.5, 1005.5]]
    assert found.logits_BNC[:, 1, 0].tolist() == [1003.5, 9.5, 72.5, 1000.5]
    assert joined.shard_bounds.tolist() == [0, 10, 20, 25, 32, 37]


def test_each_row_is_the_same_by_any_way_of_reading(tmp_path: Path, parts: list[MadePart]) -> None:
    store = _stores(tmp_path, parts, "t1", 0.0)
    joined = JoinedCorpus.open(_sources(parts), [target(("t1", store))], LABELS)
    rows = np.random.default_rng(0).permutation(37)
    whole = joined.gather(rows)
    for slots in (1, 2, 3):
        joined._cache = joined._make_cache(slots)
        scattered = joined.gather(rows)
        assert np.array_equal(scattered.logits_BNC, whole.logits_BNC)
        assert np.array_equal(scattered.labels, whole.labels)
        one_by_one = [joined.gather(rows[place : place + 1]).logits_BNC[0] for place in range(37)]
        assert np.array_equal(np.stack(one_by_one), whole.logits_BNC)
        pairs = [joined.gather(rows[place : place + 2]).logits_BNC for place in range(0, 36, 2)]
        assert np.array_equal(np.concatenate(pairs), whole.logits_BNC[:36])


def test_logits_are_permuted_by_name_into_the_jobs_order(tmp_path: Path, parts: list[MadePart]) -> None:
    roots = _stores(tmp_path, parts, "t1", 0.0, labels=("c", "a", "b"))
    joined = JoinedCorpus.open(_sources(parts), [target(("t1", roots))], LABELS)
    assert joined.gather(np.array([0])).logits_BNC[0, 0].tolist() == [1, 2, 0]
    joined._cache = joined._make_cache(1)
    assert joined.gather(np.array([0, 30])).logits_BNC[0, 0].tolist() == [1, 2, 0]


def test_label_maps_rename_a_teachers_labels(tmp_path: Path, parts: list[MadePart]) -> None:
    roots = _stores(tmp_path, parts, "t1", 0.0, labels=("LABEL_0", "LABEL_1", "LABEL_2"))
    targets = [target(("t1", roots))]
    with pytest.raises(LabelError, match=r"label_maps\.t1"):
        JoinedCorpus.open(_sources(parts), targets, LABELS)
    maps = {"t1": {"LABEL_0": "b", "LABEL_1": "c", "LABEL_2": "a"}}
    joined = JoinedCorpus.open(_sources(parts), targets, LABELS, label_maps=maps)
    assert joined.gather(np.array([0])).logits_BNC[0, 0].tolist() == [2, 0, 1]


def test_averaged_logits_are_the_mean_of_the_teachers(tmp_path: Path, parts: list[MadePart]) -> None:
    first, second = _stores(tmp_path, parts, "t1", 0.0), _stores(tmp_path, parts, "t2", 3.0)
    targets = [target(("t1", first), ("t2", second), head="average")]
    joined = JoinedCorpus.open(_sources(parts), targets, LABELS)
    assert joined.gather(np.array([1])).logits_BNC.tolist() == [[[4.5, 5.5, 6.5]]]


def test_averaged_probabilities_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    part = make_part(tmp_path / "rows.arrow", [("x",)], [0], shard_rows=4)
    # At T = 2: softmax (1/2, 1/4, 1/4) and (1/8, 1/8, 3/4).
    logits = [2 * np.log(np.array([row], np.float32)) + 5 for row in ([2, 1, 1], [1, 1, 6])]
    roots = [make_store(tmp_path / f"s{i}", part.plan, values) for i, values in enumerate(logits)]
    averaged = target(("t1", roots[:1]), ("t2", roots[1:]), head="average")
    joined = JoinedCorpus.open([part.source], [averaged], LABELS, reduce=Averaging("kl", 2.0))
    found = joined.gather(np.array([0])).logits_BNC[0, 0]
    expected = np.array([5 / 16, 3 / 16, 8 / 16])
    assert np.exp(found / 2) == pytest.approx(expected, rel=1e-5)


def test_excluded_dropped_and_unlabelled_rows_are_left_out_and_counted(
    tmp_path: Path, parts: list[MadePart]
) -> None:
    first = _stores(tmp_path, parts, "t1", 0.0, excluded=[2, 11])
    second = _stores(tmp_path, parts, "t2", 0.0, excluded=[2, 3])
    np.save(tmp_path / "dropped.npy", np.array([3, 20, 36]))
    joined = JoinedCorpus.open(
        _sources(parts),
        [target(("t1", first)), target(("t2", second))],
        LABELS,
        dropped_rows=tmp_path / "dropped.npy",
    )
    gone = {2, 3, 11, 27, 28, 36, 20}
    assert joined.usable_rows().tolist() == [row for row in range(37) if row not in gone]
    assert joined.count_rows() == RowCounts(total=37, excluded=6, dropped=1, unlabelled=0, usable=30)
    assert joined.usable_rows(labelled=True).tolist() == [
        row for row in range(37) if row not in gone | {4, 29}
    ]
    assert joined.count_rows(labelled=True).unlabelled == 2
    rows = joined.usable_rows()
    expected = np.concatenate([_logits(25, 0), _logits(12, 1000)])[rows]
    assert np.array_equal(joined.gather(rows).logits_BNC[:, 1], expected)
    with pytest.raises(DataError, match="row 28 of the corpus is excluded"):
        joined.gather(np.array([26, 28]))


def test_a_corpus_without_stores_has_the_same_shard_bounds(tmp_path: Path, parts: list[MadePart]) -> None:
    with_store = JoinedCorpus.open(
        _sources(parts), [target(("t1", _stores(tmp_path, parts, "t1", 0.0)))], LABELS
    )
    without = JoinedCorpus.open(_sources(parts), [], LABELS)
    assert np.array_equal(with_store.shard_bounds, without.shard_bounds)
    assert with_store.corpus_key == without.corpus_key
    assert without.gather(np.array([1, 30])).logits_BNC.shape == (2, 0, 3)


def test_a_cut_that_is_not_the_plans_is_refused(parts: list[MadePart]) -> None:
    source = parts[0].source.model_copy(update={"shard_rows": 11})
    with pytest.raises(RefusedError, match="cut into shards is not the plan's"):
        JoinedCorpus.open([source], [], LABELS)


def test_a_store_of_another_plan_is_refused_naming_both(tmp_path: Path, parts: list[MadePart]) -> None:
    other = make_part(tmp_path / "o" / "rows.arrow", [("x", "y")] * 25, [0] * 25, shard_rows=10)
    root = make_store(tmp_path / "other", other.plan, _logits(25, 0))
    with pytest.raises(RefusedError) as error:
        JoinedCorpus.open([parts[0].source], [target(("t1", [root]))], LABELS)
    assert other.plan.plan_hash[:16] in str(error.value)
    assert parts[0].source.plan_hash[:16] in str(error.value)


def test_a_corpus_that_changed_is_refused(tmp_path: Path, parts: list[MadePart]) -> None:
    texts = [("changed" if row == 7 else f"q 0 {row}", f"p {row}") for row in range(25)]
    make_part(Path(parts[0].source.rows), texts, [0] * 25, shard_rows=10, name="part0")
    with pytest.raises(RefusedError, match="the corpus changed"):
        JoinedCorpus.open([parts[0].source], [], LABELS)


def test_a_store_with_other_ids_is_refused(
    tmp_path: Path, parts: list[MadePart], monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = _stores(tmp_path, parts, "t1", 0.0)
    opened = join_module.LogitStore.open(roots[0])
    records = list(opened.records)
    records[1] = records[1].model_copy(update={"ids_hash": records[0].ids_hash})
    opened.records = tuple(records)
    monkeypatch.setattr(join_module.LogitStore, "open", lambda root: opened)
    with pytest.raises(RefusedError, match="shard 1: its examples are not those"):
        JoinedCorpus.open([parts[0].source], [target(("t1", roots[:1]))], LABELS)


def test_a_text_hash_that_differs_is_seen_when_its_shard_is_touched(tmp_path: Path) -> None:
    part = make_part(tmp_path / "a.arrow", [(f"x{row}",) for row in range(8)], [0] * 8, shard_rows=4)
    other = make_part(tmp_path / "b.arrow", [(f"y{row}",) for row in range(8)], [0] * 8, shard_rows=4)
    # The shard files of another corpus, under records that claim this one.
    right = make_store(tmp_path / "right", part.plan, _logits(8, 0))
    wrong = make_store(tmp_path / "wrong", other.plan, _logits(8, 0))
    joined = JoinedCorpus.open([part.source], [target(("t1", [right]))], LABELS)
    bad = join_module.LogitStore.open(wrong)
    teacher = joined.parts[0].targets[0][0]
    object.__setattr__(teacher, "store", bad)
    with pytest.raises(DamagedStoreError, match="text hashes of teacher t1 differ") as caught:
        joined.gather(np.array([5]))
    assert caught.value.message.count("run `tmkd") == 1, "one piece of advice, not two"
    joined._cache = joined._make_cache(1)
    with pytest.raises(DamagedStoreError, match="text hashes"):
        joined.gather(np.array([1, 5]))


def test_a_golden_label_outside_the_jobs_labels_is_refused(tmp_path: Path) -> None:
    part = make_part(tmp_path / "rows.arrow", [("x",)], [3], shard_rows=4)
    with pytest.raises(DataError, match="the job has 3 labels"):
        JoinedCorpus.open([part.source], [], LABELS)


def test_dropped_rows_that_are_no_row_numbers_are_refused(tmp_path: Path, parts: list[MadePart]) -> None:
    for rows in (np.array([3, 2]), np.array([0.5]), np.array([37])):
        np.save(tmp_path / "dropped.npy", rows)
        with pytest.raises(DataError, match="dropped"):
            JoinedCorpus.open(_sources(parts), [], LABELS, dropped_rows=tmp_path / "dropped.npy")


def test_the_cache_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    part = make_part(tmp_path / "rows.arrow", [(f"{row}",) for row in range(300)], [0] * 300, shard_rows=3)
    root = make_store(tmp_path / "s", part.plan, _logits(300, 0))
    joined = JoinedCorpus.open([part.source], [target(("t1", [root]))], LABELS)
    for row in range(0, 300, 7):
        joined.gather(np.array([row, (row + 100) % 300]))
    assert joined._cache.num_slots == join_module.DEFAULT_CACHED_SHARDS
    assert len(joined._cache._loaded) == joined._cache.num_slots
    assert int((joined._cache._slot_of_shard >= 0).sum()) == joined._cache.num_slots


def test_a_shard_that_a_batch_needs_is_not_evicted_for_it(tmp_path: Path) -> None:
    part = make_part(tmp_path / "rows.arrow", [(f"{row}",) for row in range(9)], [0] * 9, shard_rows=3)
    root = make_store(tmp_path / "s", part.plan, _logits(9, 0))
    joined = JoinedCorpus.open([part.source], [target(("t1", [root]))], LABELS)
    joined._cache = joined._make_cache(2)
    joined.gather(np.array([0]))
    joined.gather(np.array([3]))
    # Shard 0 came first, and would go first, but this batch needs it.
    assert joined.gather(np.array([1, 7])).logits_BNC[:, 0, 0].tolist() == [3, 21]
