from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distill.store_reader import LogitStore
from distill.token_store import TokenStore
from schemas.codec import CODECS
from schemas.errors import DamagedStoreError, DataError, RefusedError
from schemas.token_rows import encode_token_rows
from tests.schemas.kept_examples import POLICIES
from tests.store_factory import make_part, make_store, take_keys, write_store
from tests.tiny_language import GRID, NUM_ROWS, VOCAB, TinyLanguage
from tests.token_store_factory import make_token_store, token_rows_of


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> TinyLanguage:
    return TinyLanguage(tmp_path_factory.mktemp("language"))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", POLICIES)
def test_rows_come_in_the_order_asked_for_as_they_were_written(
    stage: TinyLanguage, tmp_path: Path, codec: str, kind: str
) -> None:
    policy = POLICIES[kind]
    root = make_token_store(
        tmp_path / "store", stage.chunks, stage.teach(0), policy=policy, codec=codec, grid=GRID
    )
    store = TokenStore.open(root)
    rows = np.random.default_rng(1).permutation(NUM_ROWS)[:17].astype(np.int64)
    found = store.gather(rows)
    written = token_rows_of(stage.chunks, rows.tolist(), stage.teach(0), store.generation, 0)
    assert np.array_equal(found.chunks.input_ids, written.chunks.input_ids)
    assert np.array_equal(found.chunks.offsets, written.chunks.offsets)
    assert np.array_equal(found.rows, written.rows)
    assert np.array_equal(found.entries.offsets, written.entries.offsets)
    assert np.array_equal(found.entries.ids, written.entries.ids)
    np.testing.assert_allclose(found.entries.log_probs, written.entries.log_probs, rtol=0.02, atol=0.02)
    np.testing.assert_array_equal(found.stats.lse_grid, written.stats.lse_grid)


def test_no_rows_and_rows_one_by_one_can_be_asked_for(stage: TinyLanguage) -> None:
    store = TokenStore.open(stage.stores["first"])
    assert store.num_rows == NUM_ROWS
    nothing = store.gather(np.empty(0, np.int64))
    assert (len(nothing.chunks.offsets), nothing.entries.num_positions) == (1, 0)
    whole = store.gather(np.arange(NUM_ROWS))
    for row in range(NUM_ROWS):
        one = store.gather(np.array([row]))
        positions = slice(whole.rows[row], whole.rows[row + 1])
        assert np.array_equal(one.stats.lse, whole.stats.lse[positions])


def test_a_store_of_the_other_level_is_refused_in_both_directions(
    stage: TinyLanguage, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match="token-level output of a language model"):
        LogitStore.open(stage.stores["first"])
    part = make_part(tmp_path / "rows.arrow", [("a",)] * 4, [0] * 4, shard_rows=2)
    root = make_store(tmp_path / "store", part.plan, np.zeros((4, 3), np.float32))
    with pytest.raises(RefusedError, match="logits of a classifier"):
        TokenStore.open(root)


def test_excluded_rows_are_named_and_never_returned(stage: TinyLanguage, tmp_path: Path) -> None:
    root = make_token_store(tmp_path / "store", stage.chunks, stage.teach(0), excluded=(3, 17))
    store = TokenStore.open(root)
    assert store.excluded.tolist() == [3, 17]
    with pytest.raises(DataError, match="row 17 is excluded"):
        store.gather(np.array([2, 17]))
    with pytest.raises(DataError, match="rows 0 to 40 asked for"):
        store.gather(np.array([0, NUM_ROWS]))
    whole = TokenStore.open(stage.stores["first"])
    assert np.array_equal(store.gather(np.array([18])).chunks.input_ids, stage.chunks.tokens[18])
    assert np.array_equal(store.gather(np.array([18])).stats.lse, whole.gather(np.array([18])).stats.lse)


def test_a_flipped_bit_is_seen_before_a_value(stage: TinyLanguage, tmp_path: Path) -> None:
    root = make_token_store(tmp_path / "store", stage.chunks, stage.teach(0), batch_rows=10)
    path = next((root / "data").glob("s000001-*.arrow"))
    whole = path.read_bytes()
    for byte in np.random.default_rng(0).integers(0, len(whole), 40):
        data = bytearray(whole)
        data[byte] ^= 4
        path.write_bytes(data)
        with pytest.raises(DamagedStoreError, match="s000001"):
            TokenStore.open(root).gather(np.arange(10, 20))


def test_a_kept_id_outside_the_vocabulary_is_damage_also_where_hashes_match(
    stage: TinyLanguage, tmp_path: Path
) -> None:
    honest = TokenStore.open(make_token_store(tmp_path / "a", stage.chunks, stage.teach(0), codec="fixed"))
    schema = honest.generation.shard_schema()
    written = {row: honest.shard_file(row // 10).batch(row % 10 // 4).batch for row in range(NUM_ROWS)}

    def forge(rows: np.ndarray) -> pa.RecordBatch:
        first = written[int(rows[0])]
        whole = pa.concat_batches([_row(written, int(row)) for row in rows])
        columns = {name: whole.column(name) for name in schema.names}
        ids = columns["ids"]
        values = np.array(ids.values.to_numpy(zero_copy_only=False), copy=True)
        values[-1] = 60000
        forged = pa.Array.from_buffers(
            first.column("ids").type,
            len(ids),
            [None, ids.buffers()[1]],
            children=[pa.Array.from_buffers(pa.uint16(), len(values), [None, pa.py_buffer(values)])],
        )
        columns["ids"] = forged
        return pa.record_batch([columns[name] for name in schema.names], schema=schema)

    root = write_store(tmp_path / "b", honest.plan, honest.identity, forge, batch_rows=10)
    store = TokenStore.open(root)
    with pytest.raises(DamagedStoreError, match="out of range"):
        store.gather(np.arange(NUM_ROWS))


def _row(written: dict[int, pa.RecordBatch], row: int) -> pa.RecordBatch:
    return written[row].slice(row % 10 % 4, 1)


def test_a_shard_whose_schema_names_another_policy_is_damage(stage: TinyLanguage, tmp_path: Path) -> None:
    one = TokenStore.open(stage.stores["first"])
    other = one.generation.model_copy(update={"grid": (3.0,)})

    def make_rows(rows: np.ndarray) -> pa.RecordBatch:
        decoded = token_rows_of(stage.chunks, rows.tolist(), stage.teach(0), one.generation, 0)
        return encode_token_rows(take_keys(one.plan, rows), decoded, other.shard_schema())

    root = write_store(tmp_path / "store", one.plan, one.identity, make_rows)
    with pytest.raises(DamagedStoreError, match="codec, policy or grid is another"):
        TokenStore.open(root)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", POLICIES)
def test_bytes_that_a_stranger_changed_decode_or_are_damage_also_without_hashes(
    stage: TinyLanguage, tmp_path: Path, codec: str, kind: str
) -> None:
    root = make_token_store(
        tmp_path / "store",
        stage.chunks,
        stage.teach(0),
        policy=POLICIES[kind],
        codec=codec,
        grid=GRID,
        batch_rows=10,
    )
    path = next((root / "data").glob("s000001-*.arrow"))
    whole = path.read_bytes()
    record = TokenStore.open(root).records[1]
    rng = np.random.default_rng(0)
    num_damaged = 0
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, record.batches[0].length, rng.integers(1, 4)):
            data[record.batches[0].offset + place] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
        path.write_bytes(data)
        try:
            found = TokenStore.open(root, verify=False).gather(np.arange(10, 20))
        except DamagedStoreError:
            num_damaged += 1
            continue
        ids = found.entries.ids.astype(np.int64)
        assert ((ids >= 0) & (ids < VOCAB)).all()
    assert num_damaged
