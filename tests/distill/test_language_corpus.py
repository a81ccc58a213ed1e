from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.language_corpus import LanguageCorpus
from schemas.chunks import open_chunks
from schemas.errors import DamagedStoreError, DataError, RefusedError
from schemas.job import TokenTeacher
from schemas.policy import DensePolicy, SampledPolicy
from tests.store_factory import make_part, make_store
from tests.tiny_language import GRID, NUM_ROWS, VOCAB, TinyLanguage
from tests.token_store_factory import make_chunks, make_token_store, sources_and_goals


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> TinyLanguage:
    return TinyLanguage(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> TinyLanguage:
    return TinyLanguage(tmp_path_factory.mktemp("masked"), "masked")


def with_store(root: Path | str, **fields: Any) -> dict[str, Any]:
    return {"teachers": (TokenTeacher(name="first", stores=(str(root),)),), **fields}


def test_a_causal_position_predicts_the_token_after_it(stage: TinyLanguage) -> None:
    corpus = LanguageCorpus.open(stage.job("a"))
    rows = np.array([7, 2, 30])
    found = corpus.gather(rows)
    start = 0
    sources, targets = [], []
    for row in rows:
        ids = stage.chunks.tokens[row]
        here, goals = sources_and_goals(stage.chunks.masks[row], "causal")
        sources += [start + place for place in here]
        targets += ids[goals].tolist()
        assert [place + 1 for place in here] == goals
        start += len(ids)
    assert found.sources.tolist() == sources
    assert found.targets[0].target_ids_N.tolist() == targets
    assert found.input_ids.tolist() == np.concatenate([stage.chunks.tokens[row] for row in rows]).tolist()
    # The teacher gives most to the token that comes: the store's positions are the same ones.
    stored = found.targets[0]
    best_N = stored.ids_NK.gather(1, stored.log_probs_NK.float().argmax(dim=1, keepdim=True))[:, 0]
    assert (best_N.long() == stored.target_ids_N).float().mean() > 0.8


def test_a_masked_position_predicts_itself_and_the_model_does_not_see_it(masked: TinyLanguage) -> None:
    corpus = LanguageCorpus.open(masked.job("a"))
    found = corpus.gather(np.array([4, 9]))
    ids = np.concatenate([masked.chunks.tokens[row] for row in (4, 9)])
    hidden = np.concatenate([masked.chunks.masks[row] for row in (4, 9)]).astype(bool)
    assert masked.spec.mask is not None
    assert found.sources.tolist() == np.flatnonzero(hidden).tolist()
    assert found.targets[0].target_ids_N.tolist() == ids[hidden].tolist()
    assert (found.input_ids[hidden] == masked.spec.mask.token).all()
    assert (found.input_ids[~hidden] == ids[~hidden]).all()


def test_rows_of_several_parts_come_in_the_order_asked_for(stage: TinyLanguage, tmp_path: Path) -> None:
    other = stage.make_part("more", 12, seed=8)
    store = make_token_store(tmp_path / "more", other, stage.teach(0, other), grid=GRID)
    teachers = (TokenTeacher(name="first", stores=(str(stage.stores["first"]), str(store))),)
    parts = (stage.chunks.part.source, other.part.source)
    corpus = LanguageCorpus.open(
        stage.job("a", parts=parts, teachers=()).model_copy(update={"teachers": teachers})
    )
    rows = np.array([41, 3, 50, 39, 40])
    together = corpus.gather(rows)
    alone = [corpus.gather(rows[place : place + 1]) for place in range(len(rows))]
    assert together.input_ids.tolist() == np.concatenate([one.input_ids for one in alone]).tolist()
    starts = np.cumsum([0, *(len(one.input_ids) for one in alone)])
    assert together.offsets.tolist() == starts.tolist()
    expected = np.concatenate([one.sources + start for one, start in zip(alone, starts[:-1], strict=True)])
    assert together.sources.tolist() == expected.tolist()
    for name in ("target_ids_N", "lse_N", "ids_NK", "log_tail_N"):
        pieces = [getattr(one.targets[0], name) for one in alone]
        assert torch.equal(getattr(together.targets[0], name), torch.cat(pieces)), name
    assert corpus.usable_rows().tolist() == list(range(NUM_ROWS + 12))


def test_excluded_rows_and_rows_with_nothing_to_predict_are_not_used(
    stage: TinyLanguage, tmp_path: Path
) -> None:
    masks = [mask * (row != 5) for row, mask in enumerate(stage.chunks.masks)]
    chunks = make_chunks(tmp_path / "chunks.arrow", stage.chunks.tokens, masks, stage.spec, shard_rows=10)
    root = make_token_store(tmp_path / "store", chunks, stage.teach(0), excluded=(8,))
    corpus = LanguageCorpus.open(
        stage.job("a", parts=(chunks.part.source,)).model_copy(update=with_store(root))
    )
    assert corpus.usable_rows().tolist() == [row for row in range(NUM_ROWS) if row not in (5, 8)]


def test_a_teacher_with_another_tokenizer_is_refused_in_one_line(stage: TinyLanguage, tmp_path: Path) -> None:
    other = stage.spec.model_copy(update={"tokenizer": "0" * 64})
    chunks = make_chunks(
        tmp_path / "chunks.arrow", stage.chunks.tokens, stage.chunks.masks, other, shard_rows=10
    )
    root = make_token_store(tmp_path / "store", chunks, stage.teach(0))
    with pytest.raises(RefusedError, match="teacher first has another tokenizer than the student") as caught:
        LanguageCorpus.open(stage.job("a").model_copy(update=with_store(root)))
    assert "\n" not in str(caught.value)
    with pytest.raises(RefusedError, match="its chunks are of another tokenizer than the student's"):
        LanguageCorpus.open(stage.job("a", parts=(chunks.part.source,)))


def test_another_vocabulary_or_objective_is_refused(stage: TinyLanguage, masked: TinyLanguage) -> None:
    with pytest.raises(RefusedError, match="another vocab than the student's"):
        LanguageCorpus.open(stage.job("a", vocab=VOCAB + 1))
    job = stage.job("a").model_copy(update=with_store(masked.stores["first"]))
    with pytest.raises(RefusedError, match="belongs to another plan"):
        LanguageCorpus.open(job)


def test_a_vocabulary_of_the_store_that_is_not_the_jobs_is_refused(
    stage: TinyLanguage, tmp_path: Path
) -> None:
    other = stage.spec.model_copy(update={"vocab": VOCAB + 3})
    chunks = make_chunks(
        tmp_path / "chunks.arrow", stage.chunks.tokens, stage.chunks.masks, other, shard_rows=10
    )

    def teach(row: int) -> np.ndarray:
        return np.pad(stage.teach(0)(row), ((0, 0), (0, 3)))

    root = make_token_store(tmp_path / "store", chunks, teach)
    with pytest.raises(
        RefusedError, match=f"causal over {VOCAB + 3} tokens, the student is causal over {VOCAB}"
    ):
        LanguageCorpus.open(stage.job("a").model_copy(update=with_store(root)))


def test_a_store_of_a_classifier_is_refused(stage: TinyLanguage, tmp_path: Path) -> None:
    part = make_part(tmp_path / "rows.arrow", [("a",)] * 4, [0] * 4, shard_rows=2)
    root = make_store(tmp_path / "store", part.plan, np.zeros((4, 3), np.float32))
    with pytest.raises(RefusedError, match="logits of a classifier, for a recipe of classification"):
        LanguageCorpus.open(stage.job("a").model_copy(update=with_store(root)))


def test_chunks_that_changed_are_refused(stage: TinyLanguage, tmp_path: Path) -> None:
    part = stage.chunks.part.source
    with pytest.raises(RefusedError, match="changed since they were planned"):
        LanguageCorpus.open(
            stage.job("a", teachers=(), parts=(part.model_copy(update={"fingerprint": "0" * 64}),))
        )
    # Ids and hashes are the plan's, a token is not.
    path = shutil.copy(part.rows, tmp_path / "chunks.arrow")
    data = bytearray(Path(path).read_bytes())
    _, table = open_chunks(part.rows)
    needle = np.array(table.column("input_ids")[6].as_py(), "<i4").tobytes()
    place = data.index(needle)
    data[place] ^= 1
    Path(path).write_bytes(data)
    moved = part.model_copy(update={"rows": str(path)})
    bare = LanguageCorpus.open(stage.job("a", teachers=(), parts=(moved,)))
    with pytest.raises(RefusedError, match="tokens of row 6 are not those of their text hash"):
        bare.gather(np.arange(8))
    taught = LanguageCorpus.open(stage.job("a", parts=(moved,)))
    with pytest.raises(DamagedStoreError, match="tokens of teacher first differ from the chunks"):
        taught.gather(np.arange(8))


def test_a_token_outside_the_vocabulary_is_an_error(stage: TinyLanguage, tmp_path: Path) -> None:
    tokens = [row.copy() for row in stage.chunks.tokens]
    tokens[3][1] = VOCAB
    chunks = make_chunks(tmp_path / "chunks.arrow", tokens, stage.chunks.masks, stage.spec, shard_rows=10)
    with pytest.raises(DataError, match=f"token id {VOCAB} is out of range"):
        LanguageCorpus.open(stage.job("a", teachers=(), parts=(chunks.part.source,)))


def test_stores_of_one_teacher_that_keep_other_things_are_an_error(
    stage: TinyLanguage, tmp_path: Path
) -> None:
    other = stage.make_part("other", 12, seed=9)
    root = make_token_store(tmp_path / "store", other, stage.teach(0, other), policy=DensePolicy())
    teachers = (TokenTeacher(name="first", stores=(str(stage.stores["first"]), str(root))),)
    job = stage.job("a", parts=(stage.chunks.part.source, other.part.source)).model_copy(
        update={"teachers": teachers}
    )
    with pytest.raises(DataError, match="differ in policy or temperatures"):
        LanguageCorpus.open(job)


def test_weights_of_sampled_stores_come_along(stage: TinyLanguage, tmp_path: Path) -> None:
    policy = SampledPolicy(kind="sampled", num_samples=6)
    root = make_token_store(tmp_path / "store", stage.chunks, stage.teach(0), policy=policy)
    corpus = LanguageCorpus.open(stage.job("a").model_copy(update=with_store(root)))
    stored = corpus.gather(np.arange(NUM_ROWS)).targets[0]
    assert stored.weights_NK is not None
    torch.testing.assert_close(stored.weights_NK.sum(dim=1), torch.ones(stored.num_positions))


def test_several_threads_may_read_at_once(stage: TinyLanguage, tmp_path: Path, monkeypatch: Any) -> None:
    # With one map kept, every batch maps a shard anew: the likeliest moment for threads to meet.
    monkeypatch.setattr("distill.row_store.MAX_MAPPED_SHARDS", 1)
    root = make_token_store(tmp_path / "store", stage.chunks, stage.teach(0))
    corpus = LanguageCorpus.open(stage.job("a").model_copy(update=with_store(root)))
    expected = [corpus.gather(np.array([row])).targets[0].lse_N for row in range(NUM_ROWS)]

    def read(seed: int) -> bool:
        rows = np.random.default_rng(seed).permutation(NUM_ROWS)[:9]
        found = corpus.gather(rows).targets[0].lse_N
        return torch.equal(found, torch.cat([expected[row] for row in rows]))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(60)))
