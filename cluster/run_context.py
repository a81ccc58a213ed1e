"""A run under way: its recipe, its directory, its step log, and the flag that stops it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeAlias, TypeVar

from cluster.console import say
from cluster.recipe_file import write_recipe
from cluster.run_directory import RunDirectory
from cluster.steps import StepLog
from precompute.interrupt import StopFlag, stop_on_signals
from schemas.any_recipe import AnyRecipe
from schemas.language_evaluation import AnyEvaluation
from schemas.recipe import Recipe

R_co = TypeVar("R_co", bound=AnyRecipe, covariant=True)
_R = TypeVar("_R", bound=AnyRecipe)


@dataclass(frozen=True)
class RunOptions:
    """What the command line adds to a recipe.

    Attributes:
        address: Of a Ray cluster; a local one by default.
        new_store: Make a new store where one of the same names but another hash exists.
        num_procs: Ranks of the trainer; the recipe's by default.
        hostfile: For the deepspeed launcher.
        teachers: Precompute only these; all by default.
    """

    address: str | None = None
    new_store: bool = False
    num_procs: int | None = None
    hostfile: Path | None = None
    teachers: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunOf(Generic[R_co]):
    """A run under way, of one kind of recipe: what every step needs."""

    recipe: R_co
    options: RunOptions
    directory: RunDirectory
    steps: StepLog
    stop: StopFlag

    @property
    def num_threads(self) -> int:
        """CPU threads of one rank."""
        num_procs = self.options.num_procs or self.recipe.num_procs
        return self.recipe.threads_per_proc or max(1, available_cpus() // num_procs)


Run: TypeAlias = RunOf[Recipe]
AnyRun: TypeAlias = RunOf[AnyRecipe]


@dataclass(frozen=True)
class RunResult:
    """What a whole run leaves.

    Attributes:
        evaluation: ``evaluation.json``; None where the recipe names no evaluation corpus.
    """

    run: Path
    student: Path
    report: Path
    evaluation: AnyEvaluation | None


@contextmanager
def start_run(recipe: _R, options: RunOptions) -> Iterator[RunOf[_R]]:
    """Makes the run's directory, writes the resolved recipe, and turns signals into a flag."""
    directory = RunDirectory.of(recipe)
    directory.run.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, directory.recipe)
    say(f"run {directory.run}")
    with stop_on_signals() as stop:
        yield RunOf(recipe, options, directory, StepLog.open(directory.timings), stop)


def available_device() -> Literal["cpu", "cuda"]:
    """Returns ``cuda`` where there is one, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def available_cpus() -> int:
    """Returns the CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
