"""What a caller may get wrong: the option or argument that is named, and what is said to do."""

import copy
import json
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import BertConfig, GPT2Config, GPT2Model, PreTrainedTokenizerFast, T5Config, ViTConfig

from infformer.errors import UserError
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models.base import MemoryModel
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.generation import continue_text
from infformer.models.loading import check_vocabulary, load_pretrained, load_trained, new_decoder, new_model
from infformer.models.pretrained import InfformerForCausalLM

SEGMENT = 8
MEMORY = LongTermMemoryConfig(basis_functions=8, past_samples=16)
SIZES = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = torch.arange(4 * SEGMENT).view(4, SEGMENT)
GPT2 = {"model_type": "gpt2", "vocab_size": 257, "n_embd": 16, "n_layer": 2, "n_head": 2}


class Given(NamedTuple):
    """What the rows of the table are called with."""

    model: MemoryModel
    backbone: nn.Module
    tokenizer: PreTrainedTokenizerFast
    model_folder: Path
    empty: Path

    def state(self, rows: int) -> Any:
        return self.model(TEXT[:rows]).state

    def folder(self, config: Any) -> str:
        """Of a model with this configuration, an object or the text of its file, and the stock model's weights."""
        text = config if isinstance(config, str) else json.dumps(config)
        (self.empty / "config.json").write_text(text)
        (self.empty / "model.safetensors").write_bytes((self.model_folder / "model.safetensors").read_bytes())
        return str(self.empty)

    def marked(self, **marks: Any) -> Any:
        """The backbone with such attributes."""
        other = InfformerForCausalLM.from_backbone(self.model_folder).backbone
        for name, value in marks.items():
            setattr(other, name, value)
        return other


@pytest.fixture(scope="module")
def models(backbone) -> dict[str, MemoryModel]:
    return {
        "wrapped": InfformerForCausalLM.from_backbone(copy.deepcopy(backbone), MEMORY, segment_length=SEGMENT),
        "decoder": DecoderForCausalLM(DecoderConfig(**SIZES, memory=MEMORY, segment_length=SEGMENT)),
    }


@pytest.fixture
def given(models, backbone, tokenizer, model_folder, tmp_path) -> Given:
    return Given(models["wrapped"], backbone, tokenizer, model_folder, tmp_path)


def mask(*rows: str) -> Tensor:
    return torch.tensor([[int(token) for token in row] for row in rows])


class Call(NamedTuple):
    named: str
    """The argument or option, and its value where it has a short one."""
    remedy: str
    call: Callable[[Given], Any]


READING = [
    Call("attention_mask=", "padding_side='right'", lambda g: g.model(TEXT[:1], attention_mask=mask("00111111"))),
    Call("attention_mask=", "padding stands behind", lambda g: g.model(TEXT[:1], attention_mask=mask("11011110"))),
    Call("attention_mask=", "[1, 8]", lambda g: g.model(TEXT[:1], attention_mask=mask("111"))),
    Call(
        "attention_mask= and lengths=",
        "give one",
        lambda g: g.model(TEXT[:1], attention_mask=mask("11111111"), lengths=torch.tensor([8])),
    ),
    Call("lengths=[9]", "from 0 to 8", lambda g: g.model(TEXT[:1], lengths=torch.tensor([9]))),
    Call("lengths=[8, -1]", "from 0 to 8", lambda g: g.model(TEXT[:2], lengths=torch.tensor([8, -1]))),
    Call(
        "lengths=[4, 2]",
        "not behind padding",
        lambda g: g.model(TEXT[:2, :4], lengths=torch.tensor([4, 2]), use_cache=True),
    ),
    Call("state= is a MemoryModelOutput", "output.state", lambda g: g.model(TEXT, state=g.model(TEXT))),
    Call("lengths=", "each of 2 rows", lambda g: g.model(TEXT[:2], lengths=torch.tensor([8]))),
    Call("reset=", "each of 2 rows", lambda g: g.model(TEXT[:2], reset=torch.tensor([True, False, True]))),
    Call(
        "reset= with segment_cache=",
        "without a cache",
        lambda g: g.model(
            TEXT[:1, 4:], reset=torch.tensor([True]), segment_cache=g.model(TEXT[:1, :4], use_cache=True).segment_cache
        ),
    ),
    Call("state= has 4 rows, input_ids 1", "select_rows", lambda g: g.model(TEXT[:1], state=g.state(4))),
    Call("state= has 1 rows, input_ids 4", "select_rows", lambda g: g.model(TEXT, state=g.state(1))),
    Call("segment_length=4", "set it to 8", lambda g: continue_text(g.model, TEXT.flatten(), 1, 4)),
    Call("segment_length=16", "set it to 8", lambda g: g.model.choose_segment_length(16)),
    Call("prompt=", "at least one token", lambda g: continue_text(g.model, TEXT[0, :0], 1, SEGMENT)),
    Call("prompt=", "[length]", lambda g: continue_text(g.model, TEXT, 1, SEGMENT)),
]

BACKBONES = [
    Call("backbone=./nowhere", "no such folder", lambda g: InfformerForCausalLM.from_backbone("./nowhere")),
    Call("has no config.json", "backbone=", lambda g: InfformerForCausalLM.from_backbone(g.empty)),
    Call(
        "backbone=SimpleNamespace",  # as a PeftModel is: no model of transformers, but with one inside
        "merge_and_unload()",
        lambda g: InfformerForCausalLM.from_backbone(types.SimpleNamespace(merge_and_unload=None)),
    ),
    Call(
        "backbone=GPT2LMHeadModel",
        "merge_and_unload()",
        lambda g: InfformerForCausalLM.from_backbone(g.marked(_hf_peft_config_loaded=True)),
    ),
    Call(
        "backbone=GPT2LMHeadModel is quantised",
        "dequantize()",
        lambda g: InfformerForCausalLM.from_backbone(g.marked(hf_quantizer=object()), MEMORY),
    ),
    Call(
        "backbone=GPT2Model",
        "give a causal language model",
        lambda g: InfformerForCausalLM.from_backbone(GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1))),
    ),
    Call("backbone=InfformerForCausalLM", "stock_backbone()", lambda g: InfformerForCausalLM.from_backbone(g.model)),
    Call(
        "memory=sticky",
        "LongTermMemoryConfig()",
        lambda g: InfformerForCausalLM.from_backbone(g.model_folder, "sticky"),
    ),
    Call(
        "backbone=Linear", "give a causal language model", lambda g: InfformerForCausalLM.from_backbone(nn.Linear(1, 1))
    ),
]

FOLDERS = [
    Call("'t5'", "predicts the next token", lambda g: load_trained(g.folder(T5Config().to_dict()))),
    Call("'vit'", "predicts the next token", lambda g: load_pretrained(g.folder(ViTConfig().to_dict()))),
    Call("'bert'", "predicts the next token", lambda g: load_trained(g.folder(BertConfig().to_dict()))),
    Call("model_type", "save_pretrained", lambda g: load_trained(g.folder({"n_embd": 8}))),
    Call("config.json", "save_pretrained", lambda g: load_trained(g.folder([1, 2]))),
    Call("config.json", "cannot be read as JSON", lambda g: load_trained(g.folder("[" * 100_000))),
    Call("config.json", "cannot be read as JSON", lambda g: load_trained(g.folder(""))),
    Call("config.json", "20,000,000 bytes", lambda g: load_trained(g.folder(" " * 20_000_000))),
    Call("its config.json describes", "as it was saved", lambda g: load_trained(g.folder({"model_type": "llama"}))),
    Call(
        "its config.json describes",
        "as it was saved",
        lambda g: load_pretrained(g.folder({**GPT2, "n_embd": 100_000, "n_layer": 50})),
    ),
    Call("from its config.json", "divisible", lambda g: load_pretrained(g.folder({**GPT2, "n_head": 3}))),
]


def decoder_with(**architecture: Any) -> Callable[[Given], Any]:
    return lambda _: new_decoder({"model_type": "decoder", **SIZES, **architecture})


def stock_with(attention: str | None = None, **architecture: Any) -> Callable[[Given], Any]:
    return lambda _: new_model({**GPT2, **architecture}, attention=attention)


ARCHITECTURES = [
    *(
        Call(f"model.architecture.{name}={value}", remedy, decoder_with(**{name: value}))
        for name, value, remedy in (
            ("num_attention_heads", 0, "at least 1"),
            ("num_attention_heads", -2, "at least 1"),
            ("num_hidden_layers", 0, "at least 1"),
            ("num_hidden_layers", -1, "at least 1"),
            ("hidden_size", "wide", "a whole number"),
            ("hidden_size", 16.5, "a whole number"),
            ("head_size", 0, "at least 1"),
            ("feed_forward_size", None, "a whole number"),
            ("vocab_size", -3, "at least 1"),
            ("dropout", 2, "less than 1"),
            ("dropout", "some", "less than 1"),
            ("attention_dropout", -0.1, "0 or more"),
            ("initializer_range", float("nan"), "more than 0"),
            ("adaptive_divisor", float("inf"), "at least 1"),
            ("activation", "swoosh", "choose one of gelu"),
            ("positions", "absolute", "choose one of relative, rotary"),
            ("normalization", "batch", "choose one of layer, rms"),
            ("normalization_placement", "both", "choose one of post, pre"),
            ("adaptive_cutoffs", [20, 257], "cannot cut a vocabulary of 257 tokens"),
        )
    ),
    Call(
        "model.architecture.head_size=5",
        "rotary positions turn pairs; make it even",
        decoder_with(positions="rotary", head_size=5),
    ),
    Call("model.architecture.adaptive_cutoffs=few", "a whole number", decoder_with(adaptive_cutoffs=["few"])),
    Call("'n_head': 3", "divisible", stock_with(n_head=3)),
    Call("'n_head': 0", "ZeroDivisionError", stock_with(n_head=0)),
    Call("'resid_pdrop': 2", "dropout probability", stock_with(resid_pdrop=2)),
    Call("'n_embd': 'wide'", "n_embd", stock_with(n_embd="wide")),
    Call("'model_type': 'gpt9'", "no model can be made of this", stock_with(model_type="gpt9")),
    Call("model.attention=fastest", "fastest", stock_with(attention="fastest")),
]


def other_tokenizer(
    given: Given, count: int | None = None, change: Callable[[dict], Any] = lambda vocabulary: None
) -> Any:
    """The model's tokenizer with other tokens."""
    file = json.loads(given.tokenizer.backend_tokenizer.to_str())
    vocabulary = file["model"]["vocab"]
    change(vocabulary)
    file["model"]["vocab"] = dict(list(vocabulary.items())[:count])
    (given.empty / "tokenizer.json").write_text(json.dumps(file))
    return PreTrainedTokenizerFast(tokenizer_file=str(given.empty / "tokenizer.json"), bos_token="<s>", eos_token="<s>")


def swap(vocabulary: dict[str, int]) -> None:
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def with_tokens(given: Given, tokens: list[str], **special: str) -> Any:
    tokenizer = other_tokenizer(given)
    tokenizer.add_tokens([AddedToken(token) for token in tokens])
    tokenizer.add_special_tokens(special)
    return tokenizer


def wrapped(given: Given) -> MemoryModel:
    return load_pretrained(str(given.model_folder))


TOKENIZERS = [
    Call("has 258 tokens", "model.tokenizer=", lambda g: check_vocabulary(wrapped(g), with_tokens(g, ["new"]))),
    Call(
        "is number 65, in the model's folder 66",
        "model.tokenizer=",
        lambda g: check_vocabulary(wrapped(g), other_tokenizer(g, change=swap)),
    ),
    Call("the tokenizer has no", "model.tokenizer=", lambda g: check_vocabulary(wrapped(g), other_tokenizer(g, 250))),
    Call(
        "eos_token is number 72",
        "model.tokenizer=",
        lambda g: check_vocabulary(wrapped(g), with_tokens(g, [], eos_token=g.tokenizer.convert_ids_to_tokens(72))),
    ),
    Call(
        "bos_token is number 72, the model's 0",  # known from its configuration alone
        "model.tokenizer=",
        lambda g: check_vocabulary(g.model, with_tokens(g, [], bos_token=g.tokenizer.convert_ids_to_tokens(72))),
    ),
    Call(
        "has 257 tokens and the model knows 4000",
        "model.tokenizer=",
        lambda g: check_vocabulary(new_model({**GPT2, "vocab_size": 4000}), g.tokenizer),
    ),
]

CALLS = [*READING, *BACKBONES, *FOLDERS, *ARCHITECTURES, *TOKENIZERS]


@pytest.mark.parametrize("row", CALLS, ids=[f"{row.named} {row.remedy}" for row in CALLS])
def test_a_bad_call_is_refused_in_a_sentence(given, row):
    with pytest.raises(UserError) as refused:
        row.call(given)
    said = str(refused.value)
    assert row.named in said
    assert row.remedy in said
    assert "\n" not in said


@pytest.mark.parametrize("row", READING, ids=[f"{row.named} {row.remedy}" for row in READING])
def test_a_decoder_refuses_the_same(given, models, row):
    with pytest.raises(UserError, match=re.escape(row.named)):
        row.call(given._replace(model=models["decoder"]))


class TestNotRefused:
    """What looks like it, and is right."""

    @pytest.mark.parametrize("kind", ["wrapped", "decoder"])
    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
    def test_a_mask_of_right_padding_stands_for_lengths(self, models, kind, dtype):
        lengths = torch.tensor([8, 3, 0, 8])
        attention_mask = mask("11111111", "11100000", "00000000", "11111111").to(dtype)
        expected = models[kind].eval()(TEXT, labels=TEXT, lengths=lengths)
        output = models[kind](TEXT, labels=TEXT, attention_mask=attention_mask)
        assert torch.equal(output.token_losses, expected.token_losses)
        for name, tensor in output.state.named_tensors().items():
            assert torch.equal(tensor, expected.state.named_tensors()[name]), name

    def test_embeddings_beyond_the_tokens_are_not_refused(self, tokenizer):
        check_vocabulary(new_model({**GPT2, "vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0}), tokenizer)

    def test_a_model_without_a_beginning_is_not_refused(self, tokenizer):
        check_vocabulary(new_model({**GPT2, "bos_token_id": None, "eos_token_id": [5, 0]}), tokenizer)

    def test_a_token_that_the_tokenizer_was_given_since_is_not_refused(self, given, tmp_path):
        model = new_model({**GPT2, "vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0})
        model.save_pretrained(tmp_path / "model")
        given.tokenizer.save_pretrained(tmp_path / "model")
        check_vocabulary(load_trained(str(tmp_path / "model")), with_tokens(given, ["<pad>"]))
