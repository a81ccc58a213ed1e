"""What a look at a store found: everything that is wrong with it, and what that means."""

from __future__ import annotations

from typing import Literal

from schemas.errors import DamagedStoreError, DataError, IncompleteStoreError
from schemas.fields import Frozen

Place = Literal["identity", "plan", "manifest", "record", "data", "corpus"]
Fault = Literal[
    "missing", "damaged", "foreign", "size", "hash", "rows", "excluded rows", "not finite", "labels"
]

SHOWN_PROBLEMS = 5


class Problem(Frozen):
    """One thing that is wrong.

    Attributes:
        place: The file to blame: ``STORE.json`` (identity), ``plan.arrow``, ``manifest.json``, a shard's
            commit record or data file, or the materialised corpus beside the stores.
        shard: Whose record or data it is.
        batch: Record batch of the data file, from 0.
        offset: Byte of the data file where the damage begins or its region starts.
    """

    place: Place
    fault: Fault
    message: str
    shard: int | None = None
    batch: int | None = None
    offset: int | None = None


class Diagnosis(Frozen):
    """The state of a store.

    Attributes:
        deep: Whether every byte and every row was read.
        is_complete: Whether there is a manifest: the store was finished once.
        num_shards: Of the plan; None where it cannot be read.
        num_committed: Shards with a commit record that can be read.
        num_rows: Rows of those.
        num_bytes: Of their data files.
        missing_shards: Shards that an unfinished store lacks; that is no damage.
        corpus: Whether and against what the texts' hashes were checked.
        problems: Everything that is wrong.
    """

    store: str
    deep: bool
    is_complete: bool
    num_shards: int | None = None
    num_committed: int = 0
    num_rows: int = 0
    num_bytes: int = 0
    missing_shards: tuple[int, ...] = ()
    corpus: str = "not looked for"
    problems: tuple[Problem, ...] = ()

    @property
    def is_sound(self) -> bool:
        """Whether the store is finished and nothing is wrong."""
        return self.is_complete and not self.problems

    @property
    def damaged_shards(self) -> tuple[int, ...]:
        """Shards whose record or data is damaged or lost, ascending."""
        return tuple(sorted({problem.shard for problem in self.problems if problem.shard is not None}))

    def is_blamed(self, place: Place) -> bool:
        """Tells whether a problem lies at ``place``."""
        return any(problem.place == place for problem in self.problems)

    def describe_damage(self) -> str:
        """Returns one line that names damaged files and shards, the first few in full; empty if none is."""
        by_shard: dict[int, str] = {}
        files = []
        for problem in self.problems:
            if problem.place == "corpus":
                continue
            if problem.shard is None:
                files.append(problem.message)
            else:
                by_shard.setdefault(problem.shard, problem.message)
        if by_shard:
            shown = [f"shard {shard}: {by_shard[shard]}" for shard in sorted(by_shard)]
            more = f"; and {len(shown) - SHOWN_PROBLEMS} more" if len(shown) > SHOWN_PROBLEMS else ""
            count = f"{len(shown)} of {self.num_shards if self.num_shards is not None else '?'}"
            verb = "is" if len(shown) == 1 else "are"
            damaged = f"{count} shards {verb} damaged: {'; '.join(shown[:SHOWN_PROBLEMS])}{more}"
            files.append(damaged)
        return "; ".join(files)

    def raise_if_unsound(self) -> None:
        """Raises what the diagnosis amounts to, the gravest first.

        Raises:
            DamagedStoreError: Something of the store is damaged.
            DataError: The corpus beside it is.
            IncompleteStoreError: It is whole as far as it goes, but not finished.
        """
        damage = self.describe_damage()
        if damage:
            first = next(problem for problem in self.problems if problem.place != "corpus")
            raise DamagedStoreError(
                damage,
                store=self.store,
                shard=first.shard,
                batch=first.batch,
                offset=first.offset,
            )
        for problem in self.problems:
            raise DataError(f"store {self.store} is whole, but its corpus is not: {problem.message}")
        if not self.is_complete:
            raise IncompleteStoreError(self.store)
