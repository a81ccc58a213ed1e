from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from distill.language_corpus import LanguageCorpus
from distill.language_loader import LanguageLoader, PackedBatch, PackOptions
from distill.loader import LoaderOptions
from schemas.errors import DataError, RecipeError, RefusedError
from tests.tiny_language import NUM_ROWS, TinyLanguage

MAX_LENGTH = 24


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> TinyLanguage:
    return TinyLanguage(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def corpus(stage: TinyLanguage) -> LanguageCorpus:
    return LanguageCorpus.open(stage.job("a"))


def make_loader(corpus: LanguageCorpus, **fields: Any) -> LanguageLoader:
    options = {"seed": 3, "global_batch": 5, "max_micro_batch": 2, "window": 2, "prefetch": 0} | fields
    packs = PackOptions(MAX_LENGTH)
    return LanguageLoader(corpus, corpus.usable_rows(), LoaderOptions(**options), packs)


def rows_of(batches: Any) -> list[int]:
    return [int(row) for batch in batches for row in batch.rows[batch.weights > 0]]


def read_rows(loader: LanguageLoader, epochs: int = 1) -> list[list[int]]:
    steps = loader.steps(loader.start(), loader.count_steps(epochs))
    return [rows_of(step.batches) for step in steps]


def test_an_epoch_has_every_row_once_in_packs_of_at_most_the_training_length(corpus: LanguageCorpus) -> None:
    loader = make_loader(corpus)
    rows = [row for step in read_rows(loader) for row in step]
    assert sorted(rows) == list(range(NUM_ROWS))
    steps = list(loader.steps(loader.start()))
    assert [step.ends_epoch for step in steps] == [False] * (len(steps) - 1) + [True]
    assert sum(step.num_rows for step in steps) == NUM_ROWS
    assert max(batch.input_ids_BL.shape[1] for step in steps for batch in step.batches) <= MAX_LENGTH
    # Packing is worth it: fewer sequences than rows.
    assert sum(len(step.batches) * 2 for step in steps) < NUM_ROWS / 1.5


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_the_rows_of_a_step_do_not_depend_on_the_number_of_ranks(
    corpus: LanguageCorpus, world_size: int
) -> None:
    one = read_rows(make_loader(corpus), epochs=2)
    ranks = [
        read_rows(make_loader(corpus, rank=rank, world_size=world_size), epochs=2)
        for rank in range(world_size)
    ]
    for step, expected in enumerate(one):
        assert [row for rank in ranks for row in rank[step]] == expected


def test_every_rank_knows_how_many_tokens_the_whole_step_predicts(corpus: LanguageCorpus) -> None:
    ranks = [make_loader(corpus, rank=rank, world_size=2) for rank in range(2)]
    pairs = [list(loader.steps(loader.start())) for loader in ranks]
    for first, second in zip(*pairs, strict=True):
        batches = (*first.batches, *second.batches)
        real = sum(float(batch.targets[0].position_weights_N.sum()) for batch in batches)
        assert {batch.real_count_in_step for batch in batches} == {int(real)}
        assert len(first.batches) == len(second.batches)


def test_reading_goes_on_where_it_stopped_and_the_state_counts_rows(corpus: LanguageCorpus) -> None:
    loader = make_loader(corpus)
    steps = list(loader.steps(loader.start(), loader.count_steps(3)))
    consumed = 0
    for place, step in enumerate(steps[:-1]):
        consumed = 0 if step.ends_epoch else consumed + step.num_rows
        assert step.state.samples_consumed == consumed
        after = next(iter(make_loader(corpus).steps(step.state, 1)))
        assert rows_of(after.batches) == rows_of(steps[place + 1].batches)
        assert after.state == steps[place + 1].state


def test_a_state_at_which_no_step_begins_or_of_other_data_is_an_error(corpus: LanguageCorpus) -> None:
    loader = make_loader(corpus)
    first = next(iter(loader.steps(loader.start(), 1))).state
    with pytest.raises(DataError, match="no step begins at row"):
        loader.steps(first.model_copy(update={"samples_consumed": first.samples_consumed - 1}))
    with pytest.raises(RefusedError, match="other data"):
        make_loader(corpus, seed=4).steps(first)


def test_tokens_positions_and_targets_lie_where_the_packs_put_them(
    stage: TinyLanguage, corpus: LanguageCorpus
) -> None:
    for step in make_loader(corpus).steps(make_loader(corpus).start()):
        for batch in step.batches:
            check_batch(stage, batch)


def check_batch(stage: TinyLanguage, batch: PackedBatch) -> None:
    flat, positions = batch.input_ids_BL.flatten(), batch.positions_BL.flatten()
    segments = batch.segments_BL
    found = []
    for sequence in range(len(segments)):
        for number in range(1, int(segments[sequence].max()) + 1):
            found.append(batch.input_ids_BL[sequence][segments[sequence] == number].numpy())
    for row, ids in zip(batch.rows.tolist(), found, strict=True):
        assert np.array_equal(ids, stage.chunks.tokens[row])
    # Off by one anywhere, and this fails: what is to be predicted is the next token of the same row.
    assert torch.equal(flat[batch.places_N + 1], batch.targets[0].target_ids_N)
    assert torch.equal(positions[batch.places_N + 1], positions[batch.places_N] + 1)


def test_a_row_that_is_longer_than_a_sequence_is_an_error(corpus: LanguageCorpus) -> None:
    options = LoaderOptions(seed=0, global_batch=1, max_micro_batch=1, window=1)
    with pytest.raises(RecipeError, match="max_length is 10, but chunks have up to 12 tokens"):
        LanguageLoader(corpus, corpus.usable_rows(), options, PackOptions(10))
    with pytest.raises(DataError, match="no rows to read"):
        LanguageLoader(corpus, np.empty(0, np.int64), options, PackOptions(24))


def test_held_out_rows_are_shared_out_and_counted_once(corpus: LanguageCorpus) -> None:
    rows = np.arange(3, 20)
    found = []
    for rank in range(3):
        batches = list(make_loader(corpus, rank=rank, world_size=3).evaluate(rows, 2))
        found += rows_of(batches)
        assert {batch.real_count_in_step for batch in batches} == {int(corpus.num_targets[rows].sum())}
    assert found == rows.tolist()
