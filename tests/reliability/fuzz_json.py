"""Fuzz cases of a store's JSON records."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

from schemas.digest import canonical_json, encode_document, hash_value
from schemas.fields import Frozen
from schemas.records import CommitRecord, Manifest, StoreIdentity, StoresLock, parse_record
from tests.reliability.mutations import damage_bytes, damage_value

MAX_BYTES = 4 * 2**20
HASH = "0123456789abcdef" * 4
BOUND = {"plan_hash": HASH, "generation_hash": HASH[::-1]}
REGION = {"offset": 0, "length": 320, "rows": 0, "xxh3": "0" * 16}
EXCLUDED = [{"ordinal": 3, "example_id": "train/3", "reason": "not finite"}]

BODIES: dict[str, tuple[type[Frozen], dict[str, Any]]] = {
    "STORE.json": (
        StoreIdentity,
        {
            **BOUND,
            "format": "1.0",
            "level": "classification",
            "generation": {"weights": HASH, "nested": {"columns": ["a", "b"], "max_length": 128}},
            "native_labels": ["entailment", "neutral", "contradiction"],
            "teacher": "großer-lehrer",
            "corpus": "qnli",
            "part": "train",
            "produced_by": {"torch": "2.13.0"},
        },
    ),
    "commit record": (
        CommitRecord,
        {
            **BOUND,
            "format": "1.0",
            "shard": 0,
            "revision": 0,
            "file": "s000000-abc123.arrow",
            "start": 0,
            "stop": 9,
            "num_rows": 8,
            "num_bytes": 1000,
            "sha256": HASH,
            "ids_hash": HASH,
            "head": REGION,
            "batches": [{**REGION, "offset": 320 + 100 * i, "length": 100, "rows": 4} for i in range(2)],
            "tail": {**REGION, "offset": 520, "length": 480},
            "excluded": EXCLUDED,
        },
    ),
    "manifest.json": (
        Manifest,
        {
            **BOUND,
            "format": "1.0",
            "store_sha256": HASH,
            "plan_sha256": HASH,
            "num_rows": 16,
            "shards": [
                {
                    "shard": shard,
                    "record": f"s{shard:06d}.r0.json",
                    "record_sha256": HASH,
                    "num_rows": 8,
                    "num_bytes": 1000,
                }
                for shard in range(2)
            ],
            "excluded": EXCLUDED,
        },
    ),
    "stores.lock.json": (
        StoresLock,
        {
            "format": "1.0",
            "corpora": {
                "qnli": [
                    {
                        "part": "train",
                        "fingerprint": HASH,
                        "plan_hash": HASH,
                        "num_rows": 16,
                        "shard_rows": 8,
                        "rows": "../corpora/rows.arrow",
                        "labels_hash": HASH,
                        "stores": {"teacher": "../stores/a-b"},
                    }
                ]
            },
        },
    ),
}


def damage_record(rng: random.Random, name: str) -> bytes:
    """Returns a damaged record. Half of them have the right digest, so that what is behind is reached."""
    body = BODIES[name][1]
    route = rng.randrange(4)
    if route == 0:
        return damage_bytes(rng, encode_document(body))
    if route == 1:
        text = json.dumps({**damage_value(rng, body), "digest": HASH})
        return text.encode(rng.choice(("utf-8", "utf-8", "utf-8", "utf-16", "utf-8-sig")))
    if route == 2:
        return _seal(damage_value(rng, body))
    try:
        # Bytes of the body, whose digest is made right again if they are still JSON.
        changed = json.loads(damage_bytes(rng, json.dumps(body).encode()))
    except (ValueError, RecursionError):
        return _seal(damage_value(rng, body))
    return _seal(changed) if isinstance(changed, dict) else json.dumps(changed).encode()


def _seal(body: dict[str, Any]) -> bytes:
    body = {key: value for key, value in body.items() if key != "digest"}
    try:
        return canonical_json({**body, "digest": hash_value(body)})
    except (ValueError, RecursionError):
        # A lone surrogate or an infinity: no digest covers them.
        return json.dumps({**body, "digest": HASH}).encode()


def damage_and_parse(rng: random.Random) -> Callable[[], None]:
    """Parses a damaged record; it is accepted or refused with the project's own error."""
    name = rng.choice(tuple(BODIES))
    kind = BODIES[name][0]
    # Repeats of repeats grow without end once in 100,000 cases.
    data = damage_record(rng, name)[:MAX_BYTES]

    def read() -> None:
        record = parse_record(data, kind, store="here", name=name)
        assert isinstance(record, kind)
        if isinstance(record, CommitRecord):
            assert re.fullmatch(r"s[0-9]{6,12}-[0-9a-z]{1,64}\.arrow", record.file, re.ASCII)

    return read
