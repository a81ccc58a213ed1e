"""Batches of a stage: one global sequence for every world size, resumed exactly at every step."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.data_state import DataState
from distill.join import JoinedCorpus
from distill.loader import LoaderOptions, StageLoader, Step
from distill.prefetch import Prefetch
from distill.token_files import TokenFiles
from distill.tokens import CorpusTokens, Padding
from schemas.errors import DamagedStoreError, DataError, RefusedError
from tests.store_factory import make_part, make_store, target

NUM_ROWS = 37
LOGITS = np.random.default_rng(0).normal(size=(NUM_ROWS, 3)).astype(np.float32)


def _tokens(num_rows: int) -> CorpusTokens:
    """Row r is r, r + 1, ... with 1 + r % 4 tokens."""
    lengths = 1 + np.arange(num_rows) % 4
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.concatenate([row + np.arange(length) for row, length in enumerate(lengths)]).astype(np.int32)
    files = TokenFiles(ids, offsets, lengths.astype(np.int32))
    return CorpusTokens((files,), Padding(pad_id=0, pad_type_id=0, left=False, token_types=False))


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> JoinedCorpus:
    return _join(tmp_path_factory.mktemp("joined"), shard_rows=5)


def _join(root: Path, *, shard_rows: int) -> JoinedCorpus:
    texts = [(f"text {row}",) for row in range(NUM_ROWS)]
    part = make_part(root / "rows.arrow", texts, [row % 3 for row in range(NUM_ROWS)], shard_rows=shard_rows)
    store = make_store(root / "store", part.plan, LOGITS)
    return JoinedCorpus.open([part.source], [target(("t", [store]))], ("a", "b", "c"))


def _loader(joined: JoinedCorpus, rank: int = 0, world_size: int = 1, **options: int) -> StageLoader:
    settings = {"seed": 3, "global_batch": 8, "max_micro_batch": 3, "window": 2, "prefetch": 0, **options}
    chosen = LoaderOptions(rank=rank, world_size=world_size, **settings)
    return StageLoader(joined, _tokens(joined.num_rows), joined.usable_rows(), chosen)


def _real_rows(step: Step) -> list[int]:
    return [
        row
        for batch in step.batches
        for row, weight in zip(batch.rows.tolist(), batch.weights.tolist(), strict=True)
        if weight
    ]


def _global_steps(joined: JoinedCorpus, world_size: int, state: DataState, count: int) -> list[list[int]]:
    ranks = [_loader(joined, rank, world_size).steps(state, count) for rank in range(world_size)]
    return [[row for step in steps for row in _real_rows(step)] for steps in zip(*ranks, strict=True)]


def test_a_batch_holds_the_rows_labels_logits_and_tokens(joined: JoinedCorpus) -> None:
    for step in _loader(joined).steps(_loader(joined).start()):
        for batch in step.batches:
            rows = batch.rows
            assert torch.equal(batch.labels, rows % 3)
            assert torch.equal(batch.logits_BNC[:, 0], torch.from_numpy(LOGITS)[rows])
            assert torch.equal(batch.input["input_ids"][:, 0], rows)
            assert torch.equal(batch.input["attention_mask"].sum(1), 1 + rows % 4)
            assert batch.real_count_in_step == len(_real_rows(step))
            batch.logits_BNC.zero_()  # The tensors own their memory.


def test_an_epoch_is_every_row_once_and_its_last_step_is_short(joined: JoinedCorpus) -> None:
    loader = _loader(joined)
    steps = list(loader.steps(loader.start()))
    assert len(steps) == loader.num_steps_per_epoch == 5
    assert [step.batches[0].real_count_in_step for step in steps] == [8, 8, 8, 8, 5]
    assert [step.ends_epoch for step in steps] == [False] * 4 + [True]
    assert sorted(itertools.chain.from_iterable(map(_real_rows, steps))) == list(range(NUM_ROWS))


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_run_resumed_at_any_step_goes_on_as_if_it_had_not_stopped(
    joined: JoinedCorpus, prefetch: int
) -> None:
    loader = _loader(joined, prefetch=prefetch)
    whole = list(loader.steps(loader.start(), 12))
    states = [loader.start(), *(step.state for step in whole)]
    for done, state in enumerate(states):
        restored = DataState.model_validate_json(state.model_dump_json())
        rest = list(_loader(joined, prefetch=prefetch).steps(restored, 12 - done))
        assert [_real_rows(step) for step in rest] == [_real_rows(step) for step in whole[done:]]
        assert [step.state for step in rest] == [step.state for step in whole[done:]]


def test_the_global_sequence_is_the_same_while_the_world_size_changes(joined: JoinedCorpus) -> None:
    loader = _loader(joined)
    expected = [_real_rows(step) for step in loader.steps(loader.start(), 12)]
    state, found = loader.start(), []
    for world_size in (1, 2, 4, 3):
        found += _global_steps(joined, world_size, state, 3)
        state = list(_loader(joined, 0, world_size).steps(state, 3))[-1].state
    assert found == expected


@pytest.mark.parametrize(("shard_rows", "world_size"), [(1, 2), (NUM_ROWS, 4), (20, 16)])
def test_one_row_shards_and_fewer_shards_than_ranks_are_read_whole(
    tmp_path: Path, shard_rows: int, world_size: int
) -> None:
    joined = _join(tmp_path, shard_rows=shard_rows)
    steps = _global_steps(joined, world_size, _loader(joined).start(), 5)
    assert sorted(itertools.chain.from_iterable(steps)) == list(range(NUM_ROWS))


def test_every_rank_has_the_same_micro_batches_in_every_step(joined: JoinedCorpus) -> None:
    shapes = []
    for rank in range(3):
        loader = _loader(joined, rank, 3)
        shapes.append([[len(batch.rows) for batch in step.batches] for step in loader.steps(loader.start())])
    assert shapes[0] == shapes[1] == shapes[2] == [[3]] * 5


def test_a_state_of_other_rows_or_batches_is_refused(joined: JoinedCorpus) -> None:
    with pytest.raises(RefusedError, match="global_batch: 4 -> 8"):
        list(_loader(joined).steps(_loader(joined, global_batch=4).start()))


@pytest.mark.parametrize("consumed", [3, 37, 40])
def test_a_position_where_no_step_begins_is_refused(joined: JoinedCorpus, consumed: int) -> None:
    loader = _loader(joined)
    with pytest.raises(DataError, match=f"no step begins at row {consumed} of an epoch of 37"):
        loader.steps(loader.start().model_copy(update={"samples_consumed": consumed}))


def test_evaluation_reads_every_row_once_over_all_ranks(joined: JoinedCorpus) -> None:
    rows = np.array([1, 5, 6, 20, 30, 31, 36])
    batches = [list(_loader(joined, rank, 3).evaluate(rows, 2)) for rank in range(3)]
    assert [[len(batch.rows) for batch in share] for share in batches] == [[2, 2]] * 3
    real = [row for share in batches for batch in share for row in batch.rows[batch.weights > 0].tolist()]
    assert real == rows.tolist()
    assert {batch.real_count_in_step for share in batches for batch in share} == {7}


def test_no_rows_and_tokens_of_another_corpus_are_refused(joined: JoinedCorpus) -> None:
    options = LoaderOptions(seed=0, global_batch=1, max_micro_batch=1, window=1)
    with pytest.raises(DataError, match="no rows to read"):
        StageLoader(joined, _tokens(NUM_ROWS), np.empty(0, np.int64), options)
    with pytest.raises(DataError, match="tokens of 3 rows"):
        StageLoader(joined, _tokens(3), joined.usable_rows(), options)


def test_a_damaged_store_is_raised_where_its_step_would_have_come(tmp_path: Path) -> None:
    joined = _join(tmp_path, shard_rows=5)
    loader = _loader(joined, prefetch=2)
    last = list(loader.steps(loader.start()))[-1]
    damaged = int(last.batches[-1].rows[0]) // 5
    record = joined.parts[0].targets[0][0].store.records[damaged]
    path = tmp_path / "store" / "data" / record.file
    data = bytearray(path.read_bytes())
    data[record.batches[0].offset + record.batches[0].length - 1] ^= 1
    path.write_bytes(data)
    source, targets = joined.parts[0].corpus.source, [target(("t", [tmp_path / "store"]))]
    damaged_join = JoinedCorpus.open([source], targets, ("a", "b", "c"))
    found = []
    with pytest.raises(DamagedStoreError) as error:  # noqa: PT012 - steps before it come
        for step in _loader(damaged_join, prefetch=2).steps(loader.start()):
            found.append(step)
    assert error.value.shard == damaged
    assert found


def _prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "tmkd-prefetch"]


def test_prefetching_stops_at_its_depth_and_its_thread_ends_when_closed() -> None:
    made: list[int] = []

    def count() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            yield number

    with Prefetch(count(), depth=2) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        # Two wait in the queue and one in the thread's hand.
        for _ in range(200):
            if len(made) == 6:
                break
            threading.Event().wait(0.005)
        threading.Event().wait(0.02)
        assert len(made) == 6
    assert not _prefetch_threads()
    assert list(items) == []


def test_closing_does_not_wait_for_a_thread_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.prefetch._POLL_S", 30.0)
    made: list[int] = []

    def count() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            yield number

    items = Prefetch(count(), depth=1)
    while len(made) < 2:
        threading.Event().wait(0.005)
    began_s = time.monotonic()
    items.close()
    assert time.monotonic() - began_s < 10
    assert len(made) == 2
    assert not _prefetch_threads()


def test_a_loader_left_early_leaves_no_thread(joined: JoinedCorpus) -> None:
    loader = _loader(joined, prefetch=2)
    with closing(loader.steps(loader.start())) as steps:
        next(steps)
        assert len(_prefetch_threads()) == 1
    assert not _prefetch_threads()


def test_an_error_of_the_source_is_raised_once_its_items_are_taken() -> None:
    def fail() -> Iterator[int]:
        yield 1
        raise KeyError("lost")

    with Prefetch(fail(), depth=4) as items:
        assert next(items) == 1
        with pytest.raises(KeyError, match="lost"):
            next(items)
        assert list(items) == []
