"""A hostile store: what a stranger changes, and how it must end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.reliability.forgery import ForgedStore


@dataclass(frozen=True)
class HostileCase:
    """One way to make a store that does harm.

    Attributes:
        edit: Edits the store before all its hashes are made to match.
        after: Edits the store's directory afterwards.
        harmless: The store must be read, with the values of the one that it was made from; all others
            must be refused.
    """

    edit: Callable[[ForgedStore], object] = lambda forged: None
    after: Callable[[ForgedStore], object] = lambda forged: None
    harmless: bool = False
