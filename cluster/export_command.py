"""``tmkd export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.command_options import JsonOption, OutOption, SetOption
from cluster.console import say


def export(
    student: Annotated[Path, typer.Argument(help="A student's directory.")],
    output: Annotated[Path, typer.Argument(help="A new directory for the single-head checkpoint.")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Measure what folding costs on its corpora.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Or on a labelled file.")] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Also write model.onnx and compare it with torch (extra onnx).")
    ] = False,
    license_: Annotated[
        str | None, typer.Option("--license", help="The model's licence: an id of the hub, or its name.")
    ] = None,
    source_license: Annotated[
        list[str] | None,
        typer.Option("--source-license", metavar="NAME=ID", help="A teacher's or corpus's. Repeatable."),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="REPO", help="Upload it, too: owner/name.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Anyone may read the repository; private without.")
    ] = False,
    overrides: SetOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Folds the heads into one: a checkpoint that plain transformers opens, with its model card.

    What that costs in accuracy is measured where there are rows: by default those of the student's run.
    """
    from cluster.export import ExportOptions, export_student, find_own_rows
    from cluster.hub import HubTarget, check_target, push_export
    from cluster.model_card import Licences, parse_source_licences
    from schemas.errors import RecipeError

    if recipe is not None and data is not None:
        raise RecipeError("export wants at most one of --recipe and --data")
    if public and push_to_hub is None:
        raise RecipeError("--public is for --push-to-hub REPO")
    if license_ is not None and not license_.strip():
        raise RecipeError("--license is empty; leave it out if the licence is not known")
    licences = Licences(license_, parse_source_licences(source_license or []))
    target = None if push_to_hub is None else HubTarget(push_to_hub, public)
    if target is not None:
        check_target(target)
    if recipe is not None:
        rows = _load(recipe, overrides, out)
    else:
        rows = find_own_rows(student) if data is None else None
    if not licences.is_hub_id():
        say(f"the hub has no licence {license_!r}: the card says license: other, with this name")
    options = ExportOptions(
        rows=rows, data=data, onnx=onnx, licences=licences, name=target.repo if target else None
    )
    result = export_student(student, output, options)
    if target is not None:
        result["repository"] = push_export(output, target)
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    _print_lines(result)


def _load(recipe: str, overrides: list[str] | None, out: str | None) -> Any:
    from cluster.export import MeasuredRows
    from cluster.recipe_file import load_recipe
    from cluster.run_directory import RunDirectory
    from schemas.errors import RecipeError
    from schemas.recipe import Recipe

    loaded = load_recipe(recipe, overrides or (), out=out)
    if not isinstance(loaded, Recipe):
        raise RecipeError("--recipe is one of language models; give one of classifiers")
    return MeasuredRows(loaded, RunDirectory.of(loaded))


def _print_lines(result: dict[str, Any]) -> None:
    for key, value in result.items():
        typer.echo(f"{key}\t{value}")
    if "accuracy_folded" not in result:
        say("give --recipe or --data to measure what folding the heads costs in accuracy")
