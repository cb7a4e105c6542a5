"""LoRA beside memories: what learns, what is saved, and what is said of targets that are not there."""

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from infformer.errors import ModelError
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models.adapters import LoraConfig, find_targets
from infformer.models.base import MemoryModel
from infformer.models.loading import load_pretrained, load_trained
from infformer.models.pretrained import InfformerForCausalLM
from infformer.models.streaming import TextSegment, stream

SEGMENT, VOCABULARY = 8, 50
TOKENS = {"bos_token_id": 0, "eos_token_id": 0}
BACKBONES = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=12, n_layer=2, n_head=2, **TOKENS),
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        **TOKENS,
    ),
}
LINEAR = {
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "llama": [*(f"self_attn.{one}_proj" for one in "qkvo"), *(f"mlp.{one}_proj" for one in ("gate", "up", "down"))],
}
FIRST = {"gpt2": "transformer.h.0", "llama": "model.layers.0"}
SEGMENTS = torch.randint(VOCABULARY, (2, 3 * SEGMENT), generator=torch.Generator().manual_seed(0)).split(SEGMENT, dim=1)
MEMORY = {"gpt2": LongTermMemoryConfig(basis_functions=8, past_samples=16)}
MEMORY["llama"] = LongTermMemoryConfig(SEGMENT, basis_functions=8, past_samples=16)


@pytest.fixture(params=BACKBONES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def stock(kind) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(BACKBONES[kind])).eval()


def with_adapters(stock: PreTrainedModel, kind: str, **options: Any) -> InfformerForCausalLM:
    lora = LoraConfig(**{"rank": 2, **options})
    return InfformerForCausalLM.from_backbone(copy.deepcopy(stock), MEMORY[kind], None, SEGMENT, lora).eval()


def learned(model: MemoryModel) -> MemoryModel:
    """All that learns is random."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def read(model: MemoryModel) -> list[Tensor]:
    return [output.logits for _, output in stream(model, map(TextSegment, SEGMENTS))]


def that_learn(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_all_linear_maps_of_the_layers_get_an_adapter_or_those_that_are_named(stock, kind):
    whole = [f"{FIRST[kind]}.{name}".replace("0", str(layer)) for layer in range(2) for name in LINEAR[kind]]
    assert find_targets(stock, LoraConfig(rank=1)) == whole
    end, name = LINEAR[kind][0].split(".")[1], whole[-1]
    assert find_targets(stock, LoraConfig(rank=1, targets=[name, end])) == [whole[0], whole[len(whole) // 2], name]


@pytest.mark.parametrize("target", ["nothing", "attn", "wte", "embed_tokens", "lm_head", "_proj", ""])
def test_a_target_that_is_no_linear_map_in_the_layers_is_refused_with_those_that_are(stock, kind, target):
    names = ", ".join(dict.fromkeys(name.split(".")[1] for name in LINEAR[kind]))
    first = f"{FIRST[kind]}.{LINEAR[kind][0]}"
    with pytest.raises(ModelError) as caught:
        find_targets(stock, LoraConfig(rank=1, targets=[LINEAR[kind][0], target]))
    assert str(caught.value).startswith(f"model.lora.targets=['{LINEAR[kind][0]}', '{target}']: ")
    assert f"no linear map called {target}; choose from {names}, or from whole names such as {first}" in str(
        caught.value
    )


@pytest.mark.needs("peft")
class TestBesideMemories:
    def test_new_adapters_change_no_bit_of_a_stock_models_logits(self, stock, kind):
        """Beside a memory without a short-term one, which moves places."""
        model = with_adapters(stock, "gpt2")
        for logits, segment in zip(read(model), SEGMENTS, strict=True):
            assert torch.equal(logits, stock(segment).logits)

    def test_adapters_and_memories_learn_and_nothing_else(self, stock, kind):
        model = with_adapters(stock, kind, dropout=0.1).train()
        learning = that_learn(model)
        assert learning == {name for name, _ in model.named_parameters() if "memories." in name or ".lora_" in name}
        assert len({name for name in learning if ".lora_" in name}) == 2 * 2 * len(LINEAR[kind])
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
        state = None
        for _ in range(3):  # an adapter's first half learns when its second is not zero any more, and so does a memory
            loss = torch.zeros(())
            for segment in SEGMENTS:
                output = model(segment, labels=segment, state=state)
                state, loss = output.state, loss + output.loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            state = None
        changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert changed == learning

    def test_a_model_with_adapters_is_saved_and_opened_again(self, stock, kind, tmp_path, assert_same_model):
        model = learned(with_adapters(stock, kind))
        model.save_pretrained(tmp_path)
        for opened in (AutoModelForCausalLM.from_pretrained(tmp_path), load_trained(str(tmp_path))):
            assert_same_model(model, opened, SEGMENTS)
            assert opened.config.lora == {"rank": 2, "alpha": 16.0, "dropout": 0.0, "targets": None}
        assert that_learn(AutoModelForCausalLM.from_pretrained(tmp_path)) == that_learn(model)

    def test_activations_that_are_computed_anew_give_the_same_gradients(self, stock, kind):
        def gradients(model: MemoryModel) -> list[Tensor]:
            torch.manual_seed(0)  # of dropout
            model(SEGMENTS[0], labels=SEGMENTS[0]).loss.backward()
            return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

        kept = learned(with_adapters(stock, kind)).train()
        recomputed = copy.deepcopy(kept)
        recomputed.checkpoint_activations()
        pairs = list(zip(gradients(kept), gradients(recomputed), strict=True))
        assert all(torch.equal(one, other) for one, other in pairs if one is not None)

    def test_the_stock_backbone_has_what_its_adapters_have_learned(self, stock, kind, tmp_path):
        model = learned(with_adapters(stock, kind))
        expected = read(model)
        backbone = model.stock_backbone()
        for logits, other in zip(read(model), expected, strict=True):
            torch.testing.assert_close(logits, other, rtol=1e-4, atol=1e-4)
        assert list(backbone.state_dict()) == list(stock.state_dict())
        assert all(parameter.requires_grad for parameter in backbone.parameters())
        backbone.save_pretrained(tmp_path)
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(stock)

    def test_a_run_with_adapters_alone_is_measured_and_begun_with(self, stock, kind, tmp_path):
        control = InfformerForCausalLM.from_backbone(copy.deepcopy(stock), lora=LoraConfig(rank=2)).eval()
        learned(control).save_pretrained(tmp_path)
        assert torch.equal(read(load_trained(str(tmp_path)))[0], read(control)[0])
        begun = load_pretrained(str(tmp_path), MEMORY["gpt2"], segment_length=SEGMENT, lora=LoraConfig(rank=3))
        torch.testing.assert_close(read(begun.eval())[0], read(control)[0], rtol=1e-4, atol=1e-4)
        assert begun.config.lora["rank"] == 3

    def test_memories_that_peft_trains_copies_of_are_those_that_are_read(self, stock, kind):
        """`modules_to_save` puts something in their place that computes with the copy."""
        import peft

        model = learned(InfformerForCausalLM.from_backbone(copy.deepcopy(stock), MEMORY[kind], None, SEGMENT)).eval()
        expected = read(model)
        options = peft.LoraConfig(target_modules=["c_attn", "q_proj"], modules_to_save=["memories.0", "memories.1"])
        wrapped = peft.get_peft_model(model, options).eval()
        assert all(torch.equal(one, other) for one, other in zip(read(model), expected, strict=True))
        learning = that_learn(wrapped)
        assert any(".memories.0.modules_to_save." in name for name in learning)
        assert all(".modules_to_save." in name or ".lora_" in name for name in learning)
        state = model(SEGMENTS[0]).state
        for _ in range(2):
            output = wrapped(SEGMENTS[1], labels=SEGMENTS[1], state=state.detach())
            state = output.state
        output.loss.backward()
        learned_by = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
        assert any(".memories.1.modules_to_save." in name for name in learned_by)
        for name, parameter in wrapped.named_parameters():
            if ".modules_to_save." in name:
                nn.init.normal_(parameter, std=0.5)
        assert not torch.equal(read(model)[2], expected[2])


def test_without_peft_a_run_with_adapters_says_what_to_install(stock, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"model\.lora\.rank=2 needs peft: pip install 'infformer\[peft\]'"):
        with_adapters(stock, kind)
