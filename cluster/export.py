"""A student as plain transformers opens it, with its model card and, if asked for, an ONNX file.

Invariant: the output appears whole or not at all, and is never overwritten (tests/cluster/test_export.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.card_facts import CardSource, CorpusFact, corpus_fact
from cluster.language.student_task import refuse_language_model
from cluster.model_card import CARD_FILE, Licences, check_source_names, write_card
from cluster.run_directory import RunDirectory
from cluster.scoring import EvaluationCorpus
from cluster.student_commands import DATA_NAME, evaluation_corpora, read_labelled_file, text_columns
from cluster.student_origin import find_origin
from cluster.student_task import read_task
from distill.export import FoldingCost, FoldReport, fold_student, folding_cost
from distill.heads import HeadLayout
from distill.onnx_export import MAX_ROWS, OnnxReport, check_onnx_packages, export_onnx
from distill.stage_directory import publish_directory
from schemas.errors import RefusedError, ResourceError
from schemas.recipe import Recipe


@dataclass(frozen=True, slots=True)
class MeasuredRows:
    """A recipe whose first evaluation corpus measures something, and where its corpora are locked."""

    recipe: Recipe
    directory: RunDirectory


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What an export holds and what it is measured on.

    Attributes:
        rows: The cost of folding is measured on these.
        data: Or on this file, with the student's own columns and the labels in ``label``.
        onnx: Whether ``model.onnx`` is written.
        name: The model's name in its card; by default that of the directory.
    """

    rows: MeasuredRows | None = None
    data: Path | None = None
    onnx: bool = False
    licences: Licences = field(default_factory=Licences)
    name: str | None = None


@dataclass(frozen=True, slots=True)
class _Written:
    report: FoldReport
    cost: FoldingCost | None
    onnx: OnnxReport | None


def export_student(student: Path, output: Path, options: ExportOptions) -> dict[str, Any]:
    """Folds a student's heads into a plain checkpoint and says what that costs, where there are rows.

    Args:
        student: The student's directory.
        output: A new directory.
        options: What it holds besides.

    Raises:
        RecipeError: The student is a language model, or a licence is for nothing that its run has.
        RefusedError: The directory has content.
        ResourceError: It cannot be written, or the extra ``onnx`` is missing.
        OnnxExportError: The ONNX file cannot be made, or is another function.
    """
    _refuse_language_model(student)
    max_length = HeadLayout.load(student).max_length
    if options.onnx:
        check_onnx_packages()
    _refuse_content(output)
    with tempfile.TemporaryDirectory() as scratch:
        # The rows come first: a file that cannot be read must not cost an export.
        rows = _measured_rows(student, options, Path(scratch))
        source = CardSource(
            name=options.name or output.absolute().name,
            report=FoldReport(output, (), (), 0, 0),
            max_length=max_length,
            task=read_task(student),
            origin=find_origin(student),
            cost=None,
            measured_on=_measured_on(options, rows),
            onnx=None,
        )
        check_source_names(options.licences, source)
        done: list[_Written] = []

        def write(directory: Path) -> None:
            done.append(_write(student, directory, rows, max_length if options.onnx else None))
            written = done[-1]
            facts = replace(source, report=written.report, cost=written.cost, onnx=written.onnx)
            write_card(directory / CARD_FILE, facts, options.licences)
            # The renaming would put aside what somebody else has made there in the meantime.
            _refuse_content(output)

        try:
            publish_directory(output, write)
        except OSError as error:
            raise ResourceError(f"{output}: cannot be written ({error.strerror or error})") from error
    return _describe(output, done[-1])


def find_own_rows(student: Path) -> MeasuredRows | None:
    """Returns the evaluation rows of the run or sweep that a student belongs to, if they are at hand.

    Raises:
        RecipeError: The student is a language model.
        DataError: Its task, or its run's evaluation, is damaged.
    """
    _refuse_language_model(student)
    origin = find_origin(student)
    if origin is None or not origin.recipe.evaluation.corpora or not origin.directory.lock.exists():
        return None
    return MeasuredRows(origin.recipe, origin.directory)


def _refuse_language_model(student: Path) -> None:
    refuse_language_model(student, "there are no heads to fold: plain transformers opens it as it is")


def _refuse_content(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RefusedError(f"{output} is there already; remove it or choose another directory")


def _measured_rows(student: Path, options: ExportOptions, scratch: Path) -> EvaluationCorpus | None:
    if options.rows is not None:
        return evaluation_corpora(options.rows.recipe, options.rows.directory)[0]
    if options.data is None:
        return None
    task = text_columns(student, None)
    return EvaluationCorpus(DATA_NAME, *read_labelled_file(task, options.data, "label", scratch))


def _measured_on(options: ExportOptions, rows: EvaluationCorpus | None) -> CorpusFact:
    if options.rows is not None and rows is not None:
        return corpus_fact(options.rows.recipe, rows.name, options.rows.directory)
    return CorpusFact(DATA_NAME if options.data is None else options.data.name)


def _write(
    student: Path, directory: Path, rows: EvaluationCorpus | None, onnx_length: int | None
) -> _Written:
    report = fold_student(student, directory)
    cost, texts = None, list[tuple[str, ...]]()
    if rows is not None:
        paths: Sequence[str] = [part.rows for part in rows.parts]
        cost = folding_cost(student, directory, paths, rows.corpus.labels)
        texts = rows.first_texts(MAX_ROWS)
    onnx = None if onnx_length is None else export_onnx(directory, texts, max_length=onnx_length)
    return _Written(report, cost, onnx)


def _describe(output: Path, written: _Written) -> dict[str, Any]:
    result: dict[str, Any] = {
        "directory": str(output),
        "heads": list(written.report.heads),
        "num_parameters": written.report.num_parameters,
        "num_student_parameters": written.report.num_student_parameters,
        "card": str(output / CARD_FILE),
    }
    if written.cost is not None:
        result |= asdict(written.cost)
    if written.onnx is not None:
        onnx = asdict(written.onnx)
        result["onnx"] = {**onnx, "path": str(output / written.onnx.path.name)}
    return result
