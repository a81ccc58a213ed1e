"""A safetensors file written tensor by tensor, so that one of them is in memory and never all.

The safetensors library writes a whole dictionary at once. The format is small: the header's length as
8 little-endian bytes, the header as JSON (dtype, shape and byte range of each tensor), and the tensors'
bytes without a gap. Files are read by the library itself.

Invariants:
    1. The library reads back what was given, for every dtype of the table
       (tests/distill/test_tensor_file.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

_ALIGNMENT_BYTES = 8
# Source: https://github.com/huggingface/safetensors, "Format".
_DTYPES: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor that is to come."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[torch.Tensor]) -> None:
    """Writes a safetensors file.

    Args:
        path: Is overwritten; not synced.
        specs: Of each tensor by name, in the order of ``tensors``.
        tensors: One for each spec, of its shape and dtype, on any device; taken one by one.

    Raises:
        ValueError: A tensor is not what its spec says, or there are too few or too many.
        KeyError: A dtype has no name in the format.
        OSError: The file cannot be written.
    """
    with path.open("wb") as file:
        file.write(_encode_header(specs))
        for (name, spec), tensor in zip(specs.items(), tensors, strict=True):
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise ValueError(f"{name} is {tensor.dtype}{tuple(tensor.shape)}, not {spec}")
            flat = tensor.detach().to("cpu").contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def _encode_header(specs: Mapping[str, TensorSpec]) -> bytes:
    entries, start = {}, 0
    for name, spec in specs.items():
        stop = start + spec.num_bytes
        entries[name] = {
            "dtype": _DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % _ALIGNMENT_BYTES)
    return len(header).to_bytes(8, "little") + header
