import copy
import itertools
import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
)

from infformer.memory.long_term import LongTermMemoryConfig
from infformer.memory.state import MemoryState
from infformer.models.base import MemoryModelOutput
from infformer.models.chunked_loss import IGNORE_INDEX
from infformer.models.pretrained import InfformerConfig, InfformerForCausalLM, _attention_modules

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
MEMORIES = {
    f"{read}-{contraction}{'-sticky' * sticky}": {"read": read, "contraction": contraction, "sticky": sticky}
    for read, contraction, sticky in itertools.product(
        ("affine", "moments", "slots"), ("constant", "uniform"), (False, True)
    )
}
SOME_MEMORIES = ("affine-constant", "affine-uniform-sticky", "moments-constant-sticky", "slots-uniform")
every_memory = pytest.mark.parametrize("options", MEMORIES.values(), ids=MEMORIES)
some_memories = pytest.mark.parametrize("options", [MEMORIES[name] for name in SOME_MEMORIES], ids=SOME_MEMORIES)
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


def assert_same_memory(one: MemoryState, other: MemoryState) -> None:
    assert one.named_tensors().keys() == other.named_tensors().keys()
    for name, tensor in one.named_tensors().items():
        assert torch.equal(tensor, other.named_tensors()[name]), name


class TestTheBackboneIsLeftAlone:
    @every_memory
    def test_new_memories_change_no_bit_of_the_logits(self, stock, new_model, options):
        expected = [stock(segment).logits for segment in document(5)]
        outputs = read(new_model(**options), document(5))
        for output, logits in zip(outputs, expected, strict=True):
            assert torch.equal(output.logits, logits)
        assert outputs[-1].state.layers[0].segments.tolist() == [5, 5]
        assert outputs[-1].state.layers[0].coefficients.abs().max() > 0.01

    @some_memories
    def test_trained_memories_change_them_from_the_second_segment(self, stock, model, options):
        segment = tokens()
        first, second = read(model(**options), [segment, segment])
        assert torch.equal(first.logits, stock(segment).logits)
        assert (second.logits - first.logits).abs().max() > 1e-3

    def test_names_and_values_of_its_parameters(self, stock, model):
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

    def test_on_its_own_it_is_the_stock_model(self, stock, model):
        segment = tokens()
        expected = stock(segment).logits
        wrapped = model()
        read(wrapped, document(2))
        assert torch.equal(wrapped.backbone(segment).logits, expected)

    def test_can_be_wrapped_a_second_time(self, stock, model):
        """The memories of the first wrapping have no part in the second."""
        expected = [stock(segment).logits for segment in document(2)]
        first = model()
        second = InfformerForCausalLM.from_backbone(
            first.backbone, first.config.memory_config, segment_length=SEGMENT
        ).eval()
        assert not torch.equal(read(first, document(2))[1].logits, expected[1])
        for output, logits in zip(read(second, document(2)), expected, strict=True):
            assert torch.equal(output.logits, logits)

    def test_without_memory(self, stock):
        wrapped = InfformerForCausalLM.from_backbone(stock)
        output = wrapped(tokens(), labels=tokens())
        assert output.state == wrapped.initial_state(2)
        assert output.state.layers == ()
        assert output.auxiliary_losses == {}
        torch.testing.assert_close(output.loss, stock(tokens(), labels=tokens()).loss)
        assert torch.equal(wrapped(tokens(), state=output.state).logits, stock(tokens()).logits)

    def test_with_a_memory_in_no_layer(self, stock, new_model):
        wrapped = new_model(memory_layers=[])
        for output, segment in zip(read(wrapped, document(2)), document(2), strict=True):
            assert torch.equal(output.logits, stock(segment).logits)


class TestSaving:
    @some_memories
    def test_round_trip(self, model, options, tmp_path):
        saved = model(**options)
        saved.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is InfformerForCausalLM
        assert loaded.config.memory_config == saved.config.memory_config
        self.assert_equal(saved, loaded)

    def test_round_trip_with_memory_in_some_layers(self, model, tmp_path):
        saved = model(memory_layers=[1])
        saved.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.memory_layers == [1]
        self.assert_equal(saved, loaded)

    def test_round_trip_without_memory(self, stock, tmp_path):
        InfformerForCausalLM.from_backbone(stock).save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.memory_config is None
        assert torch.equal(loaded(tokens()).logits, stock(tokens()).logits)

    def test_round_trip_in_bfloat16(self, stock, new_model, tmp_path):
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
        self.assert_equal(saved, AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto"))

    @staticmethod
    def assert_equal(saved: InfformerForCausalLM, loaded: InfformerForCausalLM) -> None:
        for (name, tensor), (other_name, other) in zip(
            itertools.chain(saved.named_parameters(), saved.named_buffers()),
            itertools.chain(loaded.named_parameters(), loaded.named_buffers()),
            strict=True,
        ):
            assert name == other_name
            assert tensor.dtype == other.dtype, name
            assert torch.equal(tensor, other), name
        for one, other in zip(read(saved, document(3)), read(loaded, document(3)), strict=True):
            assert torch.equal(one.logits, other.logits)
            assert_same_memory(one.state, other.state)

    def test_tied_embeddings_stay_tied(self, stock, model, tmp_path):
        model().save_pretrained(tmp_path)
        backbone = AutoModelForCausalLM.from_pretrained(tmp_path).backbone
        tied = backbone.get_output_embeddings().weight is backbone.get_input_embeddings().weight
        assert tied == stock.config.tie_word_embeddings

    def test_the_backbone_taken_out(self, stock, model, tmp_path):
        """What is saved of it opens as the stock model."""
        model().backbone.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is type(stock)
        assert torch.equal(loaded(tokens()).logits, stock(tokens()).logits)

    def test_a_backbone_by_its_folder(self, stock, tmp_path):
        stock.save_pretrained(tmp_path)
        memory = LongTermMemoryConfig(basis_functions=8)
        wrapped = InfformerForCausalLM.from_backbone(tmp_path, memory, segment_length=SEGMENT)
        assert torch.equal(wrapped(tokens()).logits, stock(tokens()).logits)

    def test_the_memories_alone(self, model, tmp_path):
        one, other = model(), model()
        assert not torch.equal(read(one, document(2))[1].logits, read(other, document(2))[1].logits)
        torch.save(one.memories.state_dict(), tmp_path / "memories.pt")
        other.memories.load_state_dict(torch.load(tmp_path / "memories.pt"))
        assert torch.equal(read(one, document(2))[1].logits, read(other, document(2))[1].logits)
        assert all(name in one.state_dict() for name in (f"memories.{name}" for name in one.memories.state_dict()))

    def test_a_copy_is_a_model_of_its_own(self, stock, model):
        original = model()
        expected = read(original, document(2))[1].logits
        duplicate = copy.deepcopy(original)
        assert torch.equal(read(duplicate, document(2))[1].logits, expected)
        for layer in duplicate.memories:
            nn.init.zeros_(layer.output.weight)
        assert torch.equal(read(original, document(2))[1].logits, expected)
        assert torch.equal(read(duplicate, document(2))[1].logits, stock(document(2)[1]).logits)


class TestErrors:
    @pytest.mark.parametrize("memory_layers", [[2], [0, -1], [0, 0]])
    def test_layers_that_do_not_exist(self, new_model, memory_layers):
        with pytest.raises(ValueError, match=r"model\.memory_layers=.*layers 0 to 1"):
            new_model(memory_layers)

    def test_a_segment_longer_than_the_positions(self, stock):
        memory = LongTermMemoryConfig(basis_functions=8)
        with pytest.raises(ValueError, match="segment_length=17 is longer than the 16 positions"):
            InfformerForCausalLM.from_backbone(stock, memory, segment_length=17)

    def test_more_tokens_than_a_segment(self, new_model):
        with pytest.raises(ValueError, match="13 tokens are more than the memory's segment of 12"):
            new_model()(tokens(length=13))

    def test_a_segment_continued_past_its_end(self, new_model):
        model = new_model()
        output = model(tokens(), use_cache=True)
        with pytest.raises(ValueError, match="13 tokens are more than the memory's segment of 12"):
            model(tokens(length=1), segment_cache=output.segment_cache, use_cache=True)

    @pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
    def test_reentrant_checkpointing(self, new_model):
        """It runs the first forward pass without a graph: the memory would lose its gradient and nobody would know."""
        with pytest.raises(ValueError, match="use_reentrant"):
            new_model().gradient_checkpointing_enable({"use_reentrant": True})

    def test_an_unknown_kind_of_backbone(self):
        config = GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
        )
        backbone = AutoModelForCausalLM.from_config(config)
        with pytest.raises(ValueError, match="'gpt_neox' yet, only of gpt2, llama"):
            InfformerForCausalLM.from_backbone(backbone, LongTermMemoryConfig(), segment_length=SEGMENT)

    def test_a_stored_memory_with_an_unknown_option(self, model, tmp_path):
        model().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["memory"]["stickiness"] = 3
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"config\.json.*stickiness"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_config_opens_by_its_name(self, model, tmp_path):
        model().config.save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        assert isinstance(config, InfformerConfig)
        assert config.backbone.to_dict() == model().config.backbone.to_dict()


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


class TestRows:
    @some_memories
    def test_rows_are_independent(self, model, options):
        wrapped = model(**options)
        changed = [segment.clone() for segment in document(3)]
        for segment in changed:
            segment[1] = (segment[1] + 1) % VOCABULARY
        for one, other in zip(read(wrapped, document(3)), read(wrapped, changed), strict=True):
            assert torch.equal(one.logits[0], other.logits[0])
            assert not torch.equal(one.logits[1], other.logits[1])
        alone = read(wrapped, [segment[:1] for segment in document(3)])
        together = read(wrapped, document(3))
        torch.testing.assert_close(alone[2].logits, together[2].logits[:1], rtol=1e-4, atol=1e-5)

    @some_memories
    def test_a_reset_row_is_a_new_row(self, model, options):
        """Row 0 begins another document at its third segment; row 1 goes on."""
        wrapped = model(**options)
        before = read(wrapped, document(2))[-1].state
        reset = wrapped(tokens(seed=5), state=before, reset=torch.tensor([True, False]))
        fresh, went_on = wrapped(tokens(seed=5)), wrapped(tokens(seed=5), state=before)
        assert torch.equal(reset.logits[0], fresh.logits[0])
        assert torch.equal(reset.logits[1], went_on.logits[1])
        for row, expected in enumerate((fresh, went_on)):
            index = torch.tensor([row])
            assert_same_memory(reset.state.select_rows(index), expected.state.select_rows(index))
        assert reset.state.layers[0].segments.tolist() == [1, 3]

    @some_memories
    @pytest.mark.parametrize("position", [1, 7, 11])
    def test_no_token_sees_a_later_one(self, model, options, position):
        wrapped = model(**options)
        changed = document(3)
        changed[1][:, position:] = (changed[1][:, position:] + 1) % VOCABULARY
        ours, theirs = read(wrapped, document(3)), read(wrapped, changed)
        assert torch.equal(ours[0].logits, theirs[0].logits)
        assert torch.equal(ours[1].logits[:, :position], theirs[1].logits[:, :position])
        assert not torch.equal(ours[1].logits[:, position:], theirs[1].logits[:, position:])
        assert not torch.equal(ours[2].logits[:, 0], theirs[2].logits[:, 0])  # by the memory

    @some_memories
    def test_padding_changes_nothing(self, model, options):
        """A row of 7 real tokens: whatever stands behind them, and beside a whole row as on its own."""
        wrapped = model(**options)
        memory = read(wrapped, document(2))[-1].state
        last, lengths = tokens(seed=9), torch.tensor([7, SEGMENT])
        labels = last.clone()
        labels[0, 7:] = IGNORE_INDEX
        padded = wrapped(last, state=memory, labels=labels, lengths=lengths, return_logits=True)
        other_padding = last.clone()
        other_padding[0, 7:] = 0
        other = wrapped(other_padding, state=memory, labels=labels, lengths=lengths, return_logits=True)
        assert torch.equal(padded.logits[0, :7], other.logits[0, :7])
        assert torch.equal(padded.logits[1], other.logits[1])
        assert torch.equal(padded.token_losses, other.token_losses)
        assert torch.equal(padded.auxiliary_losses["divergence"], other.auxiliary_losses["divergence"])

        short = wrapped(last[:1, :7], state=memory.select_rows(torch.tensor([0])), labels=last[:1, :7])
        torch.testing.assert_close(padded.token_losses[0, :6], short.token_losses[0, :6], rtol=1e-4, atol=1e-5)
        for before, after in zip(memory.layers, padded.state.layers, strict=True):
            assert torch.equal(before.coefficients[0], after.coefficients[0])
            assert not torch.equal(before.coefficients[1], after.coefficients[1])
            assert after.segments.tolist() == [2, 3]

    def test_padding_is_not_scored(self, model):
        """`labels=input_ids` scores 11 tokens of a whole row, 6 of a row of 7, none of a row of 1."""
        output = model()(tokens(3), labels=tokens(3), lengths=torch.tensor([SEGMENT, 7, 1]))
        assert (output.token_losses > 0).sum(1).tolist() == [11, 6, 0]
        assert (output.token_losses[1, :6] > 0).all()

    def test_a_part_of_a_segment_is_not_written(self, model):
        wrapped = model()
        memory = read(wrapped, document(1))[0].state
        assert_same_memory(wrapped(tokens(length=7), state=memory).state, memory)

    def test_random_offsets_matter_to_sticky_memories_alone(self, model):
        offsets = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
        for wrapped in (model(sticky=True), model()):
            memory = read(wrapped, document(2))[-1].state
            plain, again, random = (
                wrapped(tokens(seed=3), state=memory, noise=chosen).state.layers[0].coefficients
                for chosen in (None, torch.full((2, 16), 0.5), offsets)
            )
            assert torch.equal(plain, again)
            assert torch.equal(plain, random) != wrapped.config.memory_config.sticky

    def test_the_memory_of_a_call_is_not_changed_by_it(self, model):
        wrapped = model()
        memory = read(wrapped, document(1))[0].state
        before = memory.map_tensors(Tensor.clone)
        wrapped(tokens(seed=3), state=memory, reset=torch.tensor([True, False]))
        assert_same_memory(memory, before)


class TestTraces:
    @some_memories
    def test_they_say_what_happened_in_each_layer(self, model, options):
        model = model([1, 0], **options)
        memory = read(model, document(2))[-1].state
        seen: dict[int, tuple[Tensor, Tensor]] = {}

        def note(number: int, args: tuple, kwargs: dict, output: tuple) -> None:
            seen[number] = (args[0] if args else kwargs["hidden_states"], output[0])

        for number, attention in enumerate(_attention_modules(model.backbone)):
            attention.register_forward_hook(
                lambda module, args, kwargs, output, number=number: note(number, args, kwargs, output),
                with_kwargs=True,
            )
        plain = model(tokens(), state=memory)
        output = model(tokens(), state=memory, return_intermediates=True)
        assert plain.intermediates is None
        assert torch.equal(output.logits, plain.logits)
        assert_same_memory(output.state, plain.state)
        assert list(model.layer_memories()) == [1, 0]
        for trace, state, (number, layer) in zip(
            output.intermediates, memory.layers, model.layer_memories().items(), strict=True
        ):
            hidden, returned = seen[number]
            assert torch.equal(trace.hidden, hidden)
            expected = layer.read(hidden, state)
            torch.testing.assert_close(trace.memory.context, expected.context)
            for figure, other in zip(trace.memory.reading.attention, expected.attention, strict=True):
                torch.testing.assert_close(figure, other)
            torch.testing.assert_close(trace.attended + trace.memory.context, returned)
            assert trace.memory.context.abs().max() > 1e-3

    def test_without_memory_there_are_none(self, stock):
        model = InfformerForCausalLM.from_backbone(copy.deepcopy(stock), memory_layers=[0])
        assert model(tokens(), return_intermediates=True).intermediates == ()
        assert model.layer_memories() == {}


class TestTimeShuffle:
    @some_memories
    def test_rows_and_layers_are_shuffled_apart_and_empty_ones_stay_empty(self, model, options):
        model = model(**options)
        memory = read(model, document(3, rows=3))[-1].state.reset_rows(torch.tensor([False, True, False]))
        shuffled = model.shuffle_time(memory)
        for row in range(3):
            alone = model.shuffle_time(memory.select_rows(torch.tensor([row])))
            for before, after, single in zip(memory.layers, shuffled.layers, alone.layers, strict=True):
                torch.testing.assert_close(after.coefficients[row], single.coefficients[0])
                assert torch.equal(after.segments, before.segments)
                assert torch.equal(after.coefficients[row], before.coefficients[row]) == (row == 1)
        assert (shuffled.layers[0].coefficients[1] == 0).all()

    def test_without_memory_there_is_nothing_to_shuffle(self, stock):
        model = InfformerForCausalLM.from_backbone(copy.deepcopy(stock))
        memory = model.initial_state(2)
        assert model.shuffle_time(memory) == memory
        assert model.short_term_length == 0


class TestLosses:
    def test_labels_are_shift_labels_one_to_the_right(self, stock, model):
        wrapped = model()
        segment = tokens()
        shifted = F.pad(segment[:, 1:], (0, 1), value=IGNORE_INDEX)
        one, other = wrapped(segment, labels=segment), wrapped(segment, targets=shifted)
        assert torch.equal(one.token_losses, other.token_losses)
        assert torch.equal(one.loss, other.loss)
        assert (one.token_losses[:, -1] == 0).all()
        torch.testing.assert_close(one.loss, stock(segment, labels=segment).loss)  # an empty memory

    @some_memories
    def test_a_document_in_segments_token_by_token(self, model, options):
        """Every token of a document but its first is scored once, at its place, from the logits."""
        wrapped = model(**options)
        text = torch.cat(document(3), dim=1)
        following = F.pad(text[:, 1:], (0, 1), value=IGNORE_INDEX)
        memory, plain_memory, total, literal = None, None, 0.0, 0.0
        for segment, labels in zip(text.split(SEGMENT, dim=1), following.split(SEGMENT, dim=1), strict=True):
            output = wrapped(segment, targets=labels, state=memory)
            total, memory = total + output.token_losses.double().sum(), output.state
            plain = wrapped(segment, state=plain_memory)
            plain_memory = plain.state
            for row, place in itertools.product(range(2), range(SEGMENT)):
                if labels[row, place] != IGNORE_INDEX:
                    literal -= plain.logits[row, place].double().log_softmax(-1)[labels[row, place]]
        assert (following != IGNORE_INDEX).sum() == 2 * (3 * SEGMENT - 1)
        torch.testing.assert_close(total, literal, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("options", [{}, {"read": "moments"}, {"read": "slots"}])
    def test_loss_and_divergence_literally(self, model, options):
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

    def test_divergence_of_empty_memories_is_nothing(self, model):
        output = model(divergence_weight=1.0)(tokens(), labels=tokens())
        assert output.auxiliary_losses["divergence"] == 0

    def test_logits_are_made_when_asked_for(self, model):
        wrapped = model()
        assert wrapped(tokens(), labels=tokens()).logits is None
        assert wrapped(tokens(), return_logits=False).logits is None
        assert wrapped(tokens()).loss is None
        assert torch.equal(wrapped(tokens(), labels=tokens(), return_logits=True).logits, wrapped(tokens()).logits)

    @some_memories
    def test_bfloat16_autocast(self, model, options):
        wrapped = model(**options).train()
        memory, losses = None, []
        for segment in document(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = wrapped(segment, labels=segment, state=memory)
            memory = output.state
            losses.append(output.loss)
            assert output.state.layers[0].coefficients.dtype == torch.float32
        sum(losses).backward()
        assert torch.stack(losses).isfinite().all()
        assert all(p.grad.isfinite().all() for p in wrapped.parameters() if p.grad is not None)

    def test_a_model_in_bfloat16_is_near_the_float32_one(self, model):
        wrapped = model()
        exact = read(wrapped, document(3))[-1].logits
        rounded = read(wrapped.to(torch.bfloat16), document(3))[-1]
        assert rounded.logits.dtype == torch.bfloat16
        assert rounded.state.layers[0].coefficients.dtype == torch.float32
        assert (rounded.logits - exact).norm() < 0.05 * exact.norm()


class TestGradients:
    @staticmethod
    def train_three_segments(model: InfformerForCausalLM) -> tuple[list[Tensor], dict[str, Tensor]]:
        """One backward pass through three segments; dropout draws the same numbers every time."""
        torch.manual_seed(0)
        model.train().zero_grad()
        losses = [output.loss for output in read_with_labels(model, document(3))]
        sum(losses).backward()
        return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    @some_memories
    def test_gradient_checkpointing_changes_nothing(self, model, options):
        wrapped = model(**options, input_gate=True)
        calls: list[bool] = []
        for module in wrapped.backbone.modules():
            if type(module).__name__.endswith("Attention"):
                module.register_forward_hook(lambda *_: calls.append(True))
        losses, gradients = self.train_three_segments(wrapped)
        assert len(calls) == 2 * 3
        wrapped.checkpoint_activations()
        calls.clear()
        again, gradients_again = self.train_three_segments(wrapped)
        assert len(calls) == 2 * 2 * 3  # recomputed

        assert torch.equal(torch.stack(losses), torch.stack(again))
        assert gradients.keys() == gradients_again.keys() == dict(wrapped.named_parameters()).keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, gradients_again[name], rtol=1e-5, atol=1e-7, msg=name)

    def test_gradients_reach_the_first_segment_through_the_memory(self, model):
        wrapped = model()
        first, second = document(2)
        embedded: list[Tensor] = []
        wrapped.get_input_embeddings().register_forward_hook(lambda module, args, output: embedded.append(output))
        read_with_labels(wrapped, [first, second])[1].loss.backward(inputs=embedded[:1])
        assert (embedded[0].grad.abs().sum(-1) > 0).all()

    def test_a_detached_memory_stops_them(self, model):
        wrapped = model()
        memory = read(wrapped, document(1))[0].state
        assert memory.layers[0].coefficients.requires_grad
        assert not any(tensor.requires_grad for tensor in memory.detach().named_tensors().values())

    @some_memories
    def test_every_parameter_is_used_in_the_very_first_step(self, new_model, options):
        """With an empty memory, as data parallel training needs it."""
        model = new_model(**options)
        model(tokens(), labels=tokens()).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def read_with_labels(model: InfformerForCausalLM, segments: list[Tensor]) -> list[MemoryModelOutput]:
    outputs: list[MemoryModelOutput] = []
    for segment in segments:
        outputs.append(model(segment, labels=segment, state=outputs[-1].state if outputs else None))
    return outputs


class TestGeneration:
    @some_memories
    def test_with_cache_as_without(self, model, options):
        """Greedy continuation of 5 tokens by 7, within a segment, after two segments."""
        wrapped = model(**options)
        memory = read(wrapped, document(2))[-1].state
        text, cached, cache = tokens(length=5, seed=8), tokens(length=5, seed=8), None
        for _ in range(SEGMENT - 5):
            logits = wrapped(text, state=memory).logits[:, -1]
            new = cached if cache is None else cached[:, -1:]
            output = wrapped(new, state=memory, segment_cache=cache, use_cache=True)
            cache = output.segment_cache
            torch.testing.assert_close(output.logits[:, -1], logits, rtol=1e-4, atol=1e-5)
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
            cached = torch.cat([cached, output.logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(text, cached)
        assert wrapped(text, state=memory).segment_cache is None
