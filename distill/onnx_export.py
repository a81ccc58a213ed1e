"""ONNX: a plain checkpoint as ``model.onnx``, believed only after it was compared with torch.

The exporter is torch's own, by ``torch.export`` (extra ``onnx``). optimum-onnx wants transformers 4.

Shapes: B rows of a batch, L tokens, C labels; both B and L are free in the file.

Invariants:
    1. A file that is left gives torch's logits within the tolerance, on batches of other sizes and
       lengths than the one it was traced with (tests/distill/test_onnx_export.py).
    2. A file that does not is deleted, and the export fails (tests/distill/test_onnx_export.py).
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.predict import Texts, batch_texts
from distill.skeleton import load_skeleton, load_tokenizer, quiet_transformers
from schemas.errors import ResourceError, TmkdError, first_line

ONNX_FILE = "model.onnx"
OPSET = 18
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
BATCH_SIZES = (1, 3, 8)
MAX_ROWS = 48
# Of the largest logit, or of 1 where all are smaller. Two float32 programs that sum in another order:
# 1.2e-6 to 2.3e-6 was measured on encoders of logits below 2.
TOLERANCE = 1e-5

# Compared besides the caller's rows: one token, some, and more than any encoder takes.
PROBES = (
    ("a", "b"),
    ("what does the module do", "it reads a file"),
    ("one two three four five six seven", "no"),
    ("a question of some length about the parts of a text", "word " * 600),
)


class OnnxExportError(TmkdError):
    """The exporter fails on this architecture, or what it wrote is another function.

    Attributes:
        max_difference: Of logits; None where nothing could be compared.
    """

    def __init__(self, message: str, *, max_difference: float | None = None) -> None:
        super().__init__(message)
        self.max_difference = max_difference


@dataclass(frozen=True, slots=True)
class OnnxReport:
    """How a file compares with torch, both in float32 on the CPU.

    Attributes:
        path: The file.
        opset: Of its operators.
        num_rows: Compared rows, each in several batches.
        batch_sizes: Rows of a batch.
        lengths: Shortest and longest batch in tokens.
        max_difference: Largest absolute difference of a logit.
        largest_logit: Largest absolute logit of torch.
        tolerance: What ``max_difference`` may be.
    """

    path: Path
    opset: int
    num_rows: int
    batch_sizes: tuple[int, ...]
    lengths: tuple[int, int]
    max_difference: float
    largest_logit: float
    tolerance: float


class _Logits(torch.nn.Module):
    """A classifier as a function from named tensors to logits alone."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, *inputs_BL: Tensor) -> Tensor:
        """Returns float32 logits ``[B, C]``."""
        logits: Tensor = self.model(**dict(zip(self.names, inputs_BL, strict=True))).logits
        return logits


def check_onnx_packages() -> None:
    """Checks that the extra is installed, before any work.

    Raises:
        ResourceError: It is not.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ResourceError(f"the ONNX export needs {', '.join(missing)}: pip install '.[onnx]'")


def export_onnx(directory: Path | str, rows: Texts = (), *, max_length: int) -> OnnxReport:
    """Writes ``model.onnx`` beside a plain checkpoint's safetensors and compares the two.

    Args:
        directory: A checkpoint that plain transformers opens, with its tokenizer.
        rows: Real rows to compare on, of one text or two; the first 48 are used, besides made-up ones.
        max_length: Longest input in tokens.

    Raises:
        ResourceError: The extra is missing, or the file cannot be written.
        DataError: The checkpoint cannot be read.
        OnnxExportError: The export fails or is another function; no file is left.
    """
    check_onnx_packages()
    path = Path(directory) / ONNX_FILE
    tokenizer = load_tokenizer(str(directory))
    model = load_skeleton(Path(directory))
    parameters = inspect.signature(model.forward).parameters
    module = _Logits(model, [name for name in tokenizer.model_input_names if name in parameters]).eval()
    num_texts = len(rows[0]) if rows else len(PROBES[0])
    texts = [*rows[:MAX_ROWS], *(probe[:num_texts] for probe in PROBES)]
    done = False
    try:
        _write(module, _inputs(module, tokenizer, texts[-3:-1], max_length, 2)[0], path)
        report = _compare(module, tokenizer, texts, max_length, path)
        done = True
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written ({error})") from error
    finally:
        if not done:
            path.unlink(missing_ok=True)
    return report


def _inputs(
    module: _Logits, tokenizer: Any, texts: Texts, max_length: int, batch_rows: int
) -> list[tuple[Tensor, ...]]:
    with quiet_transformers():
        batches = list(batch_texts(tokenizer, texts, max_length=max_length, batch_rows=batch_rows))
    return [tuple(batch.inputs[name] for name in module.names) for batch in batches]


def _write(module: _Logits, example: tuple[Tensor, ...], path: Path) -> None:
    axes = {0: "batch", 1: "sequence"}
    try:
        with _quiet_exporter():
            torch.onnx.export(
                module,
                example,
                str(path),
                input_names=list(module.names),
                output_names=["logits"],
                dynamic_shapes=(tuple(axes for _ in module.names),),
                opset_version=OPSET,
                external_data=False,
                dynamo=True,
                verbose=False,
            )
    # The exporter's own errors are RuntimeErrors; a model beyond protobuf's 2 GB is a ValueError.
    except (RuntimeError, ValueError) as error:
        raise OnnxExportError(
            f"{module.model.config.model_type} models cannot be exported to ONNX here ({first_line(error)}); "
            "export without --onnx"
        ) from error


def _compare(module: _Logits, tokenizer: Any, texts: Texts, max_length: int, path: Path) -> OnnxReport:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst, largest, lengths = 0.0, 0.0, set()
    # The exporter leaves out an input that the model does not read.
    known = {entry.name for entry in session.get_inputs()}
    for batch_rows in BATCH_SIZES:
        for inputs in _inputs(module, tokenizer, texts, max_length, batch_rows):
            lengths.add(int(inputs[0].shape[1]))
            with torch.inference_mode():
                expected_BC = module(*inputs).numpy()
            named = {name: value.numpy() for name, value in zip(module.names, inputs, strict=True)}
            (actual_BC,) = session.run(["logits"], {key: named[key] for key in named if key in known})
            difference_BC = np.abs(np.asarray(actual_BC) - expected_BC)
            # NaN is never within a tolerance, and max() would lose it.
            worst = max(worst, float(np.nan_to_num(difference_BC, nan=np.inf).max()))
            largest = max(largest, float(np.abs(expected_BC).max()))
    tolerance = TOLERANCE * max(1.0, largest)
    if not worst <= tolerance:
        raise OnnxExportError(
            f"the ONNX file is not the same function: its logits differ by up to {worst:.3g}, "
            f"allowed are {tolerance:.3g}; it was deleted: export without --onnx",
            max_difference=worst,
        )
    return OnnxReport(
        path=path,
        opset=OPSET,
        num_rows=len(texts),
        batch_sizes=BATCH_SIZES,
        lengths=(min(lengths), max(lengths)),
        max_difference=worst,
        largest_logit=largest,
        tolerance=tolerance,
    )


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silences what the exporter says of packages that nobody asked for and of torch's own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            # Of two axes that must be equal only one can lend its name, says the exporter.
            warnings.filterwarnings("ignore", r"# The axis name", UserWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|onnx).*")
            yield
    finally:
        logger.setLevel(level)
