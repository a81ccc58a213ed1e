"""The error tree. Every error carries its data as attributes and the exit code of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def first_line(error: BaseException) -> str:
    """Returns the first line of an error of other code, or its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class TmkdError(Exception):
    """Base of all errors that tmkd raises on purpose.

    Attributes:
        message: One line that says what is wrong and what to do.
        exit_code: Exit code of the command line (DESIGN: 1 is "anything else").
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is rebuilt from its message alone, which fails where a subclass
        # wants keywords; errors cross process boundaries.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[TmkdError], args: tuple[Any, ...], attributes: dict[str, Any]) -> TmkdError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(attributes)
    return error


class RecipeError(TmkdError):
    """A recipe or a command line that cannot be read (exit code 2).

    Attributes:
        source: The recipe's file, if there is one.
        field: Dotted path of the field, such as ``stages.0.alpha``.
    """

    exit_code = 2

    def __init__(self, message: str, *, source: str | None = None, field: str | None = None) -> None:
        where = ": ".join(part for part in (source, field) if part)
        super().__init__(f"{where}: {message}" if where else message)
        self.source = source
        self.field = field


class DataError(TmkdError):
    """Data that is missing, malformed or damaged (exit code 3)."""

    exit_code = 3


class CorpusError(DataError):
    """A corpus that cannot be used: a missing column, a null text, duplicate ids, no rows.

    Attributes:
        corpus: Name of the corpus in the recipe.
        part: Name of the part, if one is to blame.
    """

    def __init__(self, message: str, *, corpus: str, part: str | None = None) -> None:
        name = f"{corpus}/{part}" if part else corpus
        super().__init__(f"corpus {name}: {message}")
        self.corpus = corpus
        self.part = part


def repair_advice(store: Path | str) -> str:
    """Says how damage of a store is mended."""
    return f"run `tmkd store repair {store} --recipe RECIPE`"


class DamagedStoreError(DataError):
    """Bytes of a store that do not match their recorded hash, or a file that cannot be read.

    The message says how damage is mended.

    Attributes:
        damage: What is damaged, without store, shard and advice.
        store: Root of the store.
        shard: Shard id, if one is to blame.
        batch: Record batch within the shard, if one is to blame.
        offset: Byte offset in the shard file, if known.
    """

    def __init__(
        self,
        message: str,
        *,
        store: Path | str,
        shard: int | None = None,
        batch: int | None = None,
        offset: int | None = None,
    ) -> None:
        where = [f"store {store}"]
        where += [f"shard {shard}"] if shard is not None else []
        where += [f"batch {batch}"] if batch is not None else []
        where += [f"byte {offset}"] if offset is not None else []
        super().__init__(f"{', '.join(where)}: {message}; {repair_advice(store)}")
        self.damage = message
        self.store = str(store)
        self.shard = shard
        self.batch = batch
        self.offset = offset


class IncompleteStoreError(DataError):
    """A store without a manifest: precompute has not finished.

    Attributes:
        store: Root of the store.
    """

    def __init__(self, store: Path | str) -> None:
        super().__init__(
            f"store {store}: has no manifest.json, so it is not complete; "
            "run `tmkd precompute` with its recipe to finish it"
        )
        self.store = str(store)


class LabelError(RecipeError):
    """Label names that cannot be mapped onto each other.

    Attributes:
        unmapped: The names that have no counterpart.
    """

    def __init__(self, message: str, *, unmapped: Sequence[str], field: str | None = None) -> None:
        super().__init__(message, field=field)
        self.unmapped = tuple(unmapped)


class TemperatureError(RecipeError):
    """A temperature at which a store cannot give the teacher's distribution exactly.

    Attributes:
        temperature: What was asked for.
        grid: The temperatures that the store holds besides 1.
    """

    def __init__(
        self, message: str, *, temperature: float, grid: Sequence[float], field: str | None = "temperature"
    ) -> None:
        held = ", ".join(f"{entry:g}" for entry in grid) or "none"
        super().__init__(f"{temperature:g}: {message} (besides 1 it has: {held})", field=field)
        self.temperature = temperature
        self.grid = tuple(grid)


class RefusedError(TmkdError):
    """What is there belongs to another plan, generation or run (exit code 4).

    Attributes:
        differing: The fields that differ, as ``name: theirs -> ours``.
    """

    exit_code = 4

    def __init__(self, message: str, *, differing: Sequence[str] = ()) -> None:
        details = f" (differs in {'; '.join(differing)})" if differing else ""
        super().__init__(message + details)
        self.differing = tuple(differing)


class TeacherError(TmkdError):
    """A teacher or a row failed (exit code 5).

    Attributes:
        teacher: Name of the teacher.
        shard: Shard id, if one is to blame.
        example_ids: Rows to blame, as far as they are known.
    """

    exit_code = 5

    def __init__(
        self,
        message: str,
        *,
        teacher: str,
        shard: int | None = None,
        example_ids: Sequence[str] = (),
    ) -> None:
        where = f"teacher {teacher}" + (f", shard {shard}" if shard is not None else "")
        super().__init__(f"{where}: {message}")
        self.teacher = teacher
        self.shard = shard
        self.example_ids = tuple(example_ids)


class ResourceError(TmkdError):
    """Something outside is missing: a device, a cluster, disk space, a permission (exit code 6)."""

    exit_code = 6


class TrainingError(TmkdError):
    """The student's training failed.

    Attributes:
        log: The log to read.
    """

    def __init__(self, message: str, *, log: Path | str | None = None) -> None:
        super().__init__(message + (f"; see {log}" if log else ""))
        self.log = str(log) if log else None


class InterruptedRunError(TmkdError):
    """Ctrl-C or SIGTERM: what is committed is kept, and the same command goes on from there.

    Attributes:
        signal_number: The signal that ended the run.
    """

    def __init__(self, message: str, *, signal_number: int = 2) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
