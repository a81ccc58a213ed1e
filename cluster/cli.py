"""The command line ``tmkd``. Heavy libraries are imported by the commands that need them.

Invariants:
    1. ``tmkd --help`` loads none of torch, ray, deepspeed, transformers (tests/cluster/test_cli.py).
    2. One line says what is wrong and what to do; a traceback only with ``--debug``.
    3. With ``--json``, stdout carries exactly one JSON object.
"""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.command_options import AddressOption, JsonOption, OutOption, SetOption, SizeOption
from cluster.console import say, stderr_console
from cluster.export_command import export
from cluster.store_commands import store_app
from cluster.sweep.command import sweep
from schemas.errors import ResourceError, TmkdError

# Typer carries click inside since 0.27: its usage errors are reached through what it exports.
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="tmkd",
    help="Multi-teacher knowledge distillation from logit stores.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(store_app, name="store")
app.command()(sweep)
app.command()(export)

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")]
NewStoreOption = Annotated[
    bool,
    typer.Option("--new-store", help="Make a new store where one of the same names but another hash exists."),
]
ProcsOption = Annotated[int | None, typer.Option("--num-procs", min=1, help="Ranks; overrides the recipe's.")]
HostfileOption = Annotated[
    Path | None,
    typer.Option(
        "--hostfile",
        exists=True,
        dir_okay=False,
        help="Hosts for the deepspeed launcher: `host slots=n` lines.",
    ),
]


@app.callback(invoke_without_command=True)
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,  # noqa: ARG001
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Multi-teacher knowledge distillation from logit stores."""
    if version:
        from importlib.metadata import version as installed_version

        typer.echo(installed_version("tmkd"))
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    size: SizeOption = None,
    out: OutOption = None,
    address: AddressOption = None,
    new_store: NewStoreOption = False,
    num_procs: ProcsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Teachers, stores, stages, evaluation and report; finished steps are skipped."""
    from cluster.commands import run_recipe
    from cluster.run_context import RunOptions
    from cluster.table import print_evaluation

    options = RunOptions(address=address, new_store=new_store, num_procs=num_procs)
    result = run_recipe(_load(recipe, overrides, out, size), options)
    if as_json:
        evaluation = result.evaluation.model_dump(mode="json") if result.evaluation is not None else None
        _print_json(
            {
                "run": str(result.run),
                "student": str(result.student),
                "report": str(result.report),
                "evaluation": evaluation,
            }
        )
        return
    if result.evaluation is not None:
        print_evaluation(result.evaluation)
    say(f"student: {result.student}")
    say(f"report:  {result.report}")


@app.command()
def precompute(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    size: SizeOption = None,
    out: OutOption = None,
    teacher: Annotated[
        list[str] | None, typer.Option("--teacher", help="Only this teacher. Repeatable.")
    ] = None,
    address: AddressOption = None,
    new_store: NewStoreOption = False,
    as_json: JsonOption = False,
) -> None:
    """The teachers' logit stores."""
    from cluster.commands import precompute_recipe
    from cluster.run_context import RunOptions

    options = RunOptions(address=address, new_store=new_store, teachers=tuple(teacher or ()))
    lock = precompute_recipe(_load(recipe, overrides, out, size), options)
    stores = {
        f"{name}/{part.part}": part.stores
        for name, parts in lock.corpora.items()
        for part in parts
        if part.stores
    }
    if as_json:
        _print_json({"stores": stores})
        return
    for where, roots in stores.items():
        for name, root_path in roots.items():
            typer.echo(f"{where}\t{name}\t{root_path}")


@app.command()
def distill(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    size: SizeOption = None,
    out: OutOption = None,
    num_procs: ProcsOption = None,
    hostfile: HostfileOption = None,
    as_json: JsonOption = False,
) -> None:
    """The students, from finished stores, through the deepspeed launcher."""
    from cluster.commands import distill_recipe
    from cluster.run_context import RunOptions

    options = RunOptions(num_procs=num_procs, hostfile=hostfile)
    student = distill_recipe(_load(recipe, overrides, out, size), options)
    if as_json:
        _print_json({"student": str(student)})
    else:
        typer.echo(str(student))


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    size: SizeOption = None,
    out: OutOption = None,
    no_teacher: Annotated[
        bool, typer.Option("--no-teacher", help="Run no model: say what a run would do, and no more.")
    ] = False,
    sample_tokens: Annotated[
        int | None,
        typer.Option("--sample-tokens", min=2, help="Tokens that a language model is tried on, about."),
    ] = None,
    codec: Annotated[
        list[str] | None, typer.Option("--codec", help="A codec to try besides the recipe's. Repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What a run would do: corpora, shards, teachers, students.

    Language models are tried on a sample: what each keep policy would cost and lose.
    """
    from cluster.commands import describe_plan, plan_keeping

    loaded = _load(recipe, overrides, out, size)
    description = describe_plan(loaded)
    kept = None if no_teacher else plan_keeping(loaded, sample_tokens, tuple(codec or ()))
    if as_json:
        keep = {} if kept is None else {"keep": kept.plan.model_dump(mode="json"), "chart": str(kept.chart)}
        _print_json({**description, **keep})
        return
    typer.echo(json.dumps(description, indent=1, ensure_ascii=False))
    if kept is not None:
        from cluster.language.keep_table import print_keep_plan

        print_keep_plan(kept.plan)
        say(f"plan:  {kept.document}")
        say(f"chart: {kept.chart}")


@app.command()
def evaluate(
    student: Annotated[Path, typer.Argument(help="A student's directory.")],
    recipe: Annotated[str | None, typer.Option("--recipe", help="Evaluate on the recipe's corpora.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Or on a labelled file.")] = None,
    columns: Annotated[str | None, typer.Option(help="Text columns of --data, comma-separated.")] = None,
    label: Annotated[str, typer.Option(help="Label column of --data.")] = "label",
    overrides: SetOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a student scores, beside its teachers.

    A classifier: accuracy, macro-F1, ECE, agreement, parameters, examples/s. A language model: perplexity,
    accuracy of the most probable token, ECE, agreement, parameters.
    """
    from cluster.commands import evaluate_on_recipe
    from cluster.student_commands import evaluate_on_file
    from cluster.table import print_evaluation
    from schemas.errors import RecipeError
    from schemas.language_evaluation import AnyEvaluation

    if (recipe is None) == (data is None):
        raise RecipeError("evaluate wants either --recipe or --data")
    evaluation: AnyEvaluation
    if recipe is not None:
        evaluation = evaluate_on_recipe(student, _load(recipe, overrides, out))
    else:
        evaluation = evaluate_on_file(student, Path(str(data)), _split(columns), label)
    if as_json:
        _print_json(evaluation.model_dump(mode="json"))
    else:
        print_evaluation(evaluation)


@app.command()
def predict(
    student: Annotated[Path, typer.Argument(help="A student's directory.")],
    data: Annotated[Path, typer.Option("--data", help="Rows to label: jsonl, parquet, arrow, csv, tsv.")],
    columns: Annotated[str | None, typer.Option(help="Text columns; by default the student's own.")] = None,
    question: Annotated[str | None, typer.Option(help="Column whose passages are ranked.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A jsonl file; default stdout.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Labels rows, and ranks the passages of each question where there is a question column."""
    from cluster.student_commands import predict_file
    from schemas.digest import replace_file

    if output is not None and not output.absolute().parent.is_dir():
        raise ResourceError(f"{output}: its directory is not there; make it first")
    lines = predict_file(student, data, _split(columns), question)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if output is not None:
        replace_file(output, text.encode())
        say(f"{len(lines)} rows: {output}")
    if as_json:
        _print_json({"rows": lines} if output is None else {"num_rows": len(lines), "output": str(output)})
    elif output is None:
        typer.echo(text, nl=False)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="A run's or sweep's directory.")],
    as_json: JsonOption = False,
) -> None:
    """Writes a run's self-contained HTML page."""
    from cluster.report import write_report

    path = write_report(run_dir)
    if as_json:
        _print_json({"report": str(path)})
    else:
        typer.echo(str(path))


def main() -> None:
    """Entry point: runs a command and turns errors into one line and an exit code."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Runs ``tmkd`` with arguments.

    Returns:
        The exit code of DESIGN section 6.
    """
    # Errors advise it, so it is taken wherever it is added.
    debug = "--debug" in arguments
    words = [word for word in arguments if word != "--debug"]
    try:
        result = app(args=words, prog_name="tmkd", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except _UsageError as error:
        error.show()
        return 2
    except (typer.Abort, KeyboardInterrupt):
        return _fail(
            "interrupted; what is committed is kept, and the same command goes on from there", 130, debug
        )
    except TmkdError as error:
        return _fail(error.message, error.exit_code, debug)
    except OSError as error:
        return _fail(*_explain_os_error(error), debug)
    except Exception as error:  # noqa: BLE001 - the boundary of the process
        return _fail(
            f"unexpected {type(error).__name__}: {error}; run again with --debug and report it", 1, debug
        )


def _fail(message: str, exit_code: int, debug: bool) -> int:
    if debug and sys.exc_info()[0] is not None:
        stderr_console().print_exception()
    say(f"tmkd: {' '.join(message.split())}")
    return exit_code


def _explain_os_error(error: OSError) -> tuple[str, int]:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{where}; free space and run the same command again", ResourceError.exit_code
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write or read{where}; choose another --out", ResourceError.exit_code
    return f"unexpected {type(error).__name__}: {error}; run again with --debug", 1


def _load(recipe: str, overrides: list[str] | None, out: str | None, size: str | None = None) -> Any:
    from cluster.recipe_file import load_recipe

    return load_recipe(recipe, overrides or (), out=out, size=size)


def _split(columns: str | None) -> tuple[str, ...] | None:
    return tuple(column.strip() for column in columns.split(",")) if columns else None


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))
