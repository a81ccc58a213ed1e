"""``tmkd sweep``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from cluster.command_options import AddressOption, JsonOption, OutOption, SetOption, SizeOption
from cluster.console import say

FAILED_EXIT_CODE = 1


def sweep(
    source: Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep's file, or a shipped one's name.")],
    overrides: SetOption = None,
    size: SizeOption = None,
    out: OutOption = None,
    address: AddressOption = None,
    new_store: Annotated[
        bool, typer.Option("--new-store", help="Make a new store where one was made otherwise.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """A grid of students from the same stores: teachers run once; a table with spread and tests.

    Started again, it trains only what is missing. A student that fails stops no other; the exit code is
    then 1.
    """
    from cluster.run_context import RunOptions
    from cluster.sweep.engine import run_sweep
    from cluster.sweep.points import load_sweep, make_cells
    from cluster.sweep.report import write_sweep_report
    from cluster.sweep.table import print_sweep

    described = load_sweep(source, size=size)
    cells = make_cells(described, source=source, overrides=overrides or (), out=out)
    directory, evaluation = run_sweep(described, cells, RunOptions(address=address, new_store=new_store))
    report = write_sweep_report(directory)
    if as_json:
        body: dict[str, Any] = {"sweep": str(directory), "report": str(report)}
        body |= {"evaluation": evaluation.model_dump(mode="json")}
        typer.echo(json.dumps(body, ensure_ascii=False))
    else:
        print_sweep(evaluation)
        say(f"report: {report}")
    if evaluation.failures:
        failed = f"{len(evaluation.failures)} of {len(evaluation.students)} students"
        say(f"tmkd: {failed} have no result: the table says why, the same command tries them again")
        raise typer.Exit(FAILED_EXIT_CODE)
