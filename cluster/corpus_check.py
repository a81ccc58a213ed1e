"""The texts of a materialised corpus part, hashed again and compared with a store's plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from cluster.diagnosis import Problem
from cluster.run_directory import RunDirectory
from precompute.materialised import CORPORA_DIRECTORY, ROWS_FILE
from schemas.any_recipe import AnyRecipe
from schemas.errors import DataError
from schemas.plan import Plan
from schemas.rows import hash_texts, open_rows, text_columns
from schemas.storage.location import is_local, normal_location

# Texts that are Python objects at once.
_CHUNK_ROWS = 4096


def corpora_of(root: str, recipe: AnyRecipe | None) -> tuple[Path, ...]:
    """Returns where a store's materialised corpus may be: in the recipe's output root, in the stores' own."""
    found = (RunDirectory.of(recipe).out / CORPORA_DIRECTORY,) if recipe is not None else ()
    location = normal_location(root)
    return (*found, Path(location).parent.parent / CORPORA_DIRECTORY) if is_local(location) else found


def find_part(plan: Plan, directories: Sequence[Path]) -> Path | None:
    """Finds the ``rows.arrow`` of a plan's part below directories of materialised corpora."""
    for directory in directories:
        for path in sorted(directory.glob(f"{plan.fingerprint[:16]}-*/{ROWS_FILE}")):
            return path
    return None


def examine_texts(plan: Plan, path: Path) -> list[Problem]:
    """Compares ids and freshly hashed texts of a materialised part with the plan, chunk by chunk."""
    try:
        rows = open_rows(path)
    except DataError as error:
        return [_problem(error.message)]
    if rows.num_rows != plan.num_rows:
        return [_problem(f"{path} has {rows.num_rows} rows, the plan {plan.num_rows}")]
    for start in range(0, plan.num_rows, _CHUNK_ROWS):
        chunk, planned = rows.slice(start, _CHUNK_ROWS), plan.rows.slice(start, _CHUNK_ROWS)
        changed = _find_change(chunk, planned)
        if changed is not None:
            return [_problem(f"{path}: {changed} has changed since the plan")]
    return []


def _find_change(rows: pa.Table, planned: pa.Table) -> str | None:
    """Names the first row that differs from the plan, if one does."""
    texts = [rows.column(name).to_pylist() for name in text_columns(rows)]
    hashes = [hash_texts(row) for row in zip(*texts, strict=True)]
    for meaning, name, found in (
        ("id", "example_id", rows.column("example_id").to_pylist()),
        ("text", "text_hash", hashes),
    ):
        expected = planned.column(name).to_pylist()
        if found != expected:
            row = next(row for row, value in enumerate(found) if value != expected[row])
            return f"the {meaning} of {planned.column('example_id')[row].as_py()}"
    return None


def _problem(message: str) -> Problem:
    advice = "delete its directory and run `tmkd precompute` with its recipe to write it again"
    return Problem(place="corpus", fault="rows", message=f"{message}; {advice}")
