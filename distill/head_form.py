"""How a model makes logits, and how many at a time.

Shapes: M positions of a chunk, V true vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

CPU_CHUNK_ELEMENTS = 2**23
"""Logits of a chunk, at least, where its size is not given: 32 MiB in float32, from which on glibc gives
a buffer back to the system at once."""

ACCELERATOR_CHUNK_ELEMENTS = 2**26
"""The same for other devices, which need more work at a time."""


@dataclass(frozen=True, slots=True)
class HeadForm:
    """How a model makes logits from ``z = h W^T + b``, and how it is cut.

    Attributes:
        scale: Factor of z (Granite: 1 / logits_scaling; Cohere: logit_scale).
        soft_cap: c in ``c tanh(scale z / c)`` (Gemma 2), or None.
        chunk_positions: M; None: as many as make a device busy.
    """

    scale: float = 1.0
    soft_cap: float | None = None
    chunk_positions: int | None = None

    def chunk_of(self, vocab_size: int, device: torch.device) -> int:
        """Returns M."""
        elements = CPU_CHUNK_ELEMENTS if device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
        return self.chunk_positions or math.ceil(elements / vocab_size)


PLAIN_HEAD = HeadForm()
"""Neither scale nor soft cap."""
