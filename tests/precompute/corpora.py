"""Small corpora in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from precompute.corpus import MaterialisedPart, materialise_corpus
from schemas.recipe import Corpus

ROWS = [
    {"question": "Is it red?", "sentence": 'It is "red", or so.', "label": 0},
    {"question": "None", "sentence": "007", "label": 1},
    {"question": "Où?", "sentence": "ici", "label": -1},
]


def make_corpus(*parts: dict[str, Any], **changes: Any) -> Corpus:
    fields = {
        "labels": ["entailment", "not_entailment"],
        "text": ["question", "sentence"],
        "parts": [{"kind": "file", "name": "train", **part} for part in parts],
    }
    return Corpus.model_validate(fields | changes)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> MaterialisedPart:
    path = write_lines(tmp_path / "rows.jsonl", rows)
    [part] = materialise_corpus(
        "qnli", make_corpus({"path": str(path)}, **changes), data_root=None, out=tmp_path
    )
    return part
