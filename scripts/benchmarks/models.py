"""The models that are compared: one backbone with a memory, without, and with a longer window of attention.

Random weights. `gpt2` is the published backbone. It has a position for each token of a segment and no more, so it
cannot look further; `rotary` is what somebody would take who wants to: a Llama, and with a window the Mistral of the
same sizes. The two are the same network but for the window (no grouped queries here), and the Mistral's key-value cache
keeps what the window covers. The project's own decoder with a short-term memory is no such contestant: it keeps hidden
states, as Transformer-XL does, and projects them to keys and values anew for every segment.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache

import infformer
from benchmarks.arithmetic import Sizes
from benchmarks.machine import Setting
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models.chunked_loss import chunked_token_losses, cross_entropy
from infformer.models.loading import load_tokenizer
from infformer.models.pretrained import InfformerForCausalLM, cache_argument
from infformer.models.segment_read import MemoryModelOutput

BACKBONES = ("gpt2", "rotary")
MEANINGS = {
    "segment": "T, tokens of a segment",
    "functions": "N, basis functions",
    "samples": "M, points where the past is sampled",
}


def add_sizes(parser: argparse.ArgumentParser, **sizes: int) -> None:
    """Options of these names and defaults."""
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=MEANINGS.get(name))


def memory_config(sizes: Sizes) -> LongTermMemoryConfig:
    """A sticky memory, the published one but for its sizes."""
    return LongTermMemoryConfig(
        basis_functions=sizes.basis_functions,
        past_samples=sizes.past_samples,
        sticky=True,
        sticky_placement="published",
    )


def new_reader(options: Any, setting: Setting) -> tuple[Sizes, InfformerForCausalLM, PreTrainedTokenizerBase]:
    """A GPT-2 with memory that reads the novels that come with the package, cut up by the tokenizer beside them."""
    options.functions = options.samples = options.segment
    sizes = model_sizes(options, "gpt2")
    model = new_model(sizes, "gpt2", memory=True).eval()
    model.to(setting.device)
    if options.compile:
        model.compile()
    return sizes, model, load_tokenizer(str(Path(infformer.__file__).parent / "checkpoints" / "tiny"))


def model_sizes(options: Any, backbone: str) -> Sizes:
    """The sizes that the command line gives, by the names of `add_model_options`."""
    wide = 4 * options.hidden
    return Sizes(
        batch=options.batch,
        segment=options.segment,
        hidden=options.hidden,
        heads=options.heads,
        layers=getattr(options, "layers", 1),
        vocabulary=getattr(options, "vocabulary", 0),
        basis_functions=options.functions,
        past_samples=getattr(options, "samples", options.segment),
        # Three matrices of two thirds of the width weigh as much as two.
        feed_forward=wide if backbone == "gpt2" else 2 * wide // 3,
        feed_forward_matrices=2 if backbone == "gpt2" else 3,
        key_value_heads=getattr(options, "key_value_heads", None) or 0,
    )


def check_windows(options: Any) -> None:
    """Refuse windows of attention for a backbone that has no positions for them.

    Raises:
        SystemExit: there are some.
    """
    if options.windows and options.backbone == "gpt2":
        raise SystemExit(
            f"error: --windows {' '.join(map(str, options.windows))} with --backbone gpt2: it has no positions beyond "
            "its segment; leave them out (--windows without a number), or take --backbone rotary"
        )


def architecture(sizes: Sizes, backbone: str) -> dict[str, Any]:
    """The fields of a Hugging Face configuration."""
    if backbone == "rotary":
        return {"model_type": "llama", **_rotary(sizes)}
    return {
        "model_type": "gpt2",
        "vocab_size": sizes.vocabulary,
        "n_positions": sizes.segment,
        "n_embd": sizes.hidden,
        "n_layer": sizes.layers,
        "n_head": sizes.heads,
        "n_inner": sizes.feed_forward,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def compile_layers(model: Any) -> None:
    """As train.py does; a model with a longer window as its users would."""
    model.compile() if isinstance(model, WindowReader) else model.compile_layers()


def new_model(sizes: Sizes, backbone: str, memory: bool) -> InfformerForCausalLM:
    """A backbone with a sticky memory beside each attention that does contribute something, or without."""
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture(sizes, backbone)))
    model = InfformerForCausalLM.from_backbone(
        network, memory_config(sizes) if memory else None, segment_length=sizes.segment
    )
    layer: Any
    for layer in model.memories:
        nn.init.normal_(layer.output.weight, std=0.02)
    return model


def new_window_model(sizes: Sizes, window: int) -> MistralForCausalLM:
    """The rotary backbone in which every token attends to the last `window` tokens."""
    return MistralForCausalLM(MistralConfig(**_rotary(sizes), sliding_window=window))


class WindowReader(nn.Module):
    """Reads a document segment by segment as the models with memories do; its memory is a key-value cache."""

    def __init__(self, network: MistralForCausalLM) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        input_ids: Tensor,
        *,
        targets: Tensor,
        state: Cache | None = None,
        noise: None = None,
        return_logits: bool = False,
    ) -> MemoryModelOutput:
        name = cache_argument(self.network)
        assert name is not None
        read = self.network.model(input_ids, **{name: state}, use_cache=True)
        losses = chunked_token_losses(read.last_hidden_state, cross_entropy(self.network.lm_head), targets)
        return MemoryModelOutput(loss=losses.mean(), token_losses=losses, state=read[name])

    @property
    def noise_size(self) -> int:
        return 0


def without_graph(state: Any) -> Any:
    """What a model remembers, cut off from the graph that made it; a key-value cache in place."""
    if not isinstance(state, Cache):
        return None if state is None else state.detach()
    layer: Any
    for layer in state.layers:
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    return state


def tensor_bytes(memory: Any) -> int:
    """Bytes of what a model remembers between two segments."""
    if memory is None:
        return 0
    if isinstance(memory, Cache):
        layers: list[Any] = memory.layers
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return memory.nbytes


def random_tokens(sizes: Sizes, device: torch.device) -> Tensor:
    """One segment of each row and the token after it, [batch, segment + 1]."""
    return torch.randint(sizes.vocabulary, (sizes.batch, sizes.segment + 1), device=device)


def _rotary(sizes: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.feed_forward,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_value_heads or sizes.heads,
        "max_position_embeddings": 2**20,
        "tie_word_embeddings": True,
    }
