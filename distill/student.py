"""The student: one encoder, a golden head and a head per teacher.

Shapes: B rows, L tokens, H heads, C labels.

Invariants:
    1. Same init, heads, labels and seed: the same weights, bit for bit
       (tests/distill/test_student.py::test_the_same_seed_gives_the_same_student).
    2. ``from_pretrained`` gives back what ``save_pretrained`` was given, logits bit for bit
       (tests/distill/test_student.py::test_a_saved_student_comes_back_with_the_same_logits).
    3. A student's directory holds no pickle (same test).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from distill.heads import HeadBank, HeadLayout, mean_probabilities
from distill.skeleton import (
    build_skeleton,
    check_length,
    find_classifier,
    fit_tokenizer,
    load_first_layers,
    load_skeleton,
    load_tokenizer,
    quiet_transformers,
)
from schemas.errors import DataError, RecipeError, ResourceError
from schemas.job import StudentInit
from schemas.model_ref import resolve_model
from schemas.recipe import ConfigInit, LayersInit

_SKELETON_PREFIX = "skeleton."


class MultiHeadStudent(nn.Module):
    """A Hugging Face sequence classifier whose last Linear is a bank of heads.

    Attributes:
        skeleton: The transformers model; its last Linear is the bank.
        layout: Names of heads, labels and prediction heads, and the maximum length.
        tokenizer: The tokenizer of the encoder.
        carried_heads: Heads whose weights came from an earlier stage.
    """

    def __init__(self, skeleton: Any, tokenizer: Any, layout: HeadLayout) -> None:
        """Takes a skeleton whose classification Linear is a ``HeadBank`` of this layout already."""
        super().__init__()
        self.skeleton = skeleton
        self.tokenizer = tokenizer
        self.layout = layout
        self.carried_heads: tuple[str, ...] = ()
        check_length(skeleton, layout.max_length)
        fit_tokenizer(tokenizer, skeleton)
        outputs = [f"{head}/{label}" for head in layout.heads for label in layout.labels]
        skeleton.config.id2label = dict(enumerate(outputs))
        skeleton.config.label2id = {name: index for index, name in enumerate(outputs)}
        skeleton.num_labels = layout.num_outputs

    @classmethod
    def from_init(
        cls,
        init: LayersInit | ConfigInit | StudentInit,
        heads: Sequence[str],
        labels: Sequence[str],
        seed: int,
        *,
        max_length: int = 128,
        prediction_heads: Sequence[str] | None = None,
    ) -> MultiHeadStudent:
        """Builds a student.

        Args:
            init: Where the encoder comes from. With ``StudentInit`` the heads of the same name and
                label names carry on, and the others start fresh.
            heads: H names: ``golden``, teachers, ``average``.
            labels: C label names, in the order of the logits.
            seed: Seed of everything that starts fresh.
            max_length: Longest input in tokens.
            prediction_heads: The heads that predict; by default all.

        Raises:
            RecipeError: The init does not make a model, or its encoder is too short.
            DataError: Weights cannot be read.
            ValueError: Names are not distinct, or a prediction head is no head.
        """
        layout = HeadLayout(
            heads=tuple(heads),
            labels=tuple(labels),
            prediction_heads=tuple(heads if prediction_heads is None else prediction_heads),
            max_length=max_length,
        )
        if isinstance(init, StudentInit):
            return cls.from_pretrained(Path(init.path)).with_layout(layout, seed)
        num_labels = len(layout.labels)
        if isinstance(init, LayersInit):
            tokenizer = load_tokenizer(resolve_model(init.model, field="student.init.model"), init.revision)
            skeleton = load_first_layers(init, num_labels, seed)
        else:
            path = resolve_model(init.tokenizer, field="student.init.tokenizer")
            tokenizer = load_tokenizer(path, init.revision)
            skeleton = build_skeleton(init, tokenizer, num_labels, seed)
        _replace_classifier(skeleton, num_labels, _new_bank(skeleton, num_labels, layout, seed))
        return cls(skeleton, tokenizer, layout)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> MultiHeadStudent:
        """Opens a directory that ``save_pretrained`` wrote, on the CPU in float32, in eval mode.

        Raises:
            DataError: A file is missing, damaged, or does not fit the others.
        """
        path = Path(directory)
        layout = HeadLayout.load(path)
        skeleton = load_skeleton(path)
        try:
            linear = skeleton.get_submodule(find_classifier(skeleton, layout.num_outputs))
            tokenizer = load_tokenizer(str(path))
        except RecipeError as error:
            raise DataError(f"{path}: {error.message}") from error
        bank = HeadBank(linear.in_features, layout, bias=linear.bias is not None)
        bank.load_state_dict(linear.state_dict())
        _replace_classifier(skeleton, layout.num_outputs, bank)
        return cls(skeleton, tokenizer, layout).eval()

    @property
    def bank(self) -> HeadBank:
        """The heads."""
        return next(module for module in self.skeleton.modules() if isinstance(module, HeadBank))

    @property
    def num_parameters(self) -> int:
        """Number of parameters, all heads included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def freeze_embeddings(self) -> None:
        """Takes the token embeddings out of training."""
        self.skeleton.get_input_embeddings().weight.requires_grad_(False)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Returns the raw logits of all heads.

        Args:
            inputs: What the tokenizer returns, ``[B, L]`` each: ``input_ids``, ``attention_mask``, and
                ``token_type_ids`` where the encoder has them (they are ignored where it has none).

        Returns:
            ``logits_BHC``, in the encoder's dtype.
        """
        accepted = {name: value for name, value in inputs.items() if name in self.tokenizer.model_input_names}
        logits_BO = self.skeleton(**accepted).logits
        return logits_BO.view(-1, len(self.layout.heads), len(self.layout.labels))

    def predict_proba(self, logits_BHC: Tensor, prediction_heads: Sequence[str] | None = None) -> Tensor:
        """Returns the mean of the heads' probabilities, ``[B, C]``, float32 at least.

        Args:
            logits_BHC: What ``forward`` returned.
            prediction_heads: Heads to average; by default the layout's.
        """
        names = self.layout.prediction_heads if prediction_heads is None else prediction_heads
        return mean_probabilities(logits_BHC, self.layout.head_indices(names))

    def with_layout(self, layout: HeadLayout, seed: int) -> MultiHeadStudent:
        """Gives the encoder other heads; this student must not be used any more.

        Args:
            layout: The new heads. Those of the same name and label names keep their weights.
            seed: Seed of the others.
        """
        bank = _new_bank(self.skeleton, self.layout.num_outputs, layout, seed)
        carried = bank.carry_over(self.bank, self.layout, layout)
        _replace_classifier(self.skeleton, self.layout.num_outputs, bank)
        student = MultiHeadStudent(self.skeleton, self.tokenizer, layout)
        student.carried_heads = carried
        return student

    def save_pretrained(
        self, directory: str | Path, *, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Writes config.json, model.safetensors, the tokenizer and, last, heads.json.

        Args:
            directory: Made if it is absent.
            state_dict: This module's weights, where they lie elsewhere (gathered from ZeRO-3's
                partitions, or of an earlier step); by default its own.

        Raises:
            ResourceError: The directory cannot be written.
        """
        path = Path(directory)
        weights = self.state_dict() if state_dict is None else state_dict
        inner = {
            key.removeprefix(_SKELETON_PREFIX): value.detach().to("cpu", torch.float32)
            if value.is_floating_point()
            else value.detach().cpu()
            for key, value in weights.items()
        }
        try:
            path.mkdir(parents=True, exist_ok=True)
            with quiet_transformers():
                self.skeleton.save_pretrained(path, state_dict=inner)
                self.tokenizer.save_pretrained(path)
            self.layout.save(path)
        except (OSError, SafetensorError) as error:
            raise ResourceError(f"{path}: the student cannot be written ({error})") from error


def _new_bank(skeleton: Any, num_outputs: int, layout: HeadLayout, seed: int) -> HeadBank:
    linear = skeleton.get_submodule(find_classifier(skeleton, num_outputs))
    bank = HeadBank(linear.in_features, layout, bias=linear.bias is not None)
    bank.initialise(layout, seed=seed, std=getattr(skeleton.config, "initializer_range", None) or 0.02)
    return bank


def _replace_classifier(skeleton: Any, num_outputs: int, bank: HeadBank) -> None:
    skeleton.set_submodule(find_classifier(skeleton, num_outputs), bank)
