"""A text is read once, kept in a file, and gone on from as often as anybody asks."""

from __future__ import annotations

import copy
import gzip
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from infformer.commands.generate import quoted
from infformer.config import CONF, GenerationRunConfig
from infformer.errors import UserError
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models.document_classifier import DocumentClassifier, HeadConfig
from infformer.models.generation import read_text, sample_tokens
from infformer.models.pretrained import InfformerForCausalLM
from infformer.models.read_files import load_read_text, save_read_text
from infformer.training.command_line import compose

ROOT = Path(__file__).parents[1]
SEGMENT, TEXT = 16, "The white whale rose, and nobody on board had ever seen it before. " * 5


@pytest.fixture(scope="module")
def checkpoint(backbone, tokenizer, tmp_path_factory) -> str:
    """A small model whose memory decides on what it writes, with its tokenizer."""
    torch.manual_seed(0)  # whatever tests came before
    folder = tmp_path_factory.mktemp("checkpoint")
    memory = LongTermMemoryConfig(basis_functions=8, past_samples=16)
    model = InfformerForCausalLM.from_backbone(copy.deepcopy(backbone), memory, segment_length=SEGMENT)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.6)
    for parameter in model.memory_parameters():
        nn.init.normal_(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def generate(checkpoint, capsys):
    """What the command prints with these options."""
    from infformer.commands.generate import run

    def print_text(**options: object) -> str:
        run(GenerationRunConfig(checkpoint=checkpoint, **{"tokens": 12, **options}))
        return capsys.readouterr().out

    return print_text


def test_a_document_and_a_prompt_are_one_text(generate, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    both = generate(document=f"{tmp_path}/book.txt", prompt="Then")
    assert both == generate(prompt=f"{TEXT}Then")
    assert both != generate(prompt="Then")
    assert both != generate(prompt=f"{TEXT}Then", seed=1)


def test_a_text_begins_with_the_token_that_documents_begin_with_in_training(generate, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    options = [{"prompt": "Then"}, {"document": f"{tmp_path}/book.txt"}]
    for option, text in zip(options, ["Then", TEXT], strict=True):
        begun = generate(**option)
        assert begun == generate(prompt=f"<s>{text}", beginning_of_document=False)
        assert begun != generate(**option, beginning_of_document=False)


def test_a_document_may_be_compressed(generate, tmp_path):
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    assert generate(document=f"{tmp_path}/book.txt.gz") == generate(prompt=TEXT)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("books.jsonl", b'{"text": "Call me"}', "this holds records"),
        ("book.txt", b" \n", "the file is empty"),
        ("book.txt", b"", "the file is empty"),
        ("book.txt", b"caf\xe9", "not UTF-8 at byte 3"),
        ("book.txt", None, "there is no such file"),
    ],
)
def test_a_document_that_is_no_text_is_refused_by_its_name(generate, tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"document={tmp_path}/{name}\b.*{says}"):
        generate(document=f"{tmp_path}/{name}")


def test_a_classifier_writes_no_text(checkpoint, tokenizer, tmp_path):
    from infformer.commands.generate import run

    reader = InfformerForCausalLM.from_pretrained(checkpoint)
    DocumentClassifier.on_top(reader, HeadConfig("plain"), ["bad", "good"]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a classifier writes no text; give the language model"):
        run(GenerationRunConfig(checkpoint=str(tmp_path), prompt="Hi"))


def test_a_text_that_goes_on_does_not_begin_anew(generate, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    generate(document=f"{tmp_path}/book.txt", save_state=f"{tmp_path}/read.safetensors")
    assert generate(state=f"{tmp_path}/read.safetensors", prompt="Then") == generate(prompt=f"{TEXT}Then")


def test_the_command_writes_and_ends(checkpoint, monkeypatch, capsys):
    from infformer.commands.generate import main

    typed = [f"checkpoint={checkpoint}", "prompt='The white whale'", "tokens=3"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *typed])
    main()
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    "prompt",
    [
        "It was, and was not",
        "It's dark",
        'Say "no" (or not)',
        "a=b: {c}",
        "1e3",
        'a \\"b\\',
        "${x}",
        '"Come in," he said, "now."',
        "'Tis late,' said he, 'tis'",
    ],
)
def test_a_prompt_is_taken_as_it_is_typed(prompt):
    overrides = [quoted(f"prompt={prompt}"), "checkpoint=somewhere"]
    composed = compose("generate", GenerationRunConfig, CONF, overrides)
    assert composed.prompt == prompt


@pytest.mark.parametrize("typed", ['prompt="a, b"', "prompt='a, b'", "prompt=null", "tokens=3", "prompt"])
def test_what_is_quoted_already_or_no_prompt_stays_as_it_is(typed):
    assert quoted(typed) == typed


def test_what_is_remembered_is_told_also_where_it_is_little(generate, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "book.txt").write_text(TEXT)
    generate(document=f"{tmp_path}/book.txt", tokens=0)
    assert re.search(r"what is remembered of them takes [1-9]\S* (bytes|kB)$", caplog.text, re.MULTILINE)


def test_what_was_read_is_asked_again_without_reading_it(generate, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    file = f"{tmp_path}/read.safetensors"
    first = generate(document=f"{tmp_path}/book.txt", save_state=file, prompt="Then")
    (tmp_path / "book.txt").unlink()
    assert generate(state=file, prompt="Then") == first
    assert generate(state=file, prompt="Now") != first
    assert generate(state=file, prompt="Then", tokens=0) == ""


def test_a_place_where_nothing_can_be_kept_is_refused_before_a_document_is_read(generate, tmp_path, monkeypatch):
    from infformer.commands import generate as command

    (tmp_path / "book.txt").write_text(TEXT)
    monkeypatch.setattr(command, "read_text", None)
    with pytest.raises(UserError, match=r"save_state=.*book.txt: nothing can be written there"):
        generate(document=f"{tmp_path}/book.txt", save_state=f"{tmp_path}/book.txt/read.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1, 40), (16, 32), (5, 17, 33, 34)])
def test_it_does_not_matter_in_how_many_pieces_a_text_comes(checkpoint, cuts):
    model = InfformerForCausalLM.from_pretrained(checkpoint).eval()
    tokens = torch.randint(200, (50,), generator=torch.Generator().manual_seed(0))
    whole, read = read_text(model, tokens, SEGMENT), None
    for piece in tokens.tensor_split(cuts):
        read = read_text(model, piece, SEGMENT, read)
    assert torch.equal(read.unfinished, whole.unfinished)
    for name, tensor in whole.state.named_tensors().items():
        assert torch.equal(tensor, read.state.named_tensors()[name])


@torch.no_grad()
def test_the_likeliest_tokens_alone_are_sampled_where_asked_for(checkpoint):
    model = InfformerForCausalLM.from_pretrained(checkpoint).eval()
    read = read_text(model, torch.arange(1, 40), SEGMENT)
    greedy = next(sample_tokens(model, read, SEGMENT, temperature=0))
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert {next(sample_tokens(model, read, SEGMENT, **options)) for _ in range(5)} == {greedy}
    assert len({next(sample_tokens(model, read, SEGMENT, temperature=10.0)) for _ in range(20)}) > 1


def test_a_state_of_another_model_or_memory_is_refused(checkpoint, tmp_path):
    model = InfformerForCausalLM.from_pretrained(checkpoint).eval()
    read = read_text(model, torch.arange(1, 40), SEGMENT)
    save_read_text(read, model, tmp_path / "read.safetensors")
    with torch.no_grad():
        next(model.memory_parameters()).add_(1e-3)
    with pytest.raises(UserError, match=r"state=.*: another model, or one with another memory, read this"):
        load_read_text(model, tmp_path / "read.safetensors")
    (tmp_path / "read.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"state=.*: no state can be read there"):
        load_read_text(model, tmp_path / "read.safetensors")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give a text to go on from"),
        (["prompt="], "prompt=: give one"),
        (["prompt=a", "save_state=x"], "save_state=x: there is nothing to keep; give document="),
        (["prompt=a", "top_p=0"], "top_p=0.0: a probability"),
        (["prompt=a", "temperature=-1"], "temperature=-1.0: must be at least 0"),
        (["prompt=a", "tokens=many"], "must be a whole number"),
        (["prompt=a", "temprature=1"], "did you mean temperature"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_loaded(options, said):
    with pytest.raises(UserError, match=said):
        compose("generate", GenerationRunConfig, CONF, ["checkpoint=nowhere", *options])


def test_what_the_page_shows_of_writing_after_a_book_runs(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "tiny" / "checkpoints").mkdir(parents=True)
    (tmp_path / "outputs" / "tiny" / "checkpoints" / "best").symlink_to(checkpoint)
    (tmp_path / "book.txt").write_text(TEXT)
    page = (ROOT / "docs" / "any_model.md").read_text(encoding="utf-8")
    section = page.split("\n## Reading a book, then writing\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(code, {})
    assert "The whale, which nobody" in capsys.readouterr().out
