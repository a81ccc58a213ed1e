"""A conversation in a tokenizer's chat template, with a loss mask on what the assistant says.

Invariants (tests/precompute/test_chunking.py):
    1. The mask covers each reply and its end mark: not the words that introduce it, nor other roles.
"""

from __future__ import annotations

import json
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt


def encode_conversation(tokenizer: Any, text: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Tokenises a conversation.

    A reply is what the template writes for an assistant's message after all that came before and the
    words that ask for a reply; white space at its end is the template's and does not count.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        text: JSON list of ``{role, content}``.

    Returns:
        ids int32[T], loss mask uint8[T].

    Raises:
        ValueError: The assistant begins; or the template refuses the conversation, or writes its start in
            another way when it goes on, so that replies cannot be found.
    """
    messages = json.loads(text)
    whole = _render(tokenizer, messages)
    replies = []
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not position:
            raise ValueError("it begins with the assistant, so that nothing asks for the first reply")
        before = _render(tokenizer, messages[:position], ask=True)
        after = _render(tokenizer, messages[: position + 1])
        if not after.startswith(before) or not whole.startswith(after.rstrip()):
            raise ValueError(
                f"the chat template writes the start of message {position} in another way once the "
                "conversation goes on, so that the reply cannot be told from the rest"
            )
        replies.append((len(before), len(after.rstrip())))
    encoded = tokenizer(
        whole,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    spans = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    starts, stops = spans[:, 0], spans[:, 1]
    mask: npt.NDArray[np.uint8] = np.zeros(len(spans), np.uint8)
    for start, stop in replies:
        mask[(starts >= start) & (starts < stop) & (stops > starts)] = 1
    return np.array(encoded["input_ids"], np.int32), mask


def _render(tokenizer: Any, messages: list[dict[str, str]], *, ask: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses it ({error})") from error
