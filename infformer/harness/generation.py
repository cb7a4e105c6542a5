"""Text that a task lets a model write: until a stop string, or for so many tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

import torch
from transformers import PreTrainedTokenizerBase

from infformer.errors import UserError
from infformer.evaluation.streaming import Evaluator
from infformer.models.generation import read_text, sample_tokens
from infformer.models.streaming import reading

MOST_TOKENS = 256
"""Where a task does not say; the same as the harness's own models."""

_NAMES_OF_MOST_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_WITHOUT_EFFECT = {"top_p": 1, "top_k": 0, "num_beams": 1, "repetition_penalty": 1}


@dataclass(frozen=True)
class GenerationOptions:
    """How a text is written.

    Args:
        until: strings before which it ends.
        max_tokens: after which it ends.
        temperature: 0 takes the most likely token every time.
    """

    until: tuple[str, ...] = ()
    max_tokens: int = MOST_TOKENS
    temperature: float = 0.0

    @classmethod
    def from_request(cls, asked: Mapping[str, Any]) -> Self:
        """From a task's `generation_kwargs`, by the harness's conventions: greedy unless it says otherwise.

        Raises:
            UserError: an option that is not known here and would make another text, or a value that cannot be.
        """
        options = dict(asked)
        until = options.pop("until", None) or []
        sample = options.pop("do_sample", None)
        temperature = options.pop("temperature", None)
        lengths = [options.pop(name, None) for name in _NAMES_OF_MOST_TOKENS]
        for name, value in options.items():
            if name not in _WITHOUT_EFFECT:
                raise UserError(
                    f"gen_kwargs {name}={value}: this model knows until, max_gen_toks, do_sample and temperature; "
                    "take the option out of the task"
                )
            if value != _WITHOUT_EFFECT[name]:
                raise UserError(
                    f"gen_kwargs {name}={value}: this model takes the most likely token or samples from all of them; "
                    f"to measure it on this task all the same add --gen_kwargs {name}={_WITHOUT_EFFECT[name]}"
                )
        if temperature is None:
            temperature = 1.0 if sample else 0.0
        if sample is False:
            temperature = 0.0
        if not temperature >= 0:
            raise UserError(f"gen_kwargs temperature={temperature}: give 0 for the most likely tokens, or more")
        max_tokens = next((length for length in lengths if length is not None), MOST_TOKENS)
        if max_tokens < 1:
            raise UserError(f"gen_kwargs max_gen_toks={max_tokens}: let the model write at least 1 token")
        # Some tasks have an empty string among them, which is in every text.
        stops = [until] if isinstance(until, str) else until
        return cls(tuple(stop for stop in stops if stop), max_tokens, temperature)


def write_text(
    evaluator: Evaluator, tokenizer: PreTrainedTokenizerBase, prompt: list[int], options: GenerationOptions
) -> str:
    """What the model writes after a prompt, up to a stop string or the token that ends a text, without either.

    The model is left in evaluation mode.

    Args:
        evaluator: its model and protocol are used.
        prompt: token ids, at least one, as many as there are; whole segments are read into memory.
    """
    model, protocol = evaluator.model, evaluator.protocol
    special = [stop for stop in options.until if stop in tokenizer.all_special_tokens]  # which are not decoded
    ends = {tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(stop) for stop in special)}
    tokens: list[int] = []
    text = ""
    with reading(model, protocol.precision):
        read = read_text(model, torch.tensor(prompt), protocol.segment_length)
        sampled = sample_tokens(model, read, protocol.segment_length, options.temperature)
        for token in islice(sampled, options.max_tokens):
            if token in ends:
                break
            tokens.append(token)
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
            if any(stop in text for stop in options.until):
                break
    for stop in options.until:
        text = text.split(stop)[0]
    return text
