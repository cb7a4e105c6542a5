"""A text is what the model writes by itself, up to where the task wants it to end."""

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from infformer.errors import UserError
from infformer.harness import generation
from infformer.harness.generation import GenerationOptions, write_text
from infformer.models.generation import continue_text

SEGMENT = 8


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({}, GenerationOptions((), 256, 0.0)),
        ({"until": ["\n", "Q:"]}, GenerationOptions(("\n", "Q:"), 256, 0.0)),
        ({"until": "\n\n", "max_gen_toks": 32}, GenerationOptions(("\n\n",), 32, 0.0)),
        ({"until": ["", "."], "max_new_tokens": 5}, GenerationOptions((".",), 5, 0.0)),
        ({"max_tokens": 7, "max_gen_toks": 3}, GenerationOptions((), 3, 0.0)),
        ({"temperature": 0.7}, GenerationOptions((), 256, 0.7)),
        ({"do_sample": False, "temperature": 0.7, "top_p": 1.0, "num_beams": 1}, GenerationOptions((), 256, 0.0)),
        ({"do_sample": True}, GenerationOptions((), 256, 1.0)),
        ({"do_sample": True, "temperature": 0.2}, GenerationOptions((), 256, 0.2)),
    ],
)
def test_what_a_task_says_is_understood(asked, options):
    assert GenerationOptions.from_request(asked) == options


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_beams": 4}, "gen_kwargs num_beams=4.*--gen_kwargs num_beams=1"),
        ({"do_sample": True, "top_p": 0.9}, "gen_kwargs top_p=0.9.*--gen_kwargs top_p=1"),
        ({"min_p": 0.1}, "gen_kwargs min_p=0.1.*take the option out"),
        ({"max_gen_toks": 0}, "gen_kwargs max_gen_toks=0.*at least 1"),
        ({"temperature": -1.0}, "gen_kwargs temperature=-1.0.*give 0"),
    ],
)
def test_what_a_model_cannot_do_is_refused(asked, message):
    with pytest.raises(UserError, match=message):
        GenerationOptions.from_request(asked)


@pytest.mark.parametrize("kind", ["memory", "decoder", "none"])
def test_a_long_prompt_is_continued(evaluator, tokenizer, kind):
    one, prompt = evaluator(kind), tokenizer.encode("under the white whale, the sea")
    written = continue_text(one.model, torch.tensor(prompt), 20, SEGMENT, temperature=0).tolist()
    assert 0 not in written  # which would end it
    text = tokenizer.decode(written)
    assert write_text(one, tokenizer, prompt, GenerationOptions((), 20)) == text
    stop = text[7:9]
    assert write_text(one, tokenizer, prompt, GenerationOptions((stop,), 20)) == text[: text.index(stop)]


@pytest.fixture
def written(monkeypatch, evaluator, tokenizer) -> Callable[..., str]:
    """What comes of a text that the model is about to write; it is an error to ask for more than that."""

    def write(text: str, options: GenerationOptions, tokenizer: PreTrainedTokenizerFast = tokenizer) -> str:
        def sample(*arguments: object) -> Iterator[int]:
            yield from tokenizer.encode(text)
            raise AssertionError("asked for more")

        monkeypatch.setattr(generation, "sample_tokens", sample)
        return write_text(evaluator(), tokenizer, [1], options)

    return write


@pytest.mark.parametrize(
    ("text", "until", "expected"),
    [
        ("blue sea\n", ["\n"], "blue sea"),
        ("blue seaQ:", ["Answer", "Q:"], "blue sea"),
        ("\n", ["\n"], ""),
        ("blue sea<s>", ["\n"], "blue sea"),  # the end of a text, which is no part of it
        ("blue sea<s>", [], "blue sea"),
    ],
)
def test_a_text_ends_where_the_task_says(written, text, until, expected):
    assert written(text, GenerationOptions(tuple(until))) == expected


def test_a_text_ends_after_so_many_tokens(written):
    assert written("blue", GenerationOptions((), max_tokens=4)) == "blue"


def test_a_text_ends_at_a_special_token_that_the_task_names(written, tokenizer):
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="x")
    assert written("blue<s>", GenerationOptions(("<s>",)), other) == "blue"
