import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.options import MemoryConfig
from infformer.models.chunked_loss import IGNORE_INDEX
from infformer.models.pretrained import InfformerForCausalLM
from infformer.models.segment_read import MemoryModelOutput

SEGMENT, VOCABULARY = 12, 50
BACKBONES = {
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=24, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    ),
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        attention_dropout=0.1,
        bos_token_id=0,
        eos_token_id=0,
    ),
}
BuildModel = Callable[..., InfformerForCausalLM]


@pytest.fixture(params=BACKBONES)
def stock(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(BACKBONES[request.param])).eval()


@pytest.fixture
def new_model(stock) -> BuildModel:
    """A model as it is before its memories are trained."""

    def build(memory_layers: list[int] | None = None, **options) -> InfformerForCausalLM:
        memory = LongTermMemoryConfig(basis_functions=8, past_samples=16, **options)
        return InfformerForCausalLM.from_backbone(copy.deepcopy(stock), memory, memory_layers, SEGMENT).eval()

    return build


@pytest.fixture
def model(new_model) -> BuildModel:
    """A model whose memories matter."""

    def build(memory_layers: list[int] | None = None, **options) -> InfformerForCausalLM:
        model = new_model(memory_layers, **options)
        for parameter in model.memories.parameters():
            nn.init.normal_(parameter, std=0.5)
        return model

    return build


def tokens(rows: int = 2, length: int = SEGMENT, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def read(model: InfformerForCausalLM, segments: list[Tensor], **options) -> list[MemoryModelOutput]:
    """One segment after another, each with the memory of the last."""
    outputs, memory = [], options.pop("memory", None)
    for segment in segments:
        outputs.append(model(segment, state=memory, **options))
        memory = outputs[-1].state
    return outputs


def document(segments: int, rows: int = 2) -> list[Tensor]:
    return [tokens(rows, seed=seed) for seed in range(segments)]


class TestTheBackboneIsLeftAlone:
    def test_a_backbone_keeps_the_names_and_values_of_its_parameters(self, stock, model):
        names = list(stock.state_dict())
        before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
        wrapped = model()
        assert list(wrapped.backbone.state_dict()) == names
        other = AutoModelForCausalLM.from_config(stock.config)
        other.load_state_dict(wrapped.backbone.state_dict())
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, before[name])

    def test_layers_of_its_owner_are_not_initialised_again(self, stock, new_model):
        """Such as embeddings for new tokens: transformers knows nothing of them."""
        embeddings = nn.Embedding(VOCABULARY + 3, 24)
        stock.set_input_embeddings(embeddings)
        expected = embeddings.weight.clone()
        wrapped = new_model()
        assert torch.equal(wrapped.get_input_embeddings().weight, expected)

    def test_a_memory_in_no_layer_changes_nothing(self, stock, new_model):
        wrapped = new_model(memory_layers=[])
        for output, segment in zip(read(wrapped, document(2)), document(2), strict=True):
            assert torch.equal(output.logits, stock(segment).logits)


class TestSaving:
    def test_memories_of_some_layers_are_loaded_as_they_were_saved(self, model, tmp_path, assert_same_model):
        saved = model(memory_layers=[1])
        saved.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.memory_layers == [1]
        assert_same_model(saved, loaded, document(3))

    def test_a_bfloat16_backbone_is_loaded_as_it_was_saved(self, stock, new_model, tmp_path, assert_same_model):
        """The memories beside a bfloat16 backbone are float32, and so they return."""
        stock.save_pretrained(tmp_path / "stock")
        memory = new_model().config.memory_config
        saved = InfformerForCausalLM.from_backbone(
            tmp_path / "stock", memory, segment_length=SEGMENT, dtype=torch.bfloat16
        ).eval()
        for parameter in saved.memories.parameters():
            nn.init.normal_(parameter, std=0.5)
        assert {parameter.dtype for parameter in saved.backbone.parameters()} == {torch.bfloat16}
        assert {parameter.dtype for parameter in saved.memories.parameters()} == {torch.float32}
        saved.save_pretrained(tmp_path / "saved")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
        assert_same_model(saved, loaded, document(3))

    def test_tied_embeddings_stay_tied(self, stock, model, tmp_path):
        model().save_pretrained(tmp_path)
        backbone = AutoModelForCausalLM.from_pretrained(tmp_path).backbone
        tied = backbone.get_output_embeddings().weight is backbone.get_input_embeddings().weight
        assert tied == stock.config.tie_word_embeddings

    def test_a_backbone_taken_out_and_saved_opens_as_the_stock_model(self, stock, model, tmp_path):
        model().backbone.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is type(stock)
        assert torch.equal(loaded(tokens()).logits, stock(tokens()).logits)

    def test_memories_are_saved_and_loaded_alone(self, model, tmp_path):
        one, other = model(), model()
        assert not torch.equal(read(one, document(2))[1].logits, read(other, document(2))[1].logits)
        torch.save(one.memories.state_dict(), tmp_path / "memories.pt")
        other.memories.load_state_dict(torch.load(tmp_path / "memories.pt"))
        assert torch.equal(read(one, document(2))[1].logits, read(other, document(2))[1].logits)
        assert all(name in one.state_dict() for name in (f"memories.{name}" for name in one.memories.state_dict()))


class TestErrors:
    @pytest.mark.parametrize("memory_layers", [[2], [0, -1], [0, 0]])
    def test_layers_that_do_not_exist_are_refused(self, new_model, memory_layers):
        with pytest.raises(ValueError, match=r"model\.memory_layers=.*layers 0 to 1"):
            new_model(memory_layers)

    def test_a_segment_longer_than_the_positions_is_refused(self, stock):
        memory = LongTermMemoryConfig(basis_functions=8)
        with pytest.raises(ValueError, match="segment_length=17 is longer than the 16 positions"):
            InfformerForCausalLM.from_backbone(stock, memory, segment_length=17)


class TestSomeLayers:
    def test_only_the_chosen_layer_reads(self, stock, model):
        wrapped = model(memory_layers=[1])
        memory = read(wrapped, document(1))[0].state
        assert len(memory.layers) == len(wrapped.memories) == 1
        outputs: dict[int, Tensor] = {}
        layers = wrapped.get_submodule(
            "backbone.transformer.h" if stock.config.model_type == "gpt2" else "backbone.model.layers"
        )
        for index, layer in enumerate(layers):
            layer.register_forward_hook(lambda module, args, output, index=index: outputs.update({index: output}))

        wrapped(tokens(), state=memory)
        with_memory = dict(outputs)
        wrapped(tokens())
        assert torch.equal(with_memory[0], outputs[0])
        assert not torch.equal(with_memory[1], outputs[1])

    def test_the_order_of_the_layers_is_the_order_of_the_memories(self, model):
        wrapped = model(memory_layers=[1, 0])
        other = model(memory_layers=[0, 1])
        for mine, theirs in zip(other.memories, reversed(wrapped.memories), strict=True):
            mine.load_state_dict(theirs.state_dict())
        assert torch.equal(read(wrapped, document(2))[1].logits, read(other, document(2))[1].logits)


class TestLosses:
    @pytest.mark.parametrize("options", [{}, {"read": "moments"}, {"read": "slots"}])
    def test_loss_and_divergence_are_the_literal_means(self, model, options):
        """Means over scored tokens, and over real tokens (those without memory count zero); summed over layers."""
        wrapped = model(**options, divergence_weight=0.5)
        memory = read(wrapped, document(1, rows=3))[0].state.reset_rows(torch.tensor([False, False, True]))
        segment, lengths = tokens(3, seed=4), torch.tensor([SEGMENT, 5, SEGMENT])
        labels = segment.masked_fill(torch.arange(SEGMENT) >= lengths.unsqueeze(1), IGNORE_INDEX)
        seen: dict[int, Tensor] = {}
        for index, layer in enumerate(wrapped.memories):
            layer.divergence = lambda attention, layer=layer, index=index: seen.setdefault(
                index, type(layer).divergence(layer, attention)
            )
        output = wrapped(segment, labels=labels, lengths=lengths, state=memory)
        real = SEGMENT + 5 + SEGMENT
        expected = 0.5 * sum((divergence[0].sum() + divergence[1, :5].sum()) / real for divergence in seen.values())
        assert (expected > 0) == (options.get("read") != "slots")
        assert output.auxiliary_losses.keys() == {"divergence"}
        torch.testing.assert_close(output.auxiliary_losses["divergence"], expected)
        torch.testing.assert_close(output.loss, output.token_losses.sum() / (11 + 4 + 11) + expected)


@pytest.mark.parametrize("memory", [LongTermMemoryConfig(basis_functions=8), MemoryConfig(short_term_length=12)])
def test_what_a_memory_holds_does_not_grow_with_the_heads_of_queries(memory):
    """Grouped queries share keys and values: what is stored is as wide as hidden states, or as keys and values."""
    sizes = []
    for heads in (2, 4, 8):
        config = copy.deepcopy(BACKBONES["llama"])
        config.update({"num_attention_heads": heads, "head_dim": 6, "max_position_embeddings": 64})
        backbone = AutoModelForCausalLM.from_config(config)
        state = InfformerForCausalLM.from_backbone(backbone, memory, segment_length=SEGMENT).initial_state(3)
        sizes.append({name: tensor.shape for name, tensor in state.named_tensors().items()})
    assert sizes[0] == sizes[1] == sizes[2]
