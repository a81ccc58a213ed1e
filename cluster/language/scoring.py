"""What a language model says of each position of the evaluation corpora, kept for the next start.

Teachers and students go the same way: a plain transformers model, batch by batch, its output head some
positions at a time. No ``[tokens, vocabulary]`` tensor is made.

Shapes: P positions.

Invariants (tests/cluster/language/test_scoring.py):
    1. Scores are those of the plain model's logits, read where the target has to be predicted.
    2. A model is measured again only if its weights, its dtype or the chunks are others.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.language.evaluated_text import EvaluatedText
from cluster.run_context import available_cpus, available_device
from precompute.generation import describe_token_generation
from precompute.language_forward import compute_kept
from precompute.language_teacher import LoadedLanguageModel
from precompute.pretrained import check_length
from precompute.tasks import LanguageWorkerSpec
from precompute.truncate import Truncation
from schemas.digest import hash_value, replace_file
from schemas.errors import DataError, TeacherError
from schemas.language import LanguageTeacher
from schemas.policy import TopKPolicy

_TOP = TopKPolicy(kind="top_k", k=1)
_DTYPES: Mapping[str, Any] = MappingProxyType(
    {
        "target_logprob_P": np.float32,
        "top_logprob_P": np.float32,
        "top_id_P": np.int32,
        "is_finite_P": np.bool_,
        "num_parameters": np.int64,
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class PositionScores:
    """One model on one corpus.

    Attributes:
        target_logprob_P: Log-probability of the token to predict, float32.
        top_logprob_P: Of the most probable token, float32.
        top_id_P: That token, int32; of equally probable ones the first.
        is_finite_P: False where logits were not numbers: the others mean nothing there.
        num_parameters: Of the model.
    """

    target_logprob_P: npt.NDArray[np.float32]
    top_logprob_P: npt.NDArray[np.float32]
    top_id_P: npt.NDArray[np.int32]
    is_finite_P: npt.NDArray[np.bool_]
    num_parameters: int


@dataclass(frozen=True)
class ModelSource:
    """A model to measure.

    Attributes:
        name: For people and paths: ``teachers/<name>``, ``<arm>/seed-17``.
        model: How it is loaded; its keep policy and stores do not matter.
        path, revision: What ``from_pretrained`` takes.
        is_teacher: Errors call it by its name in the recipe, and a student by its directory.
    """

    name: str
    model: LanguageTeacher
    path: str
    revision: str | None = None
    is_teacher: bool = False

    @classmethod
    def of_teacher(cls, teacher: LanguageTeacher, path: str, revision: str | None) -> ModelSource:
        """Returns a recipe's teacher whose model lies at ``path``; a GGUF file was converted to it."""
        loaded = teacher.model_copy(update={"gguf_file": None})
        return cls(f"teachers/{teacher.name}", loaded, path, revision, is_teacher=True)

    @classmethod
    def of_directory(cls, name: str, directory: Path) -> ModelSource:
        """Returns a saved student."""
        short = name.split("/", maxsplit=1)[0]
        return cls(name, LanguageTeacher(name=short, model=str(directory)), str(directory))


def read_scores(
    source: ModelSource,
    texts: Sequence[EvaluatedText],
    directory: Path,
    hash_cache: Path,
    on_rows: Callable[[int], None] = lambda _: None,
) -> list[PositionScores]:
    """Returns a model's scores on each corpus, running it only where they are not known.

    Args:
        source: The model.
        texts: At least one corpus.
        directory: Keeps the scores.
        hash_cache: See ``precompute.generation.describe_generation``.
        on_rows: Hears, after each batch, how many chunks it had.

    Raises:
        TeacherError: A teacher cannot be loaded, or has too few positions.
        ResourceError: The device's memory does not hold it.
        DataError: A student cannot be loaded, or kept scores cannot be read.
    """
    paths = [_place(source, text, directory, hash_cache) for text in texts]
    found = [_load(path, text) for path, text in zip(paths, texts, strict=True)]
    loaded: LoadedLanguageModel | None = None
    scores = []
    for path, text, known in zip(paths, texts, found, strict=True):
        if known is None:
            with _naming(source):
                loaded = loaded or _load_model(source, text)
                known = score_text(loaded, text, on_rows)
            _save(path, known)
        scores.append(known)
    return scores


def score_text(
    loaded: LoadedLanguageModel, text: EvaluatedText, on_rows: Callable[[int], None] = lambda _: None
) -> PositionScores:
    """Runs a model over a corpus."""
    check_length(loaded.model.config, text.spec.max_length, loaded.spec.teacher.name)
    kept = compute_kept(loaded, text.rows, Truncation(_TOP, text.spec.vocab), on_rows).kept
    return PositionScores(
        target_logprob_P=kept.stats.target_logprob,
        top_logprob_P=kept.entries.log_probs,
        top_id_P=kept.entries.ids.astype(np.int32),
        is_finite_P=kept.is_finite_N,
        num_parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
    )


@contextmanager
def _naming(source: ModelSource) -> Iterator[None]:
    """Calls a student by its directory where it fails as a teacher would."""
    try:
        yield
    except TeacherError as error:
        if source.is_teacher:
            raise
        reason = error.message.removeprefix(f"teacher {error.teacher}: ")
        raise DataError(f"{source.path}: {reason}") from error


def _load_model(source: ModelSource, text: EvaluatedText) -> LoadedLanguageModel:
    return LoadedLanguageModel.load(
        LanguageWorkerSpec(
            teacher=source.model,
            model_path=source.path,
            revision=source.revision,
            num_threads=available_cpus(),
            device=available_device(),
            objective=text.spec.objective,
            vocab=text.spec.vocab,
        )
    )


def _place(source: ModelSource, text: EvaluatedText, directory: Path, hash_cache: Path) -> Path:
    """Returns where scores are kept: the name says which model, dtype and chunks they are of."""
    teacher = source.model.model_copy(update={"keep": _TOP, "temperatures": (), "codec": "fixed"})
    model = describe_token_generation(teacher, source.path, source.revision, text.spec, hash_cache)
    key = hash_value([text.fingerprint, model])
    return directory / source.name / f"{text.corpus}-{key[:32]}.npz"


def _save(path: Path, scores: PositionScores) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **{field.name: getattr(scores, field.name) for field in fields(scores)})
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, buffer.getvalue())


def _load(path: Path, text: EvaluatedText) -> PositionScores | None:
    if not path.exists():
        return None
    try:
        # Opened here: numpy leaves a file open that is no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in _DTYPES}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it to measure anew") from error
    for name, array in arrays.items():
        shape = () if name == "num_parameters" else (text.num_positions,)
        if array.dtype != _DTYPES[name] or array.shape != shape:
            raise DataError(f"{path}: {name} has another form than was written; delete it to measure anew")
    return PositionScores(**{**arrays, "num_parameters": int(arrays["num_parameters"])})
