"""The student of language models: a transformers model whose output head computes the losses itself.

Shapes: B sequences, L tokens, N positions to predict from, D hidden size, V true vocabulary.

The model runs as its authors wrote it up to the head's input, which a tap in the head's place catches.
The head is a module of its own, called once a pass with the wanted positions: under ZeRO-3 it is gathered
once, and no logits of a whole batch exist.

Invariants (tests/distill/test_language_student.py):
    1. Losses are those of the plain model's logits.
    2. Rows of a pack do not see each other, or the model is refused when it is opened.
    3. What ``save_pretrained`` writes opens in plain transformers with the same logits.
    4. A tokenizer or a vocabulary that is not the job's is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from distill.fused_head import FusedLosses, fused_losses
from distill.head_form import HeadForm
from distill.language_model import build_language_model, load_language_tokenizer
from distill.packing import PackedTokens, block_mask
from distill.skeleton import check_length, quiet_transformers
from distill.stored_targets import StoredTargets
from distill.token_losses import LossSpec
from schemas.errors import RecipeError, RefusedError, ResourceError
from schemas.job import LanguageJob
from schemas.language import Objective
from schemas.tokenizer_hash import hash_tokenizer

_MODEL_PREFIX, _HEAD_PREFIX = "model.", "head."
_PROBE_LENGTHS = (3, 5)
# Of float32 logits; a leak or another form of the head moves them by their own size.
_PROBE_TOLERANCE = 1e-3


class FusedHead(nn.Module):
    """An output head that returns losses in place of logits; weight and bias are another Linear's own."""

    def __init__(self, linear: nn.Linear, form: HeadForm) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.form = form

    def forward(
        self, hidden_ND: Tensor, targets: Sequence[StoredTargets] | None, spec: LossSpec | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor] | Tensor:
        """Returns the fields of ``FusedLosses``, or without targets the logits."""
        if targets is None or spec is None:
            logits_NV = nn.functional.linear(hidden_ND, self.weight, self.bias) * self.form.scale
            cap = self.form.soft_cap
            return logits_NV if cap is None else (logits_NV / cap).tanh() * cap
        found = fused_losses(hidden_ND, self.weight, self.bias, targets, spec, self.form)
        return found.total, found.terms_LN, found.top_log_prob_N, found.hits_N


class _Tap(nn.Module):
    """Stands where the head was and keeps what it would have got."""

    def __init__(self) -> None:
        super().__init__()
        self._hidden: Tensor | None = None

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        self._hidden = hidden_BLD
        # Whatever the model does to logits, it does to next to nothing.
        return hidden_BLD[..., :1]

    def take(self) -> Tensor:
        """Returns what came last and forgets it."""
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            raise ValueError("the model did not call its output head")
        return hidden


class LanguageStudent(nn.Module):
    """A language model in training.

    Attributes:
        model: The transformers model, a tap in its head's place.
        head: Its head.
        tokenizer: Its tokenizer, saved with it.
        objective: ``causal`` or ``masked``.
    """

    def __init__(self, model: Any, tokenizer: Any, objective: Objective) -> None:
        """Takes a model from ``build_language_model`` apart.

        Raises:
            RecipeError: Its logits are not those of one Linear, with a factor and a soft cap, or masked
                layers see a window of tokens.
        """
        super().__init__()
        linear = model.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise RecipeError(
                f"{type(model).__name__} has no Linear as its output head", field="student.init"
            )
        kinds = getattr(model.config, "layer_types", None) or ()
        if objective == "masked" and "sliding_attention" in kinds:
            # A mask of blocks takes the place of the window's, and a short probe does not tell.
            raise RecipeError(
                f"some layers of a {model.config.model_type} see a window of tokens, which packing does not "
                "keep to; choose another architecture",
                field="student.init",
            )
        self.model = model
        self.tokenizer = tokenizer
        self.objective: Objective = objective
        self._inputs = set(inspect.signature(model.forward).parameters)
        self._first_position = _first_position(model)
        self._head_name = next(name for name, module in model.named_modules() if module is linear)
        probe = _probe_ids(linear.out_features, model.config.pad_token_id)
        expected = self._plain_logits(probe)
        self._tap = _Tap()
        model.set_submodule(self._head_name, self._tap)
        self.head = FusedHead(linear, _head_form(model.config))
        self._linear = [linear]
        self._check_form(probe, expected)

    @classmethod
    def from_job(cls, job: LanguageJob) -> LanguageStudent:
        """Builds a job's student and checks that it fits the job.

        Raises:
            RecipeError: The init makes no student, or rows would see each other in a pack.
            RefusedError: Its tokenizer or vocabulary is not the chunks'.
            DataError: Weights cannot be read.
        """
        tokenizer = load_language_tokenizer(job.init)
        found = hash_tokenizer(tokenizer.backend_tokenizer.to_str())
        if found != job.tokenizer:
            raise RefusedError(
                "the student has another tokenizer than the teachers and the chunks; take the teachers' "
                "(aligning tokenizers is not supported)",
                differing=(f"tokenizer: {job.tokenizer[:16]} -> {found[:16]}",),
            )
        model = build_language_model(job.init, job.objective, tokenizer, job.seed)
        check_length(model, job.max_length)
        student = cls(model, tokenizer, job.objective)
        if student.head.weight.shape[0] < job.vocab:
            raise RefusedError(
                f"the student has {student.head.weight.shape[0]} tokens in its vocabulary, "
                f"the teachers have {job.vocab}; leave vocab_size out of student.init",
                differing=(f"vocab: {job.vocab} -> {student.head.weight.shape[0]}",),
            )
        if job.training.freeze_embeddings:
            model.get_input_embeddings().weight.requires_grad_(False)
        student.check_packing()
        return student

    @property
    def pad_id(self) -> int:
        """Token of padding; any will do, since nothing sees it."""
        for name in ("pad_token_id", "eos_token_id"):
            token = getattr(self.tokenizer, name)
            if token is not None:
                return int(token)
        return 0

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        input_ids_BL: Tensor,
        positions_BL: Tensor,
        segments_BL: Tensor,
        places_N: Tensor,
        targets: Sequence[StoredTargets],
        spec: LossSpec,
    ) -> tuple[Tensor, ...]:
        """Returns the fields of ``FusedLosses``.

        Args:
            input_ids_BL: Tokens.
            positions_BL: See ``distill.packing.PackedTokens``.
            segments_BL: Likewise.
            places_N: Of each position to predict from its place in the flattened sequences.
            targets: One per teacher; N positions each.
            spec: The losses.
        """
        hidden_BLD = self.encode(input_ids_BL, positions_BL, segments_BL)
        hidden_ND = hidden_BLD.flatten(0, 1).index_select(0, places_N)
        found: tuple[Tensor, ...] = self.head(hidden_ND, tuple(targets), spec)
        return found

    def encode(self, input_ids_BL: Tensor, positions_BL: Tensor, segments_BL: Tensor) -> Tensor:
        """Returns what the head gets, float[B, L, D]; arguments as for ``forward``."""
        inputs: dict[str, Any] = {
            "input_ids": input_ids_BL,
            "position_ids": positions_BL + self._first_position,
            "use_cache": False,
        }
        if self.objective == "masked":
            dtype = self.model.get_input_embeddings().weight.dtype
            inputs["attention_mask"] = block_mask(segments_BL, dtype)
        self.model(**{name: value for name, value in inputs.items() if name in self._inputs})
        return self._tap.take()

    @torch.no_grad()
    def logits(self, input_ids_BL: Tensor, positions_BL: Tensor, segments_BL: Tensor) -> Tensor:
        """Returns ``[B, L, V]`` logits; for tests and small inputs."""
        found: Tensor = self.head(self.encode(input_ids_BL, positions_BL, segments_BL), None, None)
        return found

    @torch.no_grad()
    def check_packing(self) -> None:
        """Checks that the model keeps the rows of a pack apart.

        Raises:
            RecipeError: It does not.
        """
        was_training = self.training
        self.eval()
        ids = _probe_ids(self.head.weight.shape[0], self.model.config.pad_token_id)
        together = self.logits(*_one_pack(ids, _PROBE_LENGTHS))[0]
        alone = [self.logits(*_one_pack(piece, (len(piece),)))[0] for piece in ids.split(_PROBE_LENGTHS)]
        self.train(was_training)
        if not _is_close(together, torch.cat(alone)):
            raise RecipeError(
                f"the rows of a pack see each other in a {self.model.config.model_type}; choose another "
                "architecture",
                field="student.init",
            )

    def save_pretrained(
        self, directory: str | Path, *, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Writes config.json, model.safetensors and the tokenizer, as plain transformers reads them.

        Args:
            directory: Made if it is absent.
            state_dict: This module's weights, where they lie elsewhere; by default its own.

        Raises:
            ResourceError: The directory cannot be written.
        """
        weights = self.state_dict() if state_dict is None else state_dict
        self.model.set_submodule(self._head_name, self._linear[0])
        try:
            inner = self._plain_weights(weights)
            Path(directory).mkdir(parents=True, exist_ok=True)
            with quiet_transformers():
                self.model.save_pretrained(directory, state_dict=inner)
                self.tokenizer.save_pretrained(directory)
        except (OSError, SafetensorError) as error:
            raise ResourceError(f"{directory}: the student cannot be written ({error})") from error
        finally:
            self.model.set_submodule(self._head_name, self._tap)

    def _plain_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Renames weights to the plain model's names; of tied ones the first name stays."""
        named = {}
        for name, value in weights.items():
            if name.startswith(_HEAD_PREFIX):
                named[f"{self._head_name}.{name.removeprefix(_HEAD_PREFIX)}"] = value
            else:
                named[name.removeprefix(_MODEL_PREFIX)] = value
        everything = dict(self.model.named_parameters(remove_duplicate=False))
        tied = set(everything) - {name for name, _ in self.model.named_parameters()}
        return {
            name: (value.float() if value.is_floating_point() else value).detach().cpu()
            for name, value in named.items()
            if name not in tied
        }

    @torch.no_grad()
    def _plain_logits(self, ids: Tensor) -> Tensor:
        training = self.model.training
        self.model.eval()
        logits: Tensor = self.model(input_ids=ids[None]).logits[0]
        self.model.train(training)
        return logits

    def _check_form(self, ids: Tensor, expected: Tensor) -> None:
        training = self.training
        self.eval()
        try:
            found: Tensor | None = self.logits(*_one_pack(ids, (len(ids),)))[0]
        except AttributeError:
            # Mamba looks at its head's weight, and a tap has none.
            found = None
        self.train(training)
        if found is None or not _is_close(found, expected):
            raise RecipeError(
                f"a {self.model.config.model_type} makes its logits in a way that is not known here; choose "
                "another architecture",
                field="student.init",
            )


def as_losses(fields: tuple[Any, ...]) -> FusedLosses:
    """Returns what ``LanguageStudent.forward`` returned, by name."""
    return FusedLosses(*fields)


def _head_form(config: Any) -> HeadForm:
    """Reads how a model makes logits of its head's outputs; ``LanguageStudent`` checks it."""
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return HeadForm(scale=scale / divisor, soft_cap=getattr(config, "final_logit_softcapping", None))


def _first_position(model: Any) -> int:
    """Returns the position id of a sequence's first token: RoBERTa counts from the padding index + 1."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else int(module.padding_idx) + 1
    return 0


def _probe_ids(vocab: int, padding: int | None) -> Tensor:
    ids = (torch.arange(sum(_PROBE_LENGTHS)) * 7 + 5) % vocab
    # RoBERTa counts no position for padding.
    return ids if padding is None else torch.where(ids == padding, (padding + 1) % vocab, ids)


def _one_pack(ids: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    sizes = torch.tensor(lengths).numpy()
    laid = PackedTokens.lay_out(sizes, torch.tensor([0, len(lengths)]).numpy())
    return ids[None], torch.from_numpy(laid.positions_BL), torch.from_numpy(laid.segments_BL)


def _is_close(found: Tensor, expected: Tensor) -> bool:
    size = float(expected.abs().max().clamp(min=1e-6))
    return bool((found - expected).abs().max() <= _PROBE_TOLERANCE * size)
