"""What is taken out of a checkpoint is a whole folder that others can open, or nothing and a sentence."""

from __future__ import annotations

import copy
import re
import shlex
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from infformer import hub
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models.loading import new_decoder
from infformer.models.memories import attach_memories
from infformer.models.pretrained import InfformerForCausalLM

ROOT = Path(__file__).parents[1]
MEMORY = LongTermMemoryConfig(basis_functions=8, past_samples=16)
TEXT = torch.randint(1, 200, (1, 48), generator=torch.Generator().manual_seed(0))
Export = Callable[..., str]


@pytest.fixture
def export(run_script) -> Export:
    """What the script prints, or the sentence in which it ends."""
    return partial(run_script, "export")


@pytest.fixture(scope="module")
def checkpoint(backbone, tokenizer, tmp_path_factory) -> Path:
    """A run's folder with one checkpoint, of a memory that changes what the model says, and a card."""
    run = tmp_path_factory.mktemp("run")
    model = InfformerForCausalLM.from_backbone(copy.deepcopy(backbone), MEMORY, segment_length=16)
    for parameter in model.memory_parameters():
        nn.init.normal_(parameter)
    folder = run / "checkpoints" / "step-00000010" / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("# What was measured\n")
    (run / "checkpoints" / "best").symlink_to(folder.parent.name)
    return run


@pytest.fixture(scope="module")
def symbols(tmp_path_factory) -> Path:
    """A decoder, whose symbols no tokenizer makes."""
    folder = tmp_path_factory.mktemp("symbols")
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "feed_forward_size": 8}
    new_decoder({"vocab_size": 200, **sizes}, MEMORY, segment_length=16).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Of a text that is longer than a segment."""
    state, seen = None, []
    for segment in TEXT.split(16, dim=1):
        output = model.eval()(segment, state=state)
        state, seen = output.state, [*seen, output.logits]
    return torch.cat(seen, dim=1)


def test_all_of_a_model_is_opened_by_the_auto_classes_and_says_the_same(export, checkpoint, tmp_path):
    assert export(checkpoint, tmp_path / "out") == f"written to {tmp_path / 'out'}\n"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(model), logits(InfformerForCausalLM.from_pretrained(model_of(checkpoint))))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 257
    assert (tmp_path / "out" / "README.md").read_text() == "# What was measured\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_decoder_is_exported_without_a_tokenizer_that_it_does_not_have(export, symbols, tmp_path):
    export(symbols, tmp_path / "out")
    assert torch.equal(*(logits(AutoModelForCausalLM.from_pretrained(place)) for place in (symbols, tmp_path / "out")))
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("kind", ["checkpoint", "symbols"])
def test_memories_keep_their_precision_in_a_model_of_half_of_it(export, request, tmp_path, kind):
    export(request.getfixturevalue(kind), tmp_path / "out", "--dtype", "float16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    memories = {id(parameter) for parameter in model.memory_parameters()}
    of_memories = {name for name, parameter in model.named_parameters() if id(parameter) in memories}
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert of_memories
    for name, tensor in saved.items():
        assert tensor.dtype is (torch.float32 if name in of_memories else torch.float16), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_backbone_is_the_stock_model(export, checkpoint, backbone, tmp_path, dtype):
    export(checkpoint, tmp_path / "out", "--what", "backbone", "--dtype", dtype)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(stock) is GPT2LMHeadModel
    assert stock.dtype == getattr(torch, dtype)
    for name, parameter in backbone.named_parameters():
        assert torch.equal(stock.get_parameter(name), parameter.to(stock.dtype))
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_memories_alone_join_the_stock_model_again(export, checkpoint, backbone, tmp_path):
    export(checkpoint, tmp_path / "out", "--what=memories")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"memories.json", "memories.safetensors"}
    joined = attach_memories(tmp_path / "out", copy.deepcopy(backbone))
    assert torch.equal(logits(joined), logits(InfformerForCausalLM.from_pretrained(model_of(checkpoint))))


@pytest.mark.parametrize("what", ["all", "backbone", "memories"])
def test_a_folder_that_holds_something_is_not_exported_into(export, checkpoint, tmp_path, what):
    (tmp_path / "mine.txt").touch()
    message = export(checkpoint, tmp_path, f"--what={what}")
    assert message.startswith(f"error: FOLDER={tmp_path} is not empty: name a new folder, or remove what is in it")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_is_no_checkpoint_is_not_exported(export, tmp_path):
    (tmp_path / "empty").mkdir()
    message = export(tmp_path / "empty", tmp_path / "out")
    assert f"checkpoint={tmp_path / 'empty'}: this folder is no model" in message
    assert not (tmp_path / "out").exists()


def test_a_name_on_a_hub_that_never_answers_ends_in_a_sentence(export, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    hub.problem_with_the_hub.cache_clear()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        message = export("opnai/gpt2", tmp_path / "out")
    hub.problem_with_the_hub.cache_clear()
    assert message.startswith(f"error: checkpoint=opnai/gpt2: {endpoint} does not answer within")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["backbone", "memories"])
def test_of_a_decoder_there_is_nothing_but_all_to_export(export, symbols, tmp_path, what):
    message = export(symbols, tmp_path / "out", f"--what={what}")
    assert f"checkpoint={symbols} is a decoder from scratch" in message
    assert "take --what=all" in message


def test_a_model_without_memories_has_none_to_export(export, model_folder, tmp_path):
    assert "neither memories nor adapters" in export(model_folder, tmp_path / "out", "--what=memories")
    assert list(tmp_path.iterdir()) == []


def test_what_the_page_shows_of_sharing_runs(export, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "tiny").symlink_to(checkpoint)
    page = (ROOT / "docs" / "any_model.md").read_text(encoding="utf-8")
    section = page.split("\n## Share\n")[1].split("\n## ")[0]
    (commands,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    for command in commands.splitlines():
        assert export(*shlex.split(command.removeprefix("python scripts/export.py "))).startswith("written to")
    pushed: list[str] = []
    monkeypatch.setattr(InfformerForCausalLM, "push_to_hub", lambda model, name: pushed.append(model.card + name))
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(code, {})
    assert pushed == ["# What was measured\nyou/novels"]


def model_of(run: Path) -> Path:
    return run / "checkpoints" / "step-00000010" / "model"
