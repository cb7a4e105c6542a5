"""What torch.compile makes of a model: one graph, whatever the segment; and layers of one kind share theirs."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

from infformer.memory.compressive import CompressiveMemoryConfig
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.options import MemoryConfig
from infformer.models.base import MemoryModel
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.pretrained import InfformerForCausalLM

SEGMENT, VOCABULARY = 8, 50
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LAYERS = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_positions=SEGMENT, n_embd=8, n_layer=4, n_head=2, **NO_DROPOUT),
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=SEGMENT,
    ),
}
MEMORY = {"basis_functions": 8, "past_samples": 16, "widths": [0.05, 0.1]}


def own(memory: MemoryConfig | None, positions: str = "relative") -> DecoderForCausalLM:
    sizes = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "feed_forward_size": 12}
    config = DecoderConfig(VOCABULARY, **sizes, positions=positions, dropout=0.0, memory=memory, segment_length=SEGMENT)
    return DecoderForCausalLM(config)


MODELS = {
    "gpt2": lambda: sticky(AutoModelForCausalLM.from_config(LAYERS["gpt2"])),
    "gpt2 with memories in some layers": lambda: sticky(AutoModelForCausalLM.from_config(LAYERS["gpt2"]), [1, 3]),
    "llama": lambda: sticky(AutoModelForCausalLM.from_config(LAYERS["llama"])),
    "decoder without memory": lambda: own(None),
    "decoder with a short-term memory": lambda: own(MemoryConfig()),
    "decoder with a compressive memory": lambda: own(CompressiveMemoryConfig(length=4, rate=2)),
    "decoder with a long-term memory": lambda: own(LongTermMemoryConfig(**MEMORY), positions="rotary"),
}
BOTH_KINDS_OF_LAYERS = "gpt2 with memories in some layers"
CASES = [([0, 0], [8, 8]), ([0, 0], [8, 8]), ([1, 0], [8, 8]), ([0, 0], [8, 5]), ([0, 1], [3, 8])]
"""Rows that begin a document, and real tokens: first and later segments, a reset row, a short last segment."""


def sticky(stock: nn.Module, layers: list[int] | None = None) -> MemoryModel:
    memory = LongTermMemoryConfig(**MEMORY, sticky=True, sticky_bins=16)
    model = InfformerForCausalLM.from_backbone(stock, memory, layers, SEGMENT).eval()
    for layer in model.memories:
        nn.init.normal_(layer.output.weight, std=0.1)
    return model


def results(model: MemoryModel, **arguments: Tensor) -> tuple[list[Tensor], object]:
    """Losses, state and gradients of a segment, and its state without its graph."""
    output = model(**arguments)
    gradients = torch.autograd.grad(output.loss, list(model.parameters()), materialize_grads=True)
    return [output.token_losses, *output.state.named_tensors().values(), *gradients], output.state.detach()


def assert_all_cases_equal(compiled: MemoryModel, model: MemoryModel) -> None:
    """From an empty state on, each case with the state of the one before."""
    generator, state = torch.Generator().manual_seed(0), model.initial_state(2)
    for reset, lengths in CASES:
        ids = torch.randint(VOCABULARY, (2, SEGMENT), generator=generator)
        arguments = {
            "input_ids": ids,
            "targets": ids,
            "state": state,
            "reset": torch.tensor(reset, dtype=torch.bool),
            "lengths": torch.tensor(lengths),
            "noise": torch.rand(2, model.noise_size, generator=generator),
        }
        found, _ = results(compiled, **arguments)
        expected, state = results(model, **arguments)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [
        BOTH_KINDS_OF_LAYERS,
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS if kind != BOTH_KINDS_OF_LAYERS),
    ],
)
def test_layers_with_their_memories_share_one_graph_forward_and_one_backward(kind, monkeypatch):
    """Over resets, beginnings and a short last segment; and what only reads compiles nothing."""
    from functorch.compile import make_boxed_func  # which takes half a second
    from torch._dynamo.backends.common import aot_autograd

    torch.manual_seed(0)
    model, counted = (MODELS[kind]().train() for _ in range(2))
    counted.load_state_dict(model.state_dict())
    graphs = {"forward": 0, "backward": 0}

    def count(direction: str):
        def compiled(graph: torch.fx.GraphModule, inputs: list[Tensor]):
            graphs[direction] += 1
            return make_boxed_func(graph.forward)

        return compiled

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=count("forward"), bw_compiler=count("backward"))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    counted.compile_layers()
    assert_all_cases_equal(counted, model)
    counted.eval()
    with torch.no_grad():
        for rows in (2, 3):
            counted(torch.randint(VOCABULARY, (rows, SEGMENT)))
    kinds = 2 if kind == BOTH_KINDS_OF_LAYERS else 1
    assert graphs == {"forward": kinds, "backward": kinds}


def test_layers_behind_a_short_term_memory_are_not_compiled(monkeypatch):
    """Of a pretrained model, which tells each its number."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=pytest.fail))
    config = LlamaConfig(**{**LAYERS["llama"].to_dict(), "max_position_embeddings": 3 * SEGMENT})
    stock = AutoModelForCausalLM.from_config(config)
    model = InfformerForCausalLM.from_backbone(stock, MemoryConfig(short_term_length=SEGMENT), None, SEGMENT).train()
    model.compile_layers()
    model(torch.randint(VOCABULARY, (2, SEGMENT)))


def test_layers_that_are_computed_again_are_not_compiled(monkeypatch):
    torch.manual_seed(0)
    model, counted = (MODELS["gpt2"]().train() for _ in range(2))
    counted.load_state_dict(model.state_dict())
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=pytest.fail))
    counted.checkpoint_activations()
    counted.compile_layers()
    assert_all_cases_equal(counted, model)


@pytest.mark.slow
def test_a_whole_model_is_one_graph_for_all_segments(backbone):
    """Nothing is compiled anew, and all of it in one."""
    torch._dynamo.reset()
    model = sticky(GPT2LMHeadModel(backbone.config))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_all_cases_equal(torch.compile(model, fullgraph=True), model)
