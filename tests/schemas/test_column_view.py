"""Views of Arrow columns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from schemas.column_view import view_bytes, view_numbers, wrap_integers
from tests.store_factory import make_part, make_store


def test_a_view_respects_offsets_and_shares_memory() -> None:
    numbers = pa.array([1, 2, 3, 4], pa.int64()).slice(1, 2)
    assert view_numbers(numbers, np.int64).tolist() == [2, 3]
    values = pa.array([b"ab", b"cd", b"ef"], pa.binary(2)).slice(1)
    view = view_bytes(values)
    assert [row.tobytes() for row in view] == [b"cd", b"ef"]
    assert view.ctypes.data == values.buffers()[1].address + 2


def test_wrapped_integers_share_memory() -> None:
    numbers = np.array([3, 1])
    wrapped = wrap_integers(numbers)
    assert wrapped.to_pylist() == [3, 1]
    assert wrapped.buffers()[1].address == numbers.ctypes.data


def test_an_empty_column_is_an_empty_view() -> None:
    assert view_numbers(pa.array([], pa.int32()), np.int32).shape == (0,)
    assert view_bytes(pa.array([], pa.binary(16))).shape == (0, 16)


def test_a_view_of_a_map_is_read_only(tmp_path: Path) -> None:
    batch = pa.record_batch({"x": pa.array([1, 2, 3])})
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pa.memory_map(str(tmp_path / "x.arrow")) as source:
        mapped = pa.ipc.open_file(source).get_batch(0)
    assert not view_numbers(mapped.column("x"), np.int64).flags.writeable


def test_reading_a_store_imports_neither_pandas_nor_torch(tmp_path: Path) -> None:
    part = make_part(tmp_path / "rows.arrow", [("x",), ("y",)], [0, 1], shard_rows=1)
    root = make_store(tmp_path / "store", part.plan, np.ones((2, 3), np.float32))
    code = (
        "import sys, numpy as np\n"
        "from distill.store_reader import LogitStore\n"
        f"assert LogitStore.open({str(root)!r}).gather(np.array([1])).tolist() == [[1, 1, 1]]\n"
        "assert not {'pandas', 'torch'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
