"""A loaded teacher: text to tokens, tokens to raw logits.

Shapes: R rows of a shard, B rows of a batch, L tokens of the batch's longest row, C labels.

Invariants (tests/precompute/test_teacher.py):
    1. A batch is padded to its own longest row, on the tokenizer's side.
    2. A checkpoint that lacks any of the model's weights is refused: its logits would be random.
    3. Logits are raw float32 in the model's own label order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from precompute.pretrained import check_length, check_weights, reading_pretrained
from precompute.tasks import WorkerSpec
from schemas.errors import ResourceError, TeacherError

# Rows that one call of the tokenizer gets: bounds the Python lists that it returns.
_TOKENISE_ROWS = 512


@dataclass(frozen=True, slots=True)
class TokenisedRows:
    """Tokens of R rows, one after another.

    Attributes:
        inputs: The model's inputs without the attention mask, each int32 ``[sum of lengths]``.
        offsets: Row i is ``[offsets[i], offsets[i + 1])``; int64 ``[R + 1]``.
    """

    inputs: dict[str, npt.NDArray[np.int32]]
    offsets: npt.NDArray[np.int64]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, ``[R]``."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class LoadedTeacher:
    """A model in evaluation mode on its device, with its fast tokenizer."""

    spec: WorkerSpec
    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, spec: WorkerSpec) -> LoadedTeacher:
        """Loads weights (safetensors only) and tokenizer.

        Raises:
            TeacherError: The directory has no such model, or its checkpoint is no trained classifier.
            ResourceError: The hub cannot be reached.
        """
        name = spec.teacher.name
        with reading_pretrained(name, spec.model_path):
            tokenizer, model, report = _read_pretrained(spec)
        check_weights(report, name, "it is no trained classifier; fine-tune it with a `train:` block")
        _check_tokenizer(tokenizer, model.config, spec)
        return cls(spec, model.to(spec.device).eval(), tokenizer)

    def tokenise(self, texts: Sequence[Sequence[str]]) -> TokenisedRows:
        """Tokenises one or two text columns, truncated and not padded.

        Args:
            texts: Columns, each of R texts.

        Raises:
            TeacherError: The text that may be cut is too short for the row to fit.
        """
        names = [name for name in self.tokenizer.model_input_names if name != "attention_mask"]
        parts: dict[str, list[npt.NDArray[np.int32]]] = {name: [] for name in names}
        lengths: list[int] = []
        for start in range(0, len(texts[0]), _TOKENISE_ROWS):
            encoded = self._encode([column[start : start + _TOKENISE_ROWS] for column in texts])
            lengths += map(len, encoded["input_ids"])
            for name in names:
                parts[name].append(np.fromiter(chain.from_iterable(encoded[name]), np.int32))
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        empty = np.zeros(0, np.int32)
        return TokenisedRows({name: np.concatenate([empty, *parts[name]]) for name in names}, offsets)

    def collate(self, rows: TokenisedRows, indices_B: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """Pads rows to the longest of them.

        Returns:
            The model's inputs, each int64 ``[B, L]``, on the CPU.
        """
        lengths_B1 = rows.lengths[indices_B][:, None]
        longest = int(lengths_B1.max())
        positions_BL = np.arange(longest)[None, :]
        if self.tokenizer.padding_side == "left":
            positions_BL = positions_BL - (longest - lengths_B1)
        mask_BL = (positions_BL >= 0) & (positions_BL < lengths_B1)
        sources_BL = np.where(mask_BL, rows.offsets[indices_B][:, None] + positions_BL, 0)
        batch = {"attention_mask": torch.from_numpy(mask_BL.astype(np.int64))}
        for name, values in rows.inputs.items():
            padded_BL = np.where(mask_BL, values[sources_BL], self._padding(name))
            batch[name] = torch.from_numpy(padded_BL.astype(np.int64))
        return batch

    @torch.inference_mode()
    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Runs the model.

        Args:
            batch: From ``collate``.

        Returns:
            Raw logits, float32 ``[B, C]``, on the model's device.

        Raises:
            ResourceError: The device's memory does not hold the batch.
        """
        device = self.spec.device
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        try:
            return self.model(**inputs).logits.float()
        except torch.cuda.OutOfMemoryError as error:
            shape = "x".join(map(str, batch["input_ids"].shape))
            raise ResourceError(
                f"teacher {self.spec.teacher.name}: a batch of {shape} tokens does not fit into the "
                "GPU's memory; lower tokens_per_batch"
            ) from error

    def _encode(self, texts: Sequence[Sequence[str]]) -> Any:
        teacher = self.spec.teacher
        # A single text has no second one to cut.
        truncation = teacher.truncation if len(texts) > 1 else "longest_first"
        try:
            return self.tokenizer(
                *map(list, texts),
                truncation=truncation,
                max_length=teacher.max_length,
                padding=False,
                return_attention_mask=False,
            )
        except Exception as error:
            # The tokenizers library raises this one as a bare Exception.
            if "Truncation error" not in str(error):
                raise
            raise TeacherError(
                f"truncation {truncation} cannot shorten some row to {teacher.max_length} tokens; "
                "set truncation: longest_first or a larger max_length",
                teacher=teacher.name,
            ) from error

    def _padding(self, name: str) -> int:
        if name == "input_ids":
            return int(self.tokenizer.pad_token_id)
        return int(self.tokenizer.pad_token_type_id) if name == "token_type_ids" else 0


def _read_pretrained(spec: WorkerSpec) -> tuple[Any, Any, dict[str, Any]]:
    teacher = spec.teacher
    source = {"revision": spec.revision, "trust_remote_code": teacher.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(spec.model_path, use_fast=True, **source)
    model, report = AutoModelForSequenceClassification.from_pretrained(
        spec.model_path,
        use_safetensors=True,
        dtype=getattr(torch, teacher.dtype),
        attn_implementation=teacher.attention,
        output_loading_info=True,
        **source,
    )
    return tokenizer, model, report


def _check_tokenizer(tokenizer: Any, config: Any, spec: WorkerSpec) -> None:
    name, max_length = spec.teacher.name, spec.teacher.max_length
    if tokenizer.pad_token_id is None:
        raise TeacherError("its tokenizer has no padding token", teacher=name)
    if getattr(config, "pad_token_id", None) is None:
        # Decoder classifiers find a row's last token by it.
        config.pad_token_id = tokenizer.pad_token_id
    check_length(config, max_length, name)
