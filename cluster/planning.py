"""Planning: each corpus that a recipe uses, materialised once and locked to the run.

Invariant: a corpus that changed or shrank since the run was planned is refused; one of which a file
grew at its end gains a part (tests/cluster/test_planning.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.leakage import find_shared_rows, write_rows
from cluster.run_directory import RunDirectory
from precompute.corpus import MaterialisedPart, materialise_corpus
from schemas.digest import DocumentError, read_document, write_document
from schemas.errors import DataError, RefusedError
from schemas.recipe import Recipe
from schemas.rows import open_rows


@dataclass(frozen=True)
class PlannedCorpus:
    """A corpus on disk.

    Attributes:
        parts: In order.
        dropped_rows: File of the rows that share a text with an evaluation corpus, if any do.
        num_dropped: How many they are.
    """

    parts: tuple[MaterialisedPart, ...]
    dropped_rows: str | None = None
    num_dropped: int = 0


def plan_corpora(recipe: Recipe, directory: RunDirectory) -> dict[str, PlannedCorpus]:
    """Materialises the corpora that a recipe's stages, teachers and evaluation use.

    Raises:
        CorpusError: A corpus cannot be used.
        RefusedError: A corpus is not what this run was planned with.
    """
    names = dict.fromkeys(stage.corpus for stage in recipe.stages)
    names |= dict.fromkeys(t.train.corpus for t in recipe.teachers if t.train is not None)
    names |= dict.fromkeys(recipe.evaluation.corpora)
    parts = {
        name: materialise_corpus(name, recipe.corpora[name], data_root=recipe.data_root, out=directory.out)
        for name in names
    }
    check_corpora_lock(parts, directory.corpora_lock)
    evaluation = [open_rows(part.rows_path) for name in recipe.evaluation.corpora for part in parts[name]]
    planned = {name: PlannedCorpus(found) for name, found in parts.items()}
    for name in dict.fromkeys(stage.corpus for stage in recipe.stages):
        shared = find_shared_rows([open_rows(part.rows_path) for part in parts[name]], evaluation)
        if len(shared):
            path = write_rows(shared, directory.cache / "dropped")
            planned[name] = PlannedCorpus(parts[name], str(path), len(shared))
    return planned


def check_corpora_lock(parts: Mapping[str, Sequence[MaterialisedPart]], path: Path) -> None:
    """Compares corpora with those that the run was planned with, then writes them down.

    Args:
        parts: Of each corpus.
        path: ``corpora.lock.json``.

    Raises:
        RefusedError: A part has changed or is gone.
        DataError: The file cannot be read.
    """
    found = {name: [_describe(part) for part in items] for name, items in parts.items()}
    known: dict[str, Any] = {}
    if path.exists():
        try:
            known = read_document(path)["corpora"]
        except (DocumentError, KeyError) as error:
            raise DataError(f"{path} {error}; delete it to plan the run anew") from error
    for name in known.keys() & found.keys():
        parts_now = {part["part"]: part for part in found[name]}
        for before in known[name]:
            now = parts_now.get(before["part"], {})
            differing = [
                f"{key}: {value} -> {now.get(key, 'gone')}"
                for key, value in before.items()
                if now.get(key) != value
            ]
            if differing:
                raise RefusedError(
                    f"corpus {name}/{before['part']} has changed since this run was planned; restore it, "
                    "or give the run another name (--set name=...)",
                    differing=differing,
                )
    write_document(path, {"corpora": {**known, **found}})


def _describe(part: MaterialisedPart) -> dict[str, Any]:
    return {
        "part": part.part,
        "rows": part.num_rows,
        "fingerprint": part.fingerprint[:16],
        "labels": part.labels_hash[:16],
    }
