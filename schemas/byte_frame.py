"""Bytes compressed with zstd, one frame a row, decompressed into exactly the size that is expected.

Invariants (tests/schemas/test_byte_frame.py):
    1. ``expand`` allocates the size that the caller names, whatever the frame says of itself.
    2. A frame of another size, or no frame, is a ``CodecError``.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa

from schemas.bit_planes import Bytes
from schemas.entry_layout import CodecError
from schemas.errors import first_line

_LEVEL: Final = 3
_ZSTD: Final = pa.Codec("zstd", compression_level=_LEVEL)
# A row that claims more is not decompressed.
MAX_FRAME_BYTES: Final = 2**31 - 1


def compress(data: Bytes) -> Bytes:
    """Returns one zstd frame; nothing for nothing."""
    if not len(data):
        return np.empty(0, np.uint8)
    return np.frombuffer(_ZSTD.compress(pa.py_buffer(np.ascontiguousarray(data))), np.uint8)


def expand(frame: Bytes, size: int) -> Bytes:
    """Decompresses what ``compress`` made of ``size`` bytes.

    Raises:
        CodecError: It is something else, or above ``MAX_FRAME_BYTES``.
    """
    if not size and not len(frame):
        return np.empty(0, np.uint8)
    if not 0 < size <= MAX_FRAME_BYTES or not len(frame):
        raise CodecError(f"a frame of {len(frame)} bytes cannot hold {size} bytes")
    try:
        # Arrow raises OSError too where the frame holds fewer bytes than are asked for.
        return np.frombuffer(_ZSTD.decompress(pa.py_buffer(frame), size), np.uint8)
    except OSError as error:
        raise CodecError(f"a compressed column is damaged ({first_line(error)})") from error
