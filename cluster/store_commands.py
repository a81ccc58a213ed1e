"""``tmkd store``: look at stores, check them, mend them, and sweep what nobody needs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from cluster.command_options import AddressOption, JsonOption, OutOption, SetOption
from cluster.console import say

store_app = typer.Typer(
    help="Look at logit stores and look after them.", no_args_is_help=True, rich_markup_mode=None
)

StoreArgument = Annotated[str, typer.Argument(help="A store's root: a directory or a URL.")]
RecipeOption = Annotated[str, typer.Option("--recipe", help="The recipe that made the store.")]
_SHOWN_PROBLEMS = 20


@store_app.command("ls")
def ls(
    root: Annotated[str, typer.Argument(help="A directory of stores, or its URL.")] = "runs/stores",
    teacher: Annotated[str | None, typer.Option("--teacher", help="Only stores of this name.")] = None,
    corpus: Annotated[str | None, typer.Option("--corpus", help="Only stores of this name.")] = None,
    students: Annotated[bool, typer.Option("--students", help="Name the students of each store.")] = False,
    outs: Annotated[
        list[str] | None,
        typer.Option("--out", help="Output root of runs that use the stores. Default: ROOT's. Repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Lists the stores below a root, and which runs and students use them."""
    from cluster.store_listing import list_stores, print_stores

    stores = [store for store in list_stores(root, outs) if store.is_of(teacher, corpus)]
    if as_json:
        typer.echo(json.dumps({"stores": [store.model_dump(mode="json") for store in stores]}))
    else:
        print_stores(stores, with_students=students)
        unread = [store for store in stores if store.problem is not None]
        if unread:
            count = f"{len(unread)} of {len(stores)} stores cannot be read"
            say(f"{count}: see `tmkd store verify {unread[0].path}`")


@store_app.command("inspect")
def inspect(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Shows what a store holds."""
    from cluster.store_listing import inspect_store

    typer.echo(json.dumps(inspect_store(store), ensure_ascii=False, indent=None if as_json else 1))


@store_app.command("verify")
def verify(
    store: StoreArgument,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and every row.")] = False,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="With --deep: its output root is where the corpus's texts are."),
    ] = None,
    overrides: SetOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Checks records, sizes and digests; with --deep every hash and what every row means.

    Exit code 3 if anything is wrong or the store is not finished. All that is wrong is told, not only
    the first.
    """
    from cluster.corpus_check import corpora_of
    from cluster.store_check import diagnose_store

    loaded = _load(recipe, overrides, out) if recipe is not None else None
    diagnosis = diagnose_store(store, deep=deep, corpora=corpora_of(store, loaded) if deep else None)
    fields = diagnosis.model_dump(mode="json")
    if as_json:
        typer.echo(json.dumps(fields, ensure_ascii=False))
    else:
        problems = fields.pop("problems")
        _print_fields({**fields, "problems": len(problems)})
        _say_problems(problems)
    diagnosis.raise_if_unsound()


@store_app.command("repair")
def repair(
    store: StoreArgument,
    recipe: RecipeOption,
    overrides: SetOption = None,
    out: OutOption = None,
    address: AddressOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Look for damage as `verify` does without --deep.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Computes damaged and missing shards again, and writes damaged files again, as the recipe says.

    What is found is told first. Where nothing is wrong, nothing is touched.
    """
    from cluster.store_repair import repair_damage

    repaired = repair_damage(store, _load(recipe, overrides, out), address=address, deep=not quick)
    if as_json:
        typer.echo(repaired.model_dump_json())
        return
    num_problems = len(repaired.diagnosis.problems)
    _print_fields({**repaired.model_dump(mode="json", exclude={"diagnosis"}), "problems": num_problems})


@store_app.command("self-test")
def self_test(
    store: StoreArgument,
    recipe: RecipeOption,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows to compute again.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the sample.")] = 0,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0.0,
            help="Relative to the largest logit. Default: 1e-4, float16 5e-3, bfloat16 4e-2.",
        ),
    ] = None,
    overrides: SetOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Computes a sample of rows again and compares: the largest difference, any shift by one row.

    The teacher is loaded in this process. Exit code 3 if a row is beyond the tolerance.
    """
    from cluster.store_self_test import compare_with_teacher

    result = compare_with_teacher(
        store, _load(recipe, overrides, out), num_rows=rows, seed=seed, tolerance=tolerance
    )
    fields = result.model_dump(mode="json")
    if as_json:
        typer.echo(json.dumps(fields, ensure_ascii=False))
    else:
        _print_fields(fields)
    result.raise_if_failed()


@store_app.command("gc")
def gc(
    root: Annotated[str, typer.Argument(help="A store, or a directory or URL of stores.")],
    grace: Annotated[
        str, typer.Option("--grace", help="What is younger stays: a duration such as 24h, 90m or 7d.")
    ] = "24h",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing; show what would go.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Deletes what lost attempts and finished repairs have left.

    Never anything that a record or the manifest refers to, nor anything younger than the grace period. A
    reader that has been open since before a repair needs the old data: choose a grace period longer than
    the longest training.
    """
    from cluster.store_gc import parse_duration, raise_if_left_alone, sweep_stores

    swept = sweep_stores(root, parse_duration(grace), dry_run=dry_run)
    files = [(store, file) for store in swept for file in store.files]
    num_bytes = sum(store.num_bytes for store in swept)
    if as_json:
        stores = [{**store.model_dump(mode="json"), "num_bytes": store.num_bytes} for store in swept]
        typer.echo(json.dumps({"dry_run": dry_run, "num_bytes": num_bytes, "stores": stores}))
    else:
        for store, file in files:
            typer.echo(f"{store.store}/{file.name}\t{file.reason}\t{file.num_bytes}")
        verb = "would be deleted" if dry_run else "deleted"
        say(f"{len(files)} files, {num_bytes / 1e6:.1f} MB {verb} in {len(swept)} stores")
    raise_if_left_alone(swept)


def _say_problems(problems: list[dict[str, Any]]) -> None:
    """Tells a person what is wrong, the first problems in full."""
    for problem in problems[:_SHOWN_PROBLEMS]:
        where = f"shard {problem['shard']}: " if problem["shard"] is not None else ""
        say(f"  {where}{problem['message']}")
    if len(problems) > _SHOWN_PROBLEMS:
        say(f"  and {len(problems) - _SHOWN_PROBLEMS} more; --json lists all")


def _print_fields(fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        typer.echo(f"{name}\t{json.dumps(value) if isinstance(value, list) else value}")


def _load(recipe: str, overrides: list[str] | None, out: str | None) -> Any:
    from cluster.recipe_file import load_recipe

    return load_recipe(recipe, overrides or (), out=out)
