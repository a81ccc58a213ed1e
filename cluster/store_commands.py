"""``tmkd store``: look at stores and check them."""

from __future__ import annotations

import json
from typing import Annotated

import typer

store_app = typer.Typer(
    help="Look at logit stores and check them.", no_args_is_help=True, rich_markup_mode=None
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
StoreArgument = Annotated[str, typer.Argument(help="A store's root: a directory or a URL.")]


@store_app.command("ls")
def ls(
    root: Annotated[str, typer.Argument(help="A directory of stores, or its URL.")] = "runs/stores",
    as_json: JsonOption = False,
) -> None:
    """Lists the stores below a root."""
    from cluster.catalog import list_stores, print_stores

    stores = list_stores(root)
    if as_json:
        typer.echo(json.dumps({"stores": [store.model_dump(mode="json") for store in stores]}))
    else:
        print_stores(stores)


@store_app.command("inspect")
def inspect(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Shows what a store holds."""
    from cluster.catalog import inspect_store

    typer.echo(json.dumps(inspect_store(store), ensure_ascii=False, indent=None if as_json else 1))


@store_app.command("verify")
def verify(
    store: StoreArgument,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and every row.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Checks records, sizes and digests; with --deep every hash and every row."""
    from cluster.catalog import verify_store

    result = verify_store(store, deep=deep)
    typer.echo(
        json.dumps(result) if as_json else "\n".join(f"{key}\t{value}" for key, value in result.items())
    )
