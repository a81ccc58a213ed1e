from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.codec import CODECS, CodecError, EntryLayout
from schemas.kept_entries import KeptEntries
from schemas.policy import AnyPolicy, TopKPolicy, TopPPolicy
from schemas.value_code import dequantise, quantise
from tests.schemas.kept_examples import POLICIES, cut_rows, make_entries

LARGE_VOCABS = (50, 49152, 65536, 65537, 152064, 2**31)
cases = pytest.mark.parametrize("kind", POLICIES)
codecs = pytest.mark.parametrize("name", CODECS)


def rounded(name: str, entries: KeptEntries) -> np.ndarray:
    """Returns the log-probabilities as a codec keeps them; tau is derived and not rounded."""
    kept = (
        dequantise(quantise(entries.log_probs))
        if name == "compact"
        else entries.log_probs.astype(np.float16).astype(np.float32)
    )
    return np.where(entries.head_mask(), kept, entries.log_probs)


@codecs
@cases
@given(seed=st.integers(0, 2**32), vocab=st.sampled_from(LARGE_VOCABS), num_rows=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_entries_come_back_with_values_within_the_codecs_rounding(
    name: str, kind: str, seed: int, vocab: int, num_rows: int
) -> None:
    if kind == "dense":
        vocab = 50
    layout = EntryLayout(POLICIES[kind], vocab)
    entries, log_tail = make_entries(POLICIES[kind], vocab, seed % 11, seed, empty=0.3)
    rows = cut_rows(entries.num_positions, num_rows, seed)
    columns = CODECS[name].encode(entries, rows, layout)
    fields = CODECS[name].fields(layout)
    assert set(columns) == {field.name for field in fields}
    for field in fields:
        assert columns[field.name].type == field.type
        columns[field.name].validate(full=True)
    found = CODECS[name].decode(columns, rows, layout, log_tail)
    np.testing.assert_array_equal(found.offsets, entries.offsets)
    np.testing.assert_array_equal(found.ids, entries.ids)
    assert (found.ids.dtype, found.log_probs.dtype) == (np.int32, np.float32)
    np.testing.assert_allclose(found.log_probs, rounded(name, entries), rtol=1e-5, atol=1e-5)
    if entries.num_head is not None and entries.tau is not None:
        np.testing.assert_array_equal(found.num_head, entries.num_head)
        np.testing.assert_allclose(found.tau, entries.tau, rtol=1e-5)
    if entries.draws is not None:
        assert found.draws is not None
        np.testing.assert_array_equal(found.draws.counts, entries.draws.counts)
        np.testing.assert_array_equal(found.draws.log_norm, entries.draws.log_norm)
        assert (found.draws.num_samples, found.draws.tau) == (7, 0.8)


@codecs
@cases
def test_some_rows_of_a_batch_are_read_alone(name: str, kind: str) -> None:
    layout = EntryLayout(POLICIES[kind], 50)
    entries, log_tail = make_entries(POLICIES[kind], 50, 9, seed=4)
    rows = np.array([0, 2, 2, 7, 9])
    columns = CODECS[name].encode(entries, rows, layout)
    whole = CODECS[name].decode(columns, rows, layout, log_tail)
    part = {key: column.slice(1, 2) for key, column in columns.items()}
    found = CODECS[name].decode(part, rows[1:4] - 2, layout, log_tail[2:7])
    start, stop = whole.offsets[[2, 7]]
    np.testing.assert_array_equal(found.ids, whole.ids[start:stop])
    np.testing.assert_array_equal(found.log_probs, whole.log_probs[start:stop])
    np.testing.assert_array_equal(found.offsets, whole.offsets[2:8] - start)


@codecs
@cases
def test_no_rows_and_rows_without_positions_come_back(name: str, kind: str) -> None:
    layout = EntryLayout(POLICIES[kind], 50)
    entries, log_tail = make_entries(POLICIES[kind], 50, 0, seed=4)
    for num_rows in (0, 3):
        rows = np.zeros(num_rows + 1, np.int64)
        columns = CODECS[name].encode(entries, rows, layout)
        found = CODECS[name].decode(columns, rows, layout, log_tail)
        assert (found.num_positions, len(found.ids)) == (0, 0)


def test_the_fast_codec_is_read_without_copying() -> None:
    layout = EntryLayout(POLICIES["top_k"], 49152)
    entries, log_tail = make_entries(POLICIES["top_k"], 49152, 6, seed=1)
    columns = CODECS["fixed"].encode(entries, np.array([0, 6]), layout)
    found = CODECS["fixed"].view(columns, np.array([0, 6]), layout, log_tail)
    assert (found.ids.dtype, found.log_probs.dtype) == (np.uint16, np.float16)
    for name, values in (("ids", found.ids), ("log_probs", found.log_probs)):
        address = columns[name].values.buffers()[1].address
        assert values.__array_interface__["data"][0] == address


@pytest.mark.parametrize(("vocab", "dtype"), [(65536, np.uint16), (65537, np.uint32), (2**31, np.uint32)])
def test_ids_are_as_narrow_as_the_vocabulary_allows(vocab: int, dtype: Any) -> None:
    assert EntryLayout(POLICIES["top_k"], vocab).id_dtype == dtype


def test_packed_ids_take_seventeen_bits_at_a_vocabulary_of_128k() -> None:
    layout = EntryLayout(TopKPolicy(kind="top_k", k=64), 128256)
    entries, _ = make_entries(layout.policy, 128256, 100, seed=1)
    size = len(CODECS["packed"].encode(entries, np.array([0, 100]), layout)["ids"].values)
    assert size == 100 * 64 * 17 // 8


@codecs
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": [3, 1, 0, 2]}, "do not increase"),
        ({"ids": [1, 1, 0, 2]}, "do not increase"),
        ({"ids": [0, 50, 0, 2]}, "out of range"),
        ({"ids": [-1, 1, 0, 2]}, "out of range"),
        ({"log_probs": [np.nan, -1, -1, -1]}, "not numbers"),
        ({"log_probs": [-1.0]}, "missing"),
        ({"offsets": [0, 3, 4]}, "more than the policy allows"),
        ({"offsets": [0, 2, 3]}, "offsets do not cut"),
        ({"num_head": [1, 1]}, "num_head and policy top_p"),
    ],
)
def test_entries_that_are_not_those_of_the_layout_are_refused(
    name: str, changes: dict[str, list[float]], message: str
) -> None:
    good = {"offsets": [0, 2, 4], "ids": [0, 1, 0, 2], "log_probs": [-1.0, -2.0, -0.5, -1.0]}
    entries = KeptEntries(**{key: np.array(values) for key, values in {**good, **changes}.items()})
    layout = EntryLayout(TopPPolicy(kind="top_p", p=0.9, k_max=2), 50)
    with pytest.raises(CodecError, match=message):
        CODECS[name].encode(entries, np.array([0, 2]), layout)


def damaged(column: pa.Array, rng: np.random.Generator) -> pa.Array:
    """Returns the column with some bytes of its values changed, cut or added."""
    values = column.values if pa.types.is_list(column.type) else column
    width = values.type.bit_width // 8
    data = bytearray(values.buffers()[1].to_pybytes()[: len(values) * width]) if len(values) else bytearray()
    for _ in range(int(rng.integers(0, 4))):
        if data:
            data[rng.integers(0, len(data))] = rng.integers(0, 256)
    if pa.types.is_list(column.type):
        bounds = np.array(column.offsets, np.int32)
        if len(bounds) > 1 and rng.random() < 0.4:
            bounds[1:] = np.clip(bounds[1:] + rng.integers(-2, 3), 0, None)
        data += bytes(rng.integers(0, 256, width * max(0, int(bounds[-1]) - len(data) // width)).tolist())
        flat = pa.Array.from_buffers(values.type, len(data) // width, [None, pa.py_buffer(bytes(data))])
        bounds = np.clip(bounds, 0, len(flat)).astype(np.int32)
        return pa.Array.from_buffers(
            column.type, len(column), [None, pa.py_buffer(np.maximum.accumulate(bounds))], children=[flat]
        )
    return pa.Array.from_buffers(column.type, len(column), [None, pa.py_buffer(bytes(data))])


@codecs
@cases
@given(seed=st.integers(0, 2**32), vocab=st.sampled_from((50, 49152, 2**31)))
@settings(max_examples=60, deadline=None)
def test_a_strangers_bytes_give_sound_entries_or_a_codec_error(
    name: str, kind: str, seed: int, vocab: int
) -> None:
    if kind == "dense":
        vocab = 50
    rng = np.random.default_rng(seed)
    layout = EntryLayout(POLICIES[kind], vocab)
    entries, log_tail = make_entries(POLICIES[kind], vocab, 8, seed, empty=0.2)
    rows = cut_rows(8, 3, seed)
    columns = CODECS[name].encode(entries, rows, layout)
    for key in rng.permutation(list(columns))[: rng.integers(1, 3)]:
        columns[key] = damaged(columns[key], rng)
    before = pa.total_allocated_bytes()
    try:
        found = CODECS[name].decode(columns, rows, layout, log_tail)
    except CodecError:
        return
    finally:
        assert pa.total_allocated_bytes() - before < 1_000_000
    assert found.offsets[0] == 0
    assert found.offsets[-1] == len(found.ids) == len(found.log_probs)
    assert (np.diff(found.offsets) >= 0).all()
    if len(found.ids):
        assert 0 <= found.ids.min() <= found.ids.max() < vocab
        assert found.log_probs.max() <= 0


@codecs
@cases
def test_a_missing_column_or_one_of_another_type_is_an_error(name: str, kind: str) -> None:
    layout = EntryLayout(POLICIES[kind], 50)
    entries, log_tail = make_entries(POLICIES[kind], 50, 8, seed=3)
    rows = np.array([0, 8])
    columns = CODECS[name].encode(entries, rows, layout)
    for key in columns:
        rest = {other: column for other, column in columns.items() if other != key}
        with pytest.raises(CodecError, match=f"column {key} is missing"):
            CODECS[name].decode(rest, rows, layout, log_tail)
        for other in (pa.array(["text"]), pa.array([[1.0]], pa.list_(pa.float64())), pa.array([1.0])):
            with pytest.raises(CodecError):
                CODECS[name].decode({**rest, key: other}, rows, layout, log_tail)


def peaked_entries(k: int, policy: AnyPolicy) -> tuple[KeptEntries, np.ndarray]:
    """Returns the k largest entries of 64 Zipf-like distributions over 49152 tokens, and their log p."""
    rng = np.random.default_rng(k)
    logits = rng.normal(0, 1, (64, 49152)) - 1.1 * np.log(np.arange(1, 49153)) + rng.gumbel(0, 2, (64, 49152))
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.sort(np.argpartition(-log_probs, k, axis=1)[:, :k], axis=1)
    kept = np.take_along_axis(log_probs, ids, axis=1)
    entries = KeptEntries(np.arange(65) * k, ids.reshape(-1), kept.reshape(-1).astype(np.float32))
    return entries, kept.reshape(-1)


@codecs
@pytest.mark.parametrize("k", [12, 50, 64, 128])
def test_quantisation_moves_little_mass(name: str, k: int) -> None:
    policy = TopKPolicy(kind="top_k", k=k)
    entries, log_probs = peaked_entries(k, policy)
    layout = EntryLayout(policy, 49152)
    columns = CODECS[name].encode(entries, np.array([0, 64]), layout)
    found = CODECS[name].decode(columns, np.array([0, 64]), layout, np.zeros(64, np.float32))
    distance = np.abs(np.exp(found.log_probs.astype(np.float64)) - np.exp(log_probs)).sum() / 2 / 64
    assert distance <= (0.005 if name == "compact" else 0.0005)


def entropy_bytes(codes: np.ndarray) -> float:
    """Returns the bytes that an ideal coder, which knows their frequencies, spends on codes."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


@pytest.mark.parametrize("k", [12, 50, 64, 128])
def test_the_compact_codec_is_within_15_percent_of_the_ids_bound_and_its_value_bits(k: int) -> None:
    policy = TopKPolicy(kind="top_k", k=k)
    entries, _ = peaked_entries(k, policy)
    columns = CODECS["compact"].encode(entries, np.array([0, 64]), EntryLayout(policy, 49152))
    size = sum(column.nbytes for column in columns.values()) / 64
    ids = (math.lgamma(49153) - math.lgamma(k + 1) - math.lgamma(49153 - k)) / math.log(2) / 8
    assert size <= 1.15 * (ids + entropy_bytes(quantise(entries.log_probs)) / 64)


def test_a_row_that_claims_more_entries_than_it_has_bits_is_refused_before_memory_is_taken() -> None:
    layout = EntryLayout(POLICIES["top_p"], 2**31)
    entries, log_tail = make_entries(POLICIES["top_p"], 2**31, 8, seed=1)
    columns = CODECS["compact"].encode(entries, np.array([0, 8]), layout)
    columns["num_entries"] = pa.array([2**31 - 1], pa.int32())
    with pytest.raises(CodecError, match="2147483647 kept ids do not have"):
        CODECS["compact"].decode(columns, np.array([0, 8]), layout, log_tail)


@given(policy=st.sampled_from(["top_p", "sampled"]), seed=st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_many_short_rows_are_decoded_as_one_would_be(policy: str, seed: int) -> None:
    layout = EntryLayout(POLICIES[policy], 3000)
    entries, log_tail = make_entries(POLICIES[policy], 3000, 60, seed, empty=0.5)
    rows = cut_rows(60, 25, seed)
    columns = CODECS["compact"].encode(entries, rows, layout)
    found = CODECS["compact"].decode(columns, rows, layout, log_tail)
    np.testing.assert_array_equal(found.ids, entries.ids)
    np.testing.assert_array_equal(found.offsets, entries.offsets)
