"""Encoders with a classification Linear: loading them quietly, cutting layers, finding the Linear.

Invariants:
    1. Nothing is printed and no warning is raised for weights that are left out or new on purpose;
       weights that are missing from the encoder itself are an error
       (tests/distill/test_student.py::test_building_a_student_prints_nothing,
       test_a_checkpoint_without_encoder_weights_is_refused).
    2. No pickle is read: safetensors only.
    3. New weights of pooler or pre-classifier depend on the seed alone: the skeleton is built with C
       outputs, whatever the number of heads.
"""

from __future__ import annotations

import inspect
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from schemas.errors import DataError, RecipeError
from schemas.model_ref import resolve_model
from schemas.recipe import ConfigInit, LayersInit

_FIELD = "student.init"

if not torch.accelerator.is_available():
    # Where accelerate is installed, saving a model loads DeepSpeed, which says on stdout that it guessed.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turns the loading reports and progress bars of transformers off."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_first_layers(init: LayersInit, num_labels: int, seed: int) -> Any:
    """Loads the first layers of a pretrained encoder (or all), embeddings and pooler included, in float32.

    Args:
        init: The model and how many of its layers to keep.
        num_labels: Outputs of the classification Linear, which is new in any case.
        seed: Seeds weights that the checkpoint does not have (pooler or pre-classifier, Linear).

    Raises:
        RecipeError: There is no such model, or it has fewer layers.
        DataError: The checkpoint cannot be read or lacks weights of the encoder.
    """
    path = resolve_model(init.model, field=f"{_FIELD}.model")
    config = _load_config(path, init.revision)
    _cut_layers(config, init)
    _override(config, init)
    config.num_labels = num_labels
    skeleton, report = _load_weights(path, config, revision=init.revision, seed=seed)
    prefix = f"{skeleton.base_model_prefix}."
    missing = [
        key for key in report["missing_keys"] if key.startswith(prefix) and "pooler" not in key.split(".")
    ]
    if missing:
        raise DataError(
            f"{init.model}: the checkpoint lacks {len(missing)} weights of a {config.model_type} encoder, "
            f"such as {sorted(missing)[0]}"
        )
    return skeleton


def load_skeleton(directory: Path) -> Any:
    """Loads a saved classifier whole, in float32.

    Raises:
        DataError: It cannot be read, or weights are missing or have other shapes.
    """
    try:
        config = _load_config(str(directory), None)
    except RecipeError as error:
        raise DataError(f"{directory}: {error.message}") from error
    skeleton, report = _load_weights(str(directory), config, revision=None, seed=0)
    wrong = [*report["missing_keys"], *report["mismatched_keys"], *report["unexpected_keys"]]
    if wrong:
        raise DataError(f"{directory}: {len(wrong)} weights do not fit config.json, such as {wrong[0]}")
    return skeleton


def build_skeleton(init: ConfigInit, tokenizer: Any, num_labels: int, seed: int) -> Any:
    """Builds a randomly initialised encoder.

    Args:
        init: The configuration; ``vocab_size`` and ``pad_token_id`` follow the tokenizer unless given.
        tokenizer: The student's tokenizer.
        num_labels: Outputs of the classification Linear.
        seed: Seed of all weights.

    Raises:
        RecipeError: The configuration has no known ``model_type``, does not fit the tokenizer, or
            makes no model.
    """
    fields = dict(init.config)
    model_type = fields.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise RecipeError(
            f"model_type is {model_type!r}, which transformers does not know; try bert or roberta",
            field=f"{_FIELD}.config.model_type",
        )
    fields.setdefault("vocab_size", len(tokenizer))
    if tokenizer.pad_token_id is not None:
        fields.setdefault("pad_token_id", tokenizer.pad_token_id)
    if fields["vocab_size"] < len(tokenizer):
        raise RecipeError(
            f"vocab_size is {fields['vocab_size']}, but the tokenizer has {len(tokenizer)} entries",
            field=f"{_FIELD}.config",
        )
    try:
        config = AutoConfig.for_model(model_type, **fields)
        config.num_labels = num_labels
        with quiet_transformers(), _seeded(seed):
            return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, StrictDataclassError) as error:
        raise RecipeError(
            f"model_type {model_type!r} with these values makes no classifier ({_shorten(error)})",
            field=f"{_FIELD}.config",
        ) from error


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """Loads a tokenizer from a directory or the hub.

    Raises:
        RecipeError: There is none.
    """
    try:
        with quiet_transformers():
            tokenizer: Any = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{path}: has no tokenizer that can be loaded ({_shorten(error)})", field=_FIELD
        ) from error
    # Where the files are missing transformers makes an empty tokenizer of the model's type.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise RecipeError(f"{path}: has no tokenizer (its vocabulary is empty)", field=_FIELD)
    return tokenizer


def find_classifier(skeleton: Any, num_outputs: int) -> str:
    """Finds the final classification Linear: the last one of ``num_outputs`` outside the encoder.

    Returns:
        Its dotted name: ``classifier`` (BERT, DistilBERT, DeBERTa, ModernBERT),
        ``classifier.out_proj`` (RoBERTa, ELECTRA), ...

    Raises:
        RecipeError: The architecture has none.
    """
    prefix = f"{skeleton.base_model_prefix}."
    names = [
        name
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == num_outputs
    ]
    names = [name for name in names if not name.startswith(prefix)]
    if not names:
        raise RecipeError(
            f"{type(skeleton).__name__} has no final classification Linear of {num_outputs} outputs "
            "that heads could replace; choose another architecture",
            field=_FIELD,
        )
    return names[-1]


def fit_tokenizer(tokenizer: Any, skeleton: Any) -> None:
    """Makes a tokenizer return only the inputs that the model takes (DistilBERT has no token types).

    The choice is saved with the tokenizer, so that an exported model opens in plain transformers.

    Raises:
        RecipeError: The tokenizer has no padding token.
    """
    if tokenizer.pad_token_id is None:
        raise RecipeError("the tokenizer has no padding token; choose another model", field=_FIELD)
    accepted = set(inspect.signature(skeleton.forward).parameters)
    if getattr(skeleton.config, "type_vocab_size", 2) < 2:
        accepted.discard("token_type_ids")
    names = [name for name in tokenizer.model_input_names if name in accepted]
    tokenizer.model_input_names = names
    tokenizer.init_kwargs["model_input_names"] = names


def check_length(skeleton: Any, max_length: int) -> None:
    """Checks that the encoder has positions for ``max_length`` tokens.

    Raises:
        RecipeError: It has fewer.
    """
    available = getattr(skeleton.config, "max_position_embeddings", None)
    if not isinstance(available, int) or available <= 0:
        return
    embeddings: list[tuple[str, Any]] = list(skeleton.named_modules())
    for name, module in embeddings:
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from the padding index + 1.
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            available = min(available, module.num_embeddings - reserved)
    if max_length > available:
        raise RecipeError(
            f"max_length is {max_length}, but the encoder has positions for {available} tokens",
            field="student.max_length",
        )


def _load_config(path: str, revision: str | None) -> Any:
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: has no model configuration ({_shorten(error)})", field=_FIELD) from error


def _cut_layers(config: Any, init: LayersInit) -> None:
    if init.layers is None:
        return
    num_layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(num_layers, int):
        raise RecipeError(f"{init.model}: a {config.model_type} has no layers to cut", field=_FIELD)
    if init.layers > num_layers:
        raise RecipeError(
            f"{init.model} has {num_layers} layers, not {init.layers}", field=f"{_FIELD}.layers"
        )
    try:
        # Before the count: ModernBERT and others check that it fits their list of layer types.
        if isinstance(getattr(config, "layer_types", None), list):
            config.layer_types = config.layer_types[: init.layers]
        config.num_hidden_layers = init.layers
    except (NotImplementedError, AttributeError) as error:
        raise RecipeError(
            f"{init.model}: layers of a {config.model_type} cannot be cut", field=_FIELD
        ) from error


def _override(config: Any, init: LayersInit) -> None:
    """Changes fields of the configuration; a name that it does not have would change nothing."""
    for name, value in init.overrides.items():
        if not hasattr(config, name):
            raise RecipeError(
                f"the configuration of a {config.model_type} has no field {name!r}",
                field=f"{_FIELD}.overrides",
            )
        setattr(config, name, value)


def _load_weights(path: str, config: Any, *, revision: str | None, seed: int) -> tuple[Any, dict[str, Any]]:
    auto: Any = AutoModelForSequenceClassification
    try:
        with quiet_transformers(), _seeded(seed):
            skeleton, report = auto.from_pretrained(
                path,
                config=config,
                revision=revision,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{path}: its weights cannot be loaded ({_shorten(error)})") from error
    return skeleton, report


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds torch's CPU generator and gives the caller's state back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _shorten(error: Exception) -> str:
    """Returns a message as one line, cut to a length that fits a terminal."""
    return textwrap.shorten(str(error), 200)
