"""Where things lie below the output root (DESIGN section 6)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from schemas.any_recipe import AnyRecipe
from schemas.errors import DamagedStoreError, DataError
from schemas.records import LOCK_FILE, StoresLock, read_record
from schemas.storage.location import normal_location


@dataclass(frozen=True)
class RunDirectory:
    """``<out>`` and ``<out>/<name>``.

    Attributes:
        out: Root that all runs share.
        run: Directory of this run.
        stores: Location of the logit stores: a directory or a URL.
    """

    out: Path
    run: Path
    stores: str

    @classmethod
    def of(cls, recipe: AnyRecipe) -> RunDirectory:
        """Returns the layout of a recipe's run; creates nothing."""
        out = Path(recipe.out).expanduser().absolute()
        stores = normal_location(recipe.store.root or out / "stores")
        return cls(out, out / recipe.name, stores)

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.run / "recipe.yaml"

    @property
    def lock(self) -> Path:
        """The stores and corpora that ``distill`` may read."""
        return self.run / LOCK_FILE

    @property
    def corpora_lock(self) -> Path:
        """The corpora as this run was planned."""
        return self.run / "corpora.lock.json"

    @property
    def students(self) -> Path:
        """All students of the comparison."""
        return self.run / "students"

    @property
    def student(self) -> Path:
        """The run's final student."""
        return self.run / "student"

    @property
    def predictions(self) -> Path:
        """Students' probabilities over the evaluation corpora, read once per final student."""
        return self.run / "predictions"

    @property
    def evaluation(self) -> Path:
        """The evaluation."""
        return self.run / "evaluation.json"

    @property
    def timings(self) -> Path:
        """Seconds of each step."""
        return self.run / "timings.json"

    @property
    def teachers(self) -> Path:
        """Teachers that tmkd trained, by fingerprint."""
        return self.out / "teachers"

    @property
    def cache(self) -> Path:
        """What can be made again."""
        return self.out / "cache"

    @property
    def costs(self) -> Path:
        """Seconds that teachers, stores and students took, whoever made them."""
        return self.cache / "costs.json"

    @property
    def hash_cache(self) -> Path:
        """Hashes of weight files, by path, size and time."""
        return self.cache / "weights.json"


def read_lock(directory: RunDirectory) -> StoresLock:
    """Reads the stores that a run may use.

    Raises:
        DataError: Precompute has not run, or the lock is damaged.
    """
    if not directory.lock.exists():
        raise DataError(f"{directory.lock} is not there; run `tmkd precompute` with this recipe first")
    return read_lock_file(directory.lock)


def read_lock_file(path: Path) -> StoresLock:
    """Reads ``stores.lock.json`` of a run.

    Raises:
        DataError: It is missing or damaged.
    """
    try:
        return read_record(path, StoresLock, store=path.parent)
    except DamagedStoreError as error:
        # The lock is the run's: no store has to be repaired.
        message = f"{path.parent}: {error.damage}; run `tmkd precompute` with its recipe to write it again"
        raise DataError(message) from error
