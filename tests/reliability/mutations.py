"""Seeded damage to bytes, to JSON values and to the integers of a binary format, for fuzzing."""

from __future__ import annotations

import copy
import random
import struct
from typing import Any

TOKENS = (
    b'"',
    b"\\",
    b"\\ud800",
    b"\\u0000",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"-",
    b"0.0",
    b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 1500,
    b"[[],[[]]]",
    b"null",
    b"true",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\xf0\x9f\x98\x80",
    b"\0" * 8,
    b"\xff" * 8,
    b",",
    b":",
    b"}",
    b"]",
)
INTEGERS = (0, 1, 2, 3, 4, 7, 8, 16, 64, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1)
STRINGS = (
    "",
    "1.0",
    "2.0",
    "a" * 64,
    "0" * 16,
    "../s000000-a.arrow",
    "/etc/passwd",
    "s000000-a.arrow\n",
    "s000000-a.arrow\0",
    "s\u0660\u0660\u0660\u0660\u0660\u0660-a.arrow",
    "x" * 20_000,
    "\ud800",
    "\x1b[31m",
    "9" * 4400,
    "NaN",
    "null",
)
MAX_PLACES = 5000
SCALARS = (None, True, False, 1.5, -0.0, 1e308, float(2**62), 10**50, -1, [], {}, [[]], [None], {"": 0})


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """Changes ``data`` in one to four ways."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = rng.choice(_DAMAGES)(rng, data)
    return data


def damage_value(rng: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of a JSON object, changed in one to three places."""
    body = copy.deepcopy(body)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = _places(body)
        if not 0 < len(places) < MAX_PLACES:
            break
        holder, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind == 0 and isinstance(holder, dict):
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("surplus", "digest", "format", "", "rows"))] = _make_value(rng, body)
        elif kind == 2 and isinstance(holder, list):
            holder[key : key + 1] = [holder[key]] * rng.choice((0, 2, 50))
        elif kind == 3 and isinstance(holder[key], int):
            holder[key] += rng.choice((-1, 1, 8, 2**32, -(2**62), 2**62))
        elif kind == 4 and isinstance(holder[key], str) and holder[key]:
            place = rng.randrange(len(holder[key]))
            holder[key] = (
                holder[key][:place] + rng.choice(("é", "/", "0", "f", "\n")) + holder[key][place + 1 :]
            )
        else:
            holder[key] = _make_value(rng, body)
    return body


def damage_integer(rng: random.Random, data: bytes, start: int, stop: int) -> bytes:
    """Overwrites an integer of 2, 4 or 8 bytes in ``data[start:stop]``, where formats have theirs."""
    layout = rng.choice(("<h", "<i", "<i", "<q", "<q"))
    size = struct.calcsize(layout)
    place = start + rng.randrange(max(1, (stop - start) // size)) * size
    if place + size > len(data):
        return data[:-1]
    changed = bytearray(data)
    old = struct.unpack_from(layout, data, place)[0]
    new = rng.choice((rng.choice(INTEGERS), -rng.choice(INTEGERS), old + rng.choice((-8, -4, -1, 1, 4, 8))))
    bits = 8 * size
    struct.pack_into(layout, changed, place, (new + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1))
    return bytes(changed)


def _places(body: Any) -> list[tuple[Any, Any]]:
    """Returns (holder, key) of every value below ``body``."""
    places = []
    waiting = [body]
    while waiting:
        holder = waiting.pop()
        keys = holder if isinstance(holder, dict) else range(len(holder))
        places += [(holder, key) for key in keys]
        waiting += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    return places


def _make_value(rng: random.Random, body: Any) -> Any:
    kind = rng.randrange(6)
    if kind == 0:
        return copy.deepcopy(rng.choice(SCALARS))
    if kind == 1:
        return rng.choice(INTEGERS) * rng.choice((1, -1))
    if kind == 2:
        return rng.choice(STRINGS)
    if kind == 3:
        value: Any = rng.choice((0, "x"))
        for _ in range(rng.choice((5, 60, 70, 300))):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    if kind == 4:
        return [copy.deepcopy(rng.choice(SCALARS))] * 50
    holder, key = rng.choice(_places(body))
    return copy.deepcopy(holder[key])


def _flip(rng: random.Random, data: bytes) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, data: bytes) -> bytes:
    start, stop = _range(rng, data)
    return data[:start] + data[stop:]


def _truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    start, stop = _range(rng, data)
    return data[:stop] + data[start:stop] * rng.choice((1, 1, 50)) + data[stop:]


def _splice(rng: random.Random, data: bytes) -> bytes:
    start, stop = _range(rng, data)
    place = rng.randrange(len(data) + 1)
    return data[:place] + data[start:stop] + data[place + stop - start :]


def _insert(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice((rng.choice(TOKENS), rng.randbytes(rng.randrange(1, 40)))) + data[place:]


def _overwrite(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    piece = rng.choice((rng.choice(TOKENS), rng.randbytes(rng.randrange(1, 9)), bytes(512)))
    return data[:place] + piece + data[place + len(piece) :]


def _range(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 4, 8, 30, 200)))


_DAMAGES = (_flip, _flip, _cut, _truncate, _repeat, _splice, _insert, _overwrite)
