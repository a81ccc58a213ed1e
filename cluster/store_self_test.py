"""``tmkd store self-test``: a sample of a store's rows, computed again by the teacher in this process.

Hashes tell that bytes are those that were written; this tells that what was written is what the teacher
says of each row, and not of its neighbour.

Shapes: K sampled rows, N stored rows, C labels.

Invariants (tests/cluster/test_store_self_test.py):
    1. A store that is shifted by one row is told apart from one whose logits are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.run_context import available_cpus, available_device
from cluster.self_test import TOLERANCES, Rows, SelfTest, sample_positions
from cluster.store_match import match_store
from distill.store_reader import LogitStore
from precompute.forward import compute_logits
from precompute.stores import StoreTarget
from precompute.tasks import WorkerSpec
from precompute.teacher import LoadedTeacher
from schemas.any_recipe import AnyRecipe
from schemas.errors import DataError, RecipeError, RefusedError
from schemas.language import LanguageRecipe
from schemas.plan import Plan
from schemas.rows import hash_texts, open_rows, text_columns
from schemas.storage.location import open_storage

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Comparison:
    """Sampled rows beside what is stored, each float ``[K]``: the largest difference over the labels.

    Attributes:
        own: To the row's own stored logits.
        before, after: To those of the stored rows before and after it; infinite where there is none.
    """

    own: npt.NDArray[np.float64]
    before: npt.NDArray[np.float64]
    after: npt.NDArray[np.float64]


def compare_with_teacher(
    root: str | Path,
    recipe: AnyRecipe,
    *,
    num_rows: int = 64,
    seed: int = 0,
    tolerance: float | None = None,
) -> SelfTest:
    """Computes a sample of a store's rows again.

    Args:
        root: The store's location.
        recipe: That the store was made by.
        num_rows: Size of the sample; all rows if there are no more.
        seed: Of the sample.
        tolerance: Relative to the largest sampled logit (at least 1); by default that of the dtype.

    Raises:
        RefusedError: The recipe does not describe this store.
        DataError: The store is damaged or not finished.
        TeacherError: The teacher cannot be loaded.
    """
    if num_rows < 1:
        raise RecipeError("--rows: at least 1 is wanted")
    if isinstance(recipe, LanguageRecipe):
        from cluster.language.store_self_test import compare_with_model

        return compare_with_model(root, recipe, num_rows=num_rows, seed=seed, tolerance=tolerance)
    store = LogitStore.open(root)
    target = match_store(open_storage(root), recipe)
    stored = store.stored_rows()
    if not len(stored):
        raise DataError(f"store {store.root}: has no row with logits")
    sample = sample_positions(len(stored), num_rows, seed)
    device = available_device() if target.spec.device == "cuda" else "cpu"
    computed_KC = _compute(target, store.plan, stored[sample], device)
    comparison = compare_rows(store, stored, sample, computed_KC)
    scale = max(1.0, float(np.abs(store.gather(stored[sample])).max()))
    allowed = scale * (TOLERANCES[target.spec.teacher.dtype] if tolerance is None else tolerance)
    differs = comparison.own > allowed
    worst = int(np.argmax(comparison.own))
    return SelfTest(
        store=store.root,
        teacher=target.request.teacher.name,
        device=device,
        dtype=target.spec.teacher.dtype,
        num_rows=len(sample),
        largest_difference=float(comparison.own[worst]),
        worst_row=store.plan.rows.column("example_id")[int(stored[sample[worst]])].as_py(),
        tolerance=allowed,
        num_differing=int(differs.sum()),
        num_shifted_forward=int((differs & (comparison.after <= allowed)).sum()),
        num_shifted_back=int((differs & (comparison.before <= allowed)).sum()),
    )


def compare_rows(store: LogitStore, stored: Rows, sample: Rows, computed_KC: Logits) -> Comparison:
    """Compares computed logits with the stored ones of the same rows and of their neighbours.

    Args:
        store: The store.
        stored: Its rows with logits, int64 ``[N]``.
        sample: Positions among them, int64 ``[K]``.
        computed_KC: Logits of the sample.
    """

    def distance(shift: int) -> npt.NDArray[np.float64]:
        positions = sample + shift
        inside = (positions >= 0) & (positions < len(stored))
        found = np.full(len(sample), np.inf)
        stored_KC = store.gather(stored[positions[inside]]).astype(np.float64)
        found[inside] = np.abs(stored_KC - computed_KC[inside]).max(axis=1)
        # A teacher that gives no number agrees with nothing.
        return np.where(np.isnan(found), np.inf, found)

    return Comparison(own=distance(0), before=distance(-1), after=distance(1))


def _compute(target: StoreTarget, plan: Plan, rows: Rows, device: Literal["cpu", "cuda"]) -> Logits:
    """Runs the teacher over rows of the part, ascending."""
    if not isinstance(target.spec, WorkerSpec):
        raise RefusedError(f"store {target.root}: is not one of a classifier")
    path = target.request.part.rows_path
    chosen = open_rows(path).take(pa.array(rows))
    texts = [chosen.column(name).to_pylist() for name in text_columns(chosen)]
    _check_texts(path, plan, rows, texts)
    spec = replace(target.spec, device=device, num_threads=available_cpus())
    teacher = LoadedTeacher.load(spec)
    return compute_logits(teacher, teacher.tokenise(texts)).logits_RC


def _check_texts(path: Path, plan: Plan, rows: Rows, texts: Sequence[Sequence[str]]) -> None:
    planned = plan.rows.take(pa.array(rows))
    hashes = [hash_texts(row) for row in zip(*texts, strict=True)]
    for found, expected, name in zip(
        hashes, planned.column("text_hash").to_pylist(), planned.column("example_id").to_pylist(), strict=True
    ):
        if found != expected:
            raise DataError(f"{path}: the text of {name} has changed since the plan; delete its directory")
