"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a field: dotted.path=value. Repeatable.")
]
SizeOption = Annotated[
    str | None, typer.Option("--size", help="One of the file's sizes, such as smoke or table.")
]
OutOption = Annotated[str | None, typer.Option("--out", help="Output root; overrides the recipe's.")]
AddressOption = Annotated[
    str | None, typer.Option("--address", help="Ray cluster to join; also RAY_ADDRESS. Default: a local one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
