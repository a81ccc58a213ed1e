"""A loaded language model: batches of chunks to hidden states, hidden states to logits in pieces.

Shapes: B chunks of a batch, L tokens of the longest, N positions of a piece, D hidden size, V true
vocabulary, W >= V the model's padded one.

The output head is the model's own ``forward`` round hidden states that are computed already, so that its
scaling, soft cap, transform and bias are what they are in the model, whatever its architecture.

Invariants (tests/precompute/test_language_teacher.py):
    1. The head over pieces gives what the whole model gives; a model of which that is not true is
       refused when it is loaded.
    2. No ``[tokens, W]`` tensor is made.
    3. A checkpoint that lacks weights, or a model with fewer logits than V, is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from precompute.pretrained import check_weights, reading_pretrained
from precompute.tasks import LanguageWorkerSpec
from schemas.errors import ResourceError, TeacherError

_CLASSES = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}
# Tokens of the trial of the head when a model is loaded.
_NUM_TRIAL_TOKENS = 4


@dataclass(frozen=True)
class LoadedLanguageModel:
    """A model in evaluation mode on its device or devices.

    Attributes:
        spec: What it was loaded by.
        model: A causal or masked language model of transformers.
        num_logits: W.
    """

    spec: LanguageWorkerSpec
    model: Any
    num_logits: int

    @classmethod
    def load(cls, spec: LanguageWorkerSpec) -> LoadedLanguageModel:
        """Loads weights (safetensors, or one GGUF file) and tries the head.

        Raises:
            TeacherError: The directory has no such model, its checkpoint lacks weights, it has fewer
                logits than the vocabulary, or its head cannot be run by itself.
            ResourceError: The hub cannot be reached, or the device's memory does not hold the model.
        """
        name = spec.teacher.name
        with reading_pretrained(name, spec.model_path), _device_memory(name, "its weights do"):
            model, report = _read_pretrained(spec)
            if spec.teacher.device_map is None:
                model = model.to(spec.device)
        advice = f"it is no trained {spec.objective} language model; see the recipe's objective"
        check_weights(report, name, advice)
        # Keys and values are of no use: nothing is generated.
        model.config.use_cache = False
        loaded = cls(spec, model.eval(), _try_head(model, name))
        if loaded.num_logits < spec.vocab:
            raise TeacherError(
                f"it gives {loaded.num_logits} logits, the chunks' tokenizer has {spec.vocab} tokens: they "
                "do not belong together; name a model with its own tokenizer",
                teacher=name,
            )
        return loaded

    @property
    def padding_token(self) -> int:
        """What fills a batch; attention leaves it out."""
        token = int(getattr(self.model.config, "pad_token_id", None) or 0)
        # Some configurations name one that was never given an embedding.
        return token if 0 <= token < self.model.get_input_embeddings().weight.shape[0] else 0

    @torch.inference_mode()
    def encode(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Any:
        """Runs the model without its head.

        Args:
            input_ids_BL: int64, padded on the right.
            attention_mask_BL: int64, 0 for padding.

        Returns:
            The base model's output, ``last_hidden_state`` float[B, L, D], for ``predict``.

        Raises:
            ResourceError: The device's memory does not hold the batch.
        """
        shape = "x".join(map(str, input_ids_BL.shape))
        device = self.model.get_input_embeddings().weight.device
        with _device_memory(self.spec.teacher.name, f"a batch of {shape} tokens does"):
            return _run_base(self.model, input_ids_BL.to(device), attention_mask_BL.to(device))

    @torch.inference_mode()
    def predict(self, output: Any, hidden_ND: Tensor) -> Tensor:
        """Runs the head over some positions.

        Args:
            output: Of ``encode``.
            hidden_ND: Rows of its ``last_hidden_state``.

        Returns:
            Logits in the model's dtype, ``[N, W]``.

        Raises:
            ResourceError: The device's memory does not hold them.
        """
        with _device_memory(self.spec.teacher.name, f"the logits of {len(hidden_ND)} positions do"):
            return _run_head(self.model, output, hidden_ND)


@contextmanager
def _device_memory(teacher: str, what: str) -> Iterator[None]:
    """Tells what does not fit into the GPU's memory."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise ResourceError(
            f"teacher {teacher}: {what} not fit into the GPU's memory; lower tokens_per_batch or "
            "chunk_positions, or give the actor more GPUs"
        ) from error


def _read_pretrained(spec: LanguageWorkerSpec) -> tuple[Any, dict[str, Any]]:
    teacher = spec.teacher
    options: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": teacher.trust_remote_code}
    if teacher.gguf_file is None:
        options["use_safetensors"] = True
    else:
        options["gguf_file"] = teacher.gguf_file
    if teacher.device_map is not None:
        options["device_map"] = teacher.device_map
    model, report = _CLASSES[spec.objective].from_pretrained(
        spec.model_path,
        dtype=getattr(torch, teacher.dtype),
        attn_implementation=teacher.attention,
        output_loading_info=True,
        **options,
    )
    return model, report


def _run_base(model: Any, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Any:
    return model.base_model(input_ids=input_ids_BL, attention_mask=attention_mask_BL, return_dict=True)


def _run_head(model: Any, output: Any, hidden_ND: Tensor) -> Tensor:
    """Runs the model's ``forward`` with its base model answering ``hidden_ND``."""
    known = type(output)(last_hidden_state=hidden_ND[None])
    ids_BN = torch.zeros(1, len(hidden_ND), dtype=torch.int64, device=hidden_ND.device)
    with ExitStack() as stack:
        # Some architectures call their decoder past the base model.
        for module in {model.base_model, *_find_decoder(model)}:
            stack.enter_context(_answering(module, known))
        return model(input_ids=ids_BN, return_dict=True).logits[0]


def _find_decoder(model: Any) -> list[Any]:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    # ``decoder`` is also a name for the last Linear of some heads.
    return [decoder] if isinstance(decoder, PreTrainedModel) and decoder is not model else []


@contextmanager
def _answering(module: Any, known: Any) -> Iterator[None]:
    """Lets a module answer what is known already."""
    # Of the instance: accelerate puts a forward there that moves tensors between devices.
    own = module.__dict__.get("forward")
    module.forward = lambda *_args, **_options: known
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@torch.inference_mode()
def _try_head(model: Any, teacher: str) -> int:
    """Compares head after base model with the whole model on a few tokens.

    Returns:
        W.

    Raises:
        TeacherError: They differ.
    """
    refusal = "its output head cannot be run apart from the model: this architecture is not supported"
    if model.base_model is model:
        raise TeacherError(refusal, teacher=teacher)
    device = model.get_input_embeddings().weight.device
    # Small ids, but not only one: position and padding must not matter.
    ids_BL = torch.arange(1, 1 + _NUM_TRIAL_TOKENS, device=device)[None]
    mask_BL = torch.ones_like(ids_BL)
    whole_LW = model(input_ids=ids_BL, attention_mask=mask_BL, return_dict=True).logits[0]
    output = _run_base(model, ids_BL, mask_BL)
    pieces = [_run_head(model, output, part_ND) for part_ND in output.last_hidden_state[0].split(2)]
    apart_LW = torch.cat(pieces)
    scale = max(1.0, float(whole_LW.float().abs().max()))
    tolerance = scale * 16 * torch.finfo(whole_LW.dtype).eps * whole_LW.shape[0]
    if apart_LW.shape != whole_LW.shape or not bool(
        ((apart_LW.float() - whole_LW.float()).nan_to_num().abs() <= tolerance).all()
    ):
        raise TeacherError(refusal, teacher=teacher)
    return int(whole_LW.shape[-1])
