"""Files that are written tensor by tensor, read by the safetensors library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.tensor_file import _DTYPES, TensorSpec, write_tensors


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in tensors.items()}


def test_the_library_reads_back_every_type_and_shape(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{dtype!s} {shape}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for dtype in _DTYPES
        for shape in ((), (1,), (3,), (2, 3), (0,), (0, 4))
    }
    tensors["größe"] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    tensors["transposed"] = torch.arange(6.0).reshape(2, 3).T
    path = tmp_path / "file.safetensors"
    write_tensors(path, specs_of(tensors), tensors.values())
    found = load_file(path)
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        ours, theirs = found[name].contiguous().reshape(-1), value.contiguous().reshape(-1)
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), name
    # Numbers begin where a mapping may read them in place.
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 8 == 0


def test_a_file_without_tensors_can_be_read(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {}, [])
    assert load_file(tmp_path / "file") == {}


def test_one_tensor_is_asked_for_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    sizes = []

    def make() -> Iterator[torch.Tensor]:
        for _ in range(3):
            sizes.append(path.stat().st_size)
            yield torch.zeros(1 << 16)

    write_tensors(path, {name: TensorSpec((1 << 16,)) for name in "abc"}, make())
    # The one before is on its way to the disk before the next one is made.
    assert sizes[2] - sizes[1] == 4 << 16


@pytest.mark.parametrize(
    "tensors",
    [
        [torch.zeros(3)],
        [torch.zeros(2, dtype=torch.float64)],
        [],
        [torch.zeros(2), torch.zeros(2)],
    ],
    ids=["shape", "dtype", "too few", "too many"],
)
def test_what_was_not_announced_is_an_error(tensors: list[torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is torch|argument"):
        write_tensors(tmp_path / "file", {"a": TensorSpec((2,))}, tensors)
