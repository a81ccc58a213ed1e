"""A small project whose stores have been made by its recipe, without Ray."""

from __future__ import annotations

import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from cluster.commands import precompute_recipe
from cluster.recipe_file import load_recipe
from cluster.run_context import RunOptions
from precompute.store_writer import StoreWriter
from schemas.recipe import Recipe
from tests.end_to_end.project import Project
from tests.reliability.here_pool import HerePool


@dataclass(frozen=True)
class ProjectStores:
    """Stores of two teachers over three corpora.

    Attributes:
        project: The project; ``recipe_path`` describes it.
        roots: By teacher and corpus.
    """

    project: Project
    recipe_path: str
    roots: dict[tuple[str, str], str]

    @property
    def recipe(self) -> Recipe:
        """The recipe that made the stores."""
        return load_recipe(self.recipe_path)

    def copy(self, directory: Path, teacher: str = "second", corpus: str = "train") -> Path:
        """Copies a store, under its own name, so that it may be damaged."""
        root = Path(self.roots[teacher, corpus])
        return Path(shutil.copytree(root, directory / "copies" / root.name))


def use_here_pool(monkeypatch: pytest.MonkeyPatch) -> HerePool:
    """Lets this process compute shards, in place of Ray."""
    pool = HerePool()
    monkeypatch.setitem(sys.modules, "precompute.pool", SimpleNamespace(run_pool=pool.run_pool))
    for module in ("cluster.store_step", "cluster.store_repair"):
        monkeypatch.setattr(f"{module}.ray_session", lambda *_, **__: nullcontext())
    return pool


def make_project_stores(directory: Path) -> ProjectStores:
    """Makes the stores of a new project."""
    project = Project(directory)
    path = project.recipe()
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_here_pool(monkeypatch)
        lock = precompute_recipe(load_recipe(path), RunOptions())
    roots = {
        (teacher, corpus): root
        for corpus, parts in lock.corpora.items()
        for part in parts
        for teacher, root in part.stores.items()
    }
    return ProjectStores(project, path, roots)


def read_rows(root: str | Path) -> pa.Table:
    """Reads all rows of a store, past ``distill``'s reader."""
    store = StoreWriter.attach(root)
    buffers = [store.storage.map_file(f"data/{c.record.file}") for c in store.commit_records().values()]
    return pa.concat_tables([pa.ipc.open_file(buffer).read_all() for buffer in buffers])


def snapshot(root: Path) -> dict[str, tuple[bytes, int]]:
    """Returns content and time of each file below a directory."""
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
