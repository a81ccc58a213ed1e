"""The order of reading through interruptions: the global sequence is one, whoever reads it and how.

A "worker" of this loader is its background thread: ``prefetch`` steps are made ahead of the optimizer,
0 without a thread.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from distill.data_state import DataState
from distill.logit_dataset import LogitDataset
from distill.order import OrderKey, order
from distill.store_reader import LogitStore
from schemas.errors import RefusedError
from tests.reliability.reading import MadeCorpus, PartShape, Reading
from tests.reliability.trials import Trials, counted
from tests.store_factory import make_part, make_store
from tests.tally import Tally

WORLD_SIZES = (1, 2, 4, 3)
PREFETCHES = (0, 1, 3)
PARTS = (
    # Shards of many sizes, one of a single row, one of which nothing is left; rows that one teacher
    # or both have excluded.
    PartShape((5, 7, 1, 3, 6), ((2, 13, 14), (14, 15, 20))),
    PartShape((1, 1, 9, 4), ((0,), ())),
)
NUM_STEPS = 9  # Two epochs and a bit; the last step of an epoch is short.


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> MadeCorpus:
    made = MadeCorpus(tmp_path_factory.mktemp("corpus"), PARTS, dropped=(4, 30))
    assert len(made.usable) == 29
    assert made.steps_per_epoch == 4
    return made


@pytest.mark.parametrize("prefetch", PREFETCHES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_run_resumed_at_any_step_goes_on_as_if_it_had_not_stopped(
    corpus: MadeCorpus, tally: Tally, world_size: int, prefetch: int
) -> None:
    reading, expected = Reading(world_size, prefetch), corpus.expected(NUM_STEPS)
    with counted(tally, "order", "resumed at every step") as trials:
        for done in range(NUM_STEPS + 1):
            with trials.attempt():
                before, state = corpus.read(reading, None, NUM_STEPS, done)
                after, _ = corpus.read(reading, state, NUM_STEPS - done)
                assert before + after == expected


def test_a_run_that_is_interrupted_after_each_of_its_steps_goes_on(corpus: MadeCorpus, tally: Tally) -> None:
    found, state = [], None
    with counted(tally, "order", "interrupted after each step, several times in a row") as trials:
        for prefetch in PREFETCHES:
            found, state = [], None
            for done in range(NUM_STEPS):
                with trials.attempt():
                    reading = Reading(WORLD_SIZES[done % 4], prefetch)
                    steps, state = corpus.read(reading, state, NUM_STEPS - done, 1)
                    found += steps
                    assert found == corpus.expected(done + 1)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_run_interrupted_at_an_epochs_end_begins_the_next_one(
    corpus: MadeCorpus, tally: Tally, world_size: int
) -> None:
    per_epoch = corpus.steps_per_epoch
    with counted(tally, "order", "interrupted at an epoch's end") as trials:
        for prefetch, epochs in itertools.product(PREFETCHES, (1, 2)):
            with trials.attempt():
                reading, done = Reading(world_size, prefetch), epochs * per_epoch
                before, state = corpus.read(reading, None, done + 5, done)
                assert state is not None
                assert (state.epoch, state.samples_consumed) == (epochs, 0)
                # Without a number of steps a run goes to the end of the state's epoch.
                after, state = corpus.read(reading, state, None)
                assert before + after == corpus.expected(done + per_epoch)
                assert state is not None
                assert (state.epoch, state.samples_consumed) == (epochs + 1, 0)


def test_what_is_left_of_an_epoch_is_read_to_its_end(corpus: MadeCorpus, tally: Tally) -> None:
    with counted(tally, "order", "rest of an epoch") as trials:
        for done in range(2 * corpus.steps_per_epoch):
            with trials.attempt():
                before, state = corpus.read(Reading(), None, NUM_STEPS, done)
                after, _ = corpus.read(Reading(2, 1), state, None)
                last = (done // corpus.steps_per_epoch + 1) * corpus.steps_per_epoch
                assert before + after == corpus.expected(last)


@pytest.mark.parametrize("prefetch", PREFETCHES)
def test_a_run_interrupted_before_its_first_step_begins_anew(
    corpus: MadeCorpus, tally: Tally, prefetch: int
) -> None:
    expected = corpus.expected(NUM_STEPS)
    with counted(tally, "order", "interrupted before the first batch") as trials:
        for world_size in WORLD_SIZES:
            reading = Reading(world_size, prefetch)
            with trials.attempt():
                # Nothing was asked for; then a first step was made, and the optimizer never took it.
                _, start = corpus.read(reading, None, NUM_STEPS, 0)
                assert corpus.read(reading, start, NUM_STEPS)[0] == expected
                start = corpus.loaders(reading)[0].start()
                corpus.read(reading, start, NUM_STEPS, 1)
                assert corpus.read(reading, start, NUM_STEPS)[0] == expected


@pytest.mark.parametrize("prefetches", [PREFETCHES, PREFETCHES[::-1]], ids=["0-1-3", "3-1-0"])
def test_the_global_sequence_is_one_while_ranks_and_prefetching_change(
    corpus: MadeCorpus, tally: Tally, prefetches: tuple[int, ...]
) -> None:
    _change(corpus, tally, [WORLD_SIZES, WORLD_SIZES[::-1]], prefetches)


@pytest.mark.slow
@pytest.mark.parametrize("prefetches", list(itertools.permutations(PREFETCHES)))
def test_the_global_sequence_is_one_in_whatever_order_they_change(
    corpus: MadeCorpus, tally: Tally, prefetches: tuple[int, ...]
) -> None:
    _change(corpus, tally, itertools.permutations(WORLD_SIZES), prefetches)


def _change(
    corpus: MadeCorpus, tally: Tally, orders: Iterable[tuple[int, ...]], prefetches: tuple[int, ...]
) -> None:
    expected = corpus.expected(4 * 3)
    with counted(tally, "order", "world size and workers changed at a constant global batch") as trials:
        for world_sizes in orders:
            found, state = [], None
            for world_size, prefetch in zip(world_sizes, itertools.cycle(prefetches), strict=False):
                reading = Reading(world_size, prefetch, max_micro_batch=1 + world_size)
                with trials.attempt():
                    steps, state = corpus.read(reading, state, 20, 3)
                    found += steps
                    assert found == expected[: len(found)]
            assert found == expected


@st.composite
def shapes(draw: st.DrawFn) -> PartShape:
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    rows = st.sets(st.integers(0, sum(sizes) - 1), max_size=3).map(lambda chosen: tuple(sorted(chosen)))
    return PartShape(tuple(sizes), (draw(rows), draw(rows)))


READINGS = st.builds(Reading, st.integers(1, 7), st.sampled_from(PREFETCHES), st.integers(1, 5))
SEGMENTS = st.lists(st.tuples(READINGS, st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=5)


def _try_any_corpus(tally: Tally, case: str, max_examples: int) -> None:
    with counted(tally, "order", case) as trials:

        @settings(max_examples=max_examples, deadline=None)
        @given(
            parts=st.lists(shapes(), min_size=1, max_size=3),
            global_batch=st.integers(1, 9),
            window=st.integers(1, 4),
            dropped=st.sets(st.integers(0, 20), max_size=3),
            segments=SEGMENTS,
        )
        def check(
            parts: list[PartShape],
            global_batch: int,
            window: int,
            dropped: set[int],
            segments: list[tuple[Reading, int, int]],
        ) -> None:
            num_rows = sum(sum(part.shards) for part in parts)
            dropped = {row for row in dropped if row < num_rows}
            with tempfile.TemporaryDirectory() as directory:
                made = MadeCorpus(
                    Path(directory), parts, global_batch=global_batch, window=window, dropped=sorted(dropped)
                )
                assume(len(made.usable))
                _interrupt(made, segments, trials)

        check()


def _interrupt(made: MadeCorpus, segments: list[tuple[Reading, int, int]], trials: Trials) -> None:
    with trials.attempt(len(segments)):
        found, state = [], None
        for reading, taken, more in segments:
            steps, state = made.read(reading, state, taken + more, taken)
            assert len(steps) == taken
            found += steps
        rest, _ = made.read(segments[0][0], state, made.steps_per_epoch + 1)
        found += rest
        assert found == made.expected(len(found))


def test_any_corpus_is_read_in_one_order_through_any_interruptions(tally: Tally) -> None:
    _try_any_corpus(tally, "any shard sizes, ranks, exclusions, parts", 15)


@pytest.mark.slow
def test_hundreds_of_corpora_are_read_in_one_order_through_any_interruptions(tally: Tally) -> None:
    _try_any_corpus(tally, "any shard sizes, ranks, exclusions, parts", 400)


@pytest.mark.parametrize(
    "shards", [(1,), (1,) * 11, (2, 1), (30,)], ids=["one row", "one-row shards", "three rows", "one shard"]
)
def test_fewer_rows_or_shards_than_ranks_are_read_whole(
    tmp_path: Path, tally: Tally, shards: tuple[int, ...]
) -> None:
    made = MadeCorpus(tmp_path, [PartShape(shards)])
    expected = made.expected(6)
    with counted(tally, "order", "fewer rows or shards than ranks") as trials:
        for world_size, done in itertools.product((1, 4, 16), (0, 1, 4, 6)):
            with trials.attempt():
                before, state = made.read(Reading(world_size), None, 6, done)
                after, _ = made.read(Reading(world_size, 1), state, 6 - done)
                assert before + after == expected


@pytest.mark.parametrize("name", sorted(set(DataState.model_fields) - {"epoch", "samples_consumed"}))
def test_a_position_in_other_data_is_refused_naming_the_field(
    corpus: MadeCorpus, tally: Tally, name: str
) -> None:
    loader = corpus.loaders(Reading())[0]
    value = getattr(loader.start(), name)
    other = {int: lambda: value + 1, str: lambda: "f" * 64, tuple: lambda: (*value, "f" * 64)}[type(value)]()
    state = loader.start().model_copy(update={name: other})
    with counted(tally, "order", "state of other data refused") as trials, trials.attempt():
        with pytest.raises(RefusedError) as caught:
            loader.steps(state, 1)
        assert [field.split(":")[0] for field in caught.value.differing] == [name]


# Three workers on two cores are what is asked for.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_users_worker_processes_read_the_order_too(tmp_path: Path, tally: Tally) -> None:
    num_rows, batch_rows = 30, 4
    part = make_part(
        tmp_path / "rows.arrow", [(f"{row}",) for row in range(num_rows)], [0] * num_rows, shard_rows=7
    )
    logits = np.random.default_rng(0).normal(size=(num_rows, 3)).astype(np.float32)
    dataset = LogitDataset(
        LogitStore.open(make_store(tmp_path / "store", part.plan, logits, excluded=[3, 29]))
    )
    rows, bounds = dataset.store.stored_rows(), np.asarray(part.plan.bounds)
    sequence = order(OrderKey(1, "k", 2), 0, rows, bounds, 0, len(rows))
    indices = np.searchsorted(rows, sequence)
    batches = [indices[first : first + batch_rows].tolist() for first in range(0, len(rows), batch_rows)]
    found: list[int] = []
    with counted(tally, "order", "worker processes of a torch DataLoader, 0 -> 1 -> 3") as trials:
        for num_workers, part_of_them in ((0, batches[:2]), (1, batches[2:4]), (3, batches[4:])):
            with trials.attempt():
                loader = DataLoader(dataset, batch_sampler=part_of_them, num_workers=num_workers)
                for batch in loader:
                    read = batch["row"].tolist()
                    found += read
                    assert np.array_equal(batch["logits"].numpy(), logits[read])
                assert found == sequence[: len(found)].tolist()
        assert len(found) == num_rows - 2
