"""Language models for students: random ones, whole ones, and copies with some of the layers.

Invariants (tests/distill/test_language_student.py):
    1. A copy's layers compute what the same layers of the model do; embeddings, final norm and head are
       the model's.
    2. The same init and seed give the same weights.
    3. Nothing is printed; no pickle is read.
"""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
)

from distill.skeleton import quiet_transformers
from schemas.errors import DataError, RecipeError
from schemas.job import StudentInit
from schemas.language import LanguageConfigInit, LanguageLayersInit, Objective
from schemas.model_ref import resolve_model

_FIELD = "student.init"
_AUTO: dict[str, Any] = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}
LanguageInit = LanguageLayersInit | LanguageConfigInit | StudentInit


def load_language_tokenizer(init: LanguageInit) -> Any:
    """Loads the tokenizer of a student.

    Raises:
        RecipeError: There is none, or it is not a fast one.
    """
    if isinstance(init, StudentInit):
        path, source = init.path, {}
    else:
        name = init.tokenizer if isinstance(init, LanguageConfigInit) else init.model
        path, source = resolve_model(name, field=_FIELD), _source(init)
    try:
        with quiet_transformers():
            tokenizer: Any = AutoTokenizer.from_pretrained(path, use_fast=True, **source)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: has no tokenizer ({_shorten(error)})", field=_FIELD) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise RecipeError(f"{path}: has no fast tokenizer, which the chunks' is compared with", field=_FIELD)
    return tokenizer


def build_language_model(init: LanguageInit, objective: Objective, tokenizer: Any, seed: int) -> Any:
    """Builds a student's model on the CPU in float32.

    Args:
        init: Where it comes from.
        objective: ``causal`` or ``masked``.
        tokenizer: Gives the vocabulary's size to a random model.
        seed: Of random weights.

    Raises:
        RecipeError: The init does not make a model.
        DataError: Weights cannot be read, or are missing.
    """
    if isinstance(init, LanguageConfigInit):
        return _build(init, objective, tokenizer, seed)
    if isinstance(init, StudentInit):
        return _load(init.path, objective, {})
    model = _load(resolve_model(init.model, field=_FIELD), objective, _source(init))
    for name in init.overrides:
        if not hasattr(model.config, name):
            raise RecipeError(
                f"the configuration of a {model.config.model_type} has no field {name!r}",
                field=f"{_FIELD}.overrides",
            )
    num_layers = model.config.num_hidden_layers
    kept = choose_layers(num_layers, init.layers or num_layers, init.take)
    return _copy_layers(model, kept, init.overrides, objective)


def choose_layers(num_layers: int, wanted: int, take: str) -> list[int]:
    """Returns the numbers of the layers to keep, ascending.

    Args:
        num_layers: Of the model.
        wanted: How many to keep.
        take: ``first``, or ``spread``: at even distances, the first and the last among them.

    Raises:
        RecipeError: There are fewer.
    """
    if wanted > num_layers:
        raise RecipeError(f"the model has {num_layers} layers, not {wanted}", field=f"{_FIELD}.layers")
    if take == "first" or wanted == 1:
        return list(range(wanted))
    return [int(layer) for layer in np.rint(np.linspace(0, num_layers - 1, wanted))]


def _source(init: LanguageLayersInit | LanguageConfigInit) -> dict[str, Any]:
    fields = {"revision": init.revision, "gguf_file": init.gguf_file}
    return {name: value for name, value in fields.items() if value is not None}


def _load(path: str, objective: Objective, source: dict[str, Any]) -> Any:
    safetensors = {} if "gguf_file" in source else {"use_safetensors": True}
    try:
        with quiet_transformers():
            model, report = _AUTO[objective].from_pretrained(
                path, dtype=torch.float32, output_loading_info=True, **safetensors, **source
            )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        kind = RecipeError if not Path(path).exists() else DataError
        raise kind(f"{path}: cannot be loaded as a {objective} language model ({_shorten(error)})") from error
    absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if absent:
        raise DataError(
            f"{path}: lacks {len(absent)} weights of a {objective} language model, such as {absent[0]}"
        )
    return model


def _build(init: LanguageConfigInit, objective: Objective, tokenizer: Any, seed: int) -> Any:
    fields = dict(init.config)
    model_type = fields.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise RecipeError(
            f"model_type is {model_type!r}, which transformers does not know; try llama or bert",
            field=f"{_FIELD}.config.model_type",
        )
    # Ids may leave gaps.
    fields.setdefault("vocab_size", max(tokenizer.get_vocab().values()) + 1)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        # Those of the architecture may lie outside a smaller vocabulary.
        fields.setdefault(name, getattr(tokenizer, name))
    try:
        config = AutoConfig.for_model(model_type, **fields)
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _AUTO[objective].from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, StrictDataclassError) as error:
        raise RecipeError(
            f"model_type {model_type!r} with these values makes no {objective} language model "
            f"({_shorten(error)})",
            field=f"{_FIELD}.config",
        ) from error


def _copy_layers(model: Any, kept: Sequence[int], overrides: dict[str, Any], objective: Objective) -> Any:
    """Makes a plain model of some layers: neither quantised nor bound to a file, so that it can be saved."""
    config = copy.deepcopy(model.config)
    num_layers = config.num_hidden_layers
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        for name, value in config.to_dict().items():
            # What is said of each layer, such as its type or whether it rotates, goes with the layer.
            if "layer" in name and isinstance(value, list) and len(value) == num_layers:
                setattr(config, name, [value[layer] for layer in kept])
        config.num_hidden_layers = len(kept)
        for name, value in overrides.items():
            setattr(config, name, value)
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            smaller = _AUTO[objective].from_config(config, dtype=torch.float32)
    except (NotImplementedError, AttributeError, ValueError, StrictDataclassError) as error:
        raise RecipeError(
            f"layers of a {config.model_type} cannot be cut ({_shorten(error)})", field=_FIELD
        ) from error
    weights = _renumber(model, num_layers, kept)
    try:
        missing, unexpected = smaller.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise RecipeError(
            f"the model's weights do not fit these overrides ({_shorten(error)})", field=f"{_FIELD}.overrides"
        ) from error
    absent = [*missing, *unexpected]
    if absent:
        raise RecipeError(
            f"layers of a {config.model_type} cannot be cut: {absent[0]} does not fit", field=_FIELD
        )
    return smaller


def _renumber(model: Any, num_layers: int, kept: Sequence[int]) -> dict[str, torch.Tensor]:
    stacks = [
        re.escape(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    pattern = re.compile(rf"({'|'.join(stacks) or '(?!)'})\.(\d+)\.(.*)")
    places = {layer: place for place, layer in enumerate(kept)}
    weights = {}
    for name, value in model.state_dict().items():
        found = pattern.fullmatch(name)
        if found is None:
            weights[name] = value
        elif int(found[2]) in places:
            weights[f"{found[1]}.{places[int(found[2])]}.{found[3]}"] = value
    return weights


def _shorten(error: Exception) -> str:
    return textwrap.shorten(str(error), 200)
