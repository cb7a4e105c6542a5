"""The decoder against its own equations, and what it promises of segments, rows and memories."""

import copy
import itertools
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from infformer.errors import UserError
from infformer.memory.compressive import CompressiveMemoryConfig
from infformer.memory.long_term import LongTermMemoryConfig, LongTermState
from infformer.memory.memory import Memory
from infformer.memory.options import MemoryConfig
from infformer.memory.short_term import Queue
from infformer.memory.state import MemoryState
from infformer.models.base import MemoryModelOutput, ModelError
from infformer.models.chunked_loss import IGNORE_INDEX
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.generation import continue_text

SEGMENT, VOCABULARY, HIDDEN, HEADS, HEAD, SAMPLES = 6, 50, 12, 3, 6, 16


def long_term(short_term_length: int = 0, **options) -> LongTermMemoryConfig:
    return LongTermMemoryConfig(short_term_length, basis_functions=8, past_samples=SAMPLES, **options)


def compressive(**options) -> CompressiveMemoryConfig:
    return CompressiveMemoryConfig(SEGMENT, **{"length": 5, "rate": 2, **options})


MEMORIES = {
    "none": None,
    "short": MemoryConfig(8),
    "convolution": compressive(),
    "most used": compressive(function="most_used"),
    "long": long_term(),
    "short and sticky": long_term(SEGMENT, sticky=True, read="moments"),
    "short and uniform": long_term(2 * SEGMENT, contraction="uniform", read="slots"),
}
REMEMBERING = {name: memory for name, memory in MEMORIES.items() if memory is not None}
WITH_LONG_TERM = {name: memory for name, memory in REMEMBERING.items() if isinstance(memory, LongTermMemoryConfig)}
every_memory = pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
every_remembering = pytest.mark.parametrize("memory", REMEMBERING.values(), ids=REMEMBERING)
every_long_term = pytest.mark.parametrize("memory", WITH_LONG_TERM.values(), ids=WITH_LONG_TERM)
every_scheme = pytest.mark.parametrize("positions", ["relative", "rotary"])


def configure(memory: MemoryConfig | dict | None = None, **architecture) -> DecoderConfig:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "head_size": HEAD,
        "feed_forward_size": 20,
        "dropout": 0.2,
        "attention_dropout": 0.1,
    }
    return DecoderConfig(**{**sizes, "memory": memory, "segment_length": SEGMENT, **architecture})


def trained(memory: MemoryConfig | None = None, **architecture) -> DecoderForCausalLM:
    """A model in which everything matters."""
    model = DecoderForCausalLM(configure(memory, **architecture)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return model


def with_weights_of(model: DecoderForCausalLM, config: DecoderConfig) -> DecoderForCausalLM:
    other = DecoderForCausalLM(config).to(model.dtype).eval()
    other.load_state_dict(model.state_dict())
    return other


def tokens(rows: int = 2, length: int = SEGMENT, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def document(segments: int, rows: int = 2) -> list[Tensor]:
    return [tokens(rows, seed=seed) for seed in range(segments)]


def empty(model: DecoderForCausalLM, rows: int = 2) -> MemoryState:
    """Empty memories in the type of the model: by default they are float32."""
    memory = model.initial_state(rows)
    return memory.map_tensors(lambda tensor: tensor.to(model.dtype) if tensor.is_floating_point() else tensor)


def read(
    model: DecoderForCausalLM, segments: list[Tensor], memory: MemoryState | None = None, labelled: bool = False
) -> list[MemoryModelOutput]:
    """One segment after another, each with the memory of the last."""
    outputs, memory = [], empty(model, len(segments[0])) if memory is None else memory
    for segment in segments:
        outputs.append(model(segment, labels=segment if labelled else None, state=memory, return_logits=True))
        memory = outputs[-1].state
    return outputs


def watch(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The first argument and the result of every call from now on."""
    calls: list[tuple[Tensor, Tensor]] = []
    module.register_forward_hook(lambda module, args, output: calls.append((args[0], output)))
    return calls


def assert_same_memory(one: MemoryState, other: MemoryState) -> None:
    assert one.named_tensors().keys() == other.named_tensors().keys()
    for name, tensor in one.named_tensors().items():
        assert torch.equal(tensor, other.named_tensors()[name]), name


def behind(memory: Memory | MemoryState) -> Any:
    """What stands behind a short-term memory, or is alone."""
    return getattr(memory, "behind", memory)


def queues(state: MemoryState) -> list[Queue]:
    return [part for part in (getattr(state, "short_term", None), behind(state)) if isinstance(part, Queue)]


def changed_somewhere(one: MemoryState, other: MemoryState, row: int) -> bool:
    ours, theirs = one.named_tensors(), other.named_tensors()
    return any(not torch.equal(tensor[row], theirs[name][row]) for name, tensor in ours.items())


class TestAgainstItsEquations:
    @pytest.mark.parametrize("activation", ["relu", "silu"])
    @pytest.mark.parametrize("placement", ["post", "pre"])
    @pytest.mark.parametrize("normalization", ["layer", "rms"])
    def test_layer_by_layer(self, normalization, placement, activation):
        """Without memory, at double precision; attention has tests of its own."""
        model = trained(normalization=normalization, normalization_placement=placement, activation=activation).double()
        ids = tokens(length=9)
        encoding = torch.tensor(
            [
                [f(distance / 10000 ** (2 * k / HIDDEN)) for f in (math.sin, math.cos) for k in range(HIDDEN // 2)]
                for distance in reversed(range(9))
            ]
        ).double()
        causal = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9)

        def norm(module: nn.Module, hidden: Tensor) -> Tensor:
            if normalization == "layer":
                centred = hidden - hidden.mean(-1, keepdim=True)
                return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight + module.bias
            return hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight

        table = model.vocabulary.embedding.weight
        hidden = table[ids] * math.sqrt(HIDDEN)
        for layer in model.layers:

            def attend(hidden: Tensor, layer: nn.Module = layer) -> Tensor:
                return layer.attention(hidden, hidden, causal, encoding)

            def transform(hidden: Tensor, part: nn.Module = layer.feed_forward) -> Tensor:
                inner = hidden @ part.expand.weight.T + part.expand.bias
                inner = inner * (inner > 0) if activation == "relu" else inner / (1 + torch.exp(-inner))
                return inner @ part.contract.weight.T + part.contract.bias

            if placement == "post":
                hidden = norm(layer.attention_residual.norm, hidden + attend(hidden))
                hidden = norm(layer.feed_forward_residual.norm, hidden + transform(hidden))
            else:
                hidden = hidden + attend(norm(layer.attention_residual.norm, hidden))
                hidden = hidden + transform(norm(layer.feed_forward_residual.norm, hidden))
        if placement == "pre":
            hidden = norm(model.final_norm, hidden)
        expected = hidden @ table.T + model.vocabulary.bias
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)  # sines are float32
        assert (model.final_norm is None) == (placement == "post")

    @pytest.mark.parametrize("placement", ["post", "pre"])
    def test_one_softmax_over_compressed_short_term_and_segment(self, placement):
        """The rows' memories are full to different degrees; the sum is over what is real."""
        memory = compressive(length=8, function="mean")
        model = trained(memory, normalization_placement=placement).double()
        state = empty(model, 3)
        for segment, lengths in zip(document(4, rows=3), ([6, 6, 6], [6, 2, 0], [6, 6, 0], [6, 6, 0]), strict=True):
            state = model(segment, state=state, lengths=torch.tensor(lengths)).state
        assert [layer.behind.filled.tolist() for layer in state.layers] == [[8, 6, 0]] * 2
        assert [layer.short_term.filled.tolist() for layer in state.layers] == [[6, 6, 6]] * 2

        calls = [watch(layer.attention) for layer in model.layers]
        model(tokens(3, seed=9), state=state)
        for index, layer in enumerate(model.layers):
            attention, queue = layer.attention, state.layers[index]
            for row in range(3):
                hidden, attended = (tensor[row] for tensor in calls[index][0])
                parts = (part.entries[row][part.real[row]] for part in (queue.behind, queue.short_term))
                context = torch.cat([*parts, hidden])
                earlier = len(context) - SEGMENT
                distances = (earlier + torch.arange(SEGMENT))[:, None] - torch.arange(len(context))
                angles = distances[..., None] * 10000 ** (-torch.arange(0, HIDDEN, 2) / HIDDEN)
                encoded = torch.cat([angles.sin(), angles.cos()], dim=-1).double() @ attention.distance.weight.T
                query, key, value = (
                    (source @ projection.weight.T).unflatten(-1, (HEADS, HEAD))
                    for projection, source in (
                        (attention.query, hidden),
                        (attention.key, context),
                        (attention.value, context),
                    )
                )
                content = query + attention.content_bias[:, 0]
                distance = query + attention.distance_bias[:, 0]
                scores = torch.einsum("ihe,jhe->hij", content, key)
                scores += torch.einsum("ihe,ijhe->hij", distance, encoded.unflatten(-1, (HEADS, HEAD)))
                weights = (scores / math.sqrt(HEAD)).masked_fill(distances < 0, -math.inf).softmax(-1)
                expected = torch.einsum("hij,jhe->ihe", weights, value).flatten(1) @ attention.output.weight.T
                torch.testing.assert_close(attended, expected, rtol=1e-5, atol=1e-6)  # sines are float32

    @every_long_term
    @pytest.mark.parametrize("random_offsets", [False, True])
    def test_the_long_term_memory_gets_what_leaves_the_short_term_memory(self, memory, random_offsets):
        """Against the memory alone, given the segments by hand; and what it reads is added to what attention reads."""
        model = trained(memory, normalization_placement="pre")
        attentions = [watch(layer.attention) for layer in model.layers]
        before = [watch(layer.attention_residual.norm) for layer in model.layers]
        after = [watch(layer.feed_forward_residual.norm) for layer in model.layers]
        delay = memory.short_term_length // SEGMENT
        memories = [behind(layer.memory) for layer in model.layers]
        states = [alone.initial_state(2) for alone in memories]
        state = model.initial_state(2)
        for number, segment in enumerate(document(5)):
            offsets = None
            if random_offsets:
                offsets = torch.rand(2, SAMPLES, generator=torch.Generator().manual_seed(number))
            state = model(segment, state=state, noise=offsets).state
            for index, alone in enumerate(memories):
                seen, attended = attentions[index][number]
                reading = alone.read(seen, states[index])
                residual, summed = before[index][number][0], after[index][number][0]
                torch.testing.assert_close(summed, residual + attended + reading.context)
                if number >= delay:
                    operators = alone.signal.operators(states[index].segments)
                    leaving = attentions[index][number - delay][0]
                    states[index] = alone.write(leaving, states[index], operators, reading.attention, offsets)
                assert_same_memory(behind(state.layers[index]), states[index])
                assert behind(state.layers[index]).segments.tolist() == [max(number + 1 - delay, 0)] * 2
            assert (reading.context.abs().max() > 1e-3) == (number > delay)

    def test_the_reconstruction_error_literally(self):
        """Of what leaves in each layer, by the layer's own attention; rows in which nothing leaves count as zero."""
        memory = compressive(reconstruction_weight=0.7)
        model = trained(memory, normalization_placement="pre").double()
        state = empty(model, 3)
        for segment, lengths in zip(document(2, rows=3), ([6, 6, 0], [6, 6, 6]), strict=True):
            state = model(segment, state=state, lengths=torch.tensor(lengths)).state
        state = state.reset_rows(torch.tensor([False, True, False]))
        calls = [watch(layer.attention) for layer in model.layers]
        output = model(tokens(3, seed=9), state=state)
        total = 0.0
        for index, layer in enumerate(model.layers):
            convolution = layer.memory.behind.compression.convolution
            for row in (0, 2):  # row 1 is new
                leaving = state.layers[index].short_term.entries[row]
                compressed = torch.stack(
                    [
                        sum(convolution.weight[:, :, k] @ leaving[start + k] for k in range(2)) + convolution.bias
                        for start in range(0, SEGMENT, 2)
                    ]
                )
                whole, parts = (
                    layer.attention.attend_by_content(calls[index][0][0][row : row + 1], entries.unsqueeze(0))[0]
                    for entries in (leaving, compressed)
                )
                total += (whole - parts).square().mean(-1).sum()
        assert output.auxiliary_losses.keys() == {"reconstruction"}
        torch.testing.assert_close(output.auxiliary_losses["reconstruction"], 0.7 * total / (3 * SEGMENT))

    def test_a_compression_that_loses_nothing_has_no_error(self):
        model = trained(compressive(rate=1)).double()
        for layer in model.layers:
            nn.init.dirac_(layer.memory.behind.compression.convolution.weight)
            nn.init.zeros_(layer.memory.behind.compression.convolution.bias)
        outputs = read(model, document(4))
        assert max(output.auxiliary_losses["reconstruction"] for output in outputs) < 1e-25
        assert outputs[-1].state.layers[0].behind.filled.tolist() == [5, 5]


class TestSegments:
    @every_scheme
    @pytest.mark.parametrize("placement", ["post", "pre"])
    @pytest.mark.parametrize("layers", [1, 3])
    def test_a_memory_of_everything_equals_one_long_segment(self, positions, placement, layers):
        architecture = {
            "positions": positions,
            "normalization_placement": placement,
            "num_hidden_layers": layers,
        }
        in_parts = trained(MemoryConfig(4 * SEGMENT), **architecture).double()
        at_once = with_weights_of(in_parts, configure(**architecture))
        text = document(5)
        expected = at_once(torch.cat(text, dim=1)).logits
        logits = torch.cat([output.logits for output in read(in_parts, text)], dim=1)
        tolerance = 1e-10 if positions == "relative" else 1e-5  # angles of places are float32
        torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)

    @every_scheme
    @pytest.mark.parametrize("length", [3, SEGMENT, 8])
    def test_how_far_one_layer_sees(self, positions, length):
        """Position i: the last M + (i mod T) tokens and itself; a change of another token changes no bit."""
        model = trained(MemoryConfig(length), num_hidden_layers=1, positions=positions)
        text = torch.cat(document(5, rows=1), dim=1)

        def logits(text: Tensor) -> Tensor:
            return torch.cat([output.logits for output in read(model, list(text.split(SEGMENT, dim=1)))], dim=1)[0]

        expected = logits(text)
        for place in range(text.shape[1]):
            other = text.clone()
            other[0, place] = (other[0, place] + 1) % VOCABULARY
            changed = (logits(other) != expected).any(-1)
            sees = [i for i in range(text.shape[1]) if 0 <= i - place <= length + i % SEGMENT]
            assert changed.nonzero().flatten().tolist() == sees

    def test_without_memory_segments_are_independent(self):
        model = trained()
        for output, segment in zip(read(model, document(3)), document(3), strict=True):
            assert torch.equal(output.logits, model(segment).logits)
            assert output.auxiliary_losses == {}

    @every_remembering
    def test_empty_memories_change_nothing(self, memory):
        """The first segment reads what a model without memory reads; the later ones do not."""
        model = trained(memory).double()
        without = DecoderForCausalLM(configure()).double().eval()
        without.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "memory" not in name})
        expected = [without(segment).logits for segment in document(4)]
        outputs = read(model, document(4))
        torch.testing.assert_close(outputs[0].logits, expected[0], rtol=1e-10, atol=1e-10)
        assert (outputs[3].logits - expected[3]).abs().max() > 1e-3

    @every_scheme
    @pytest.mark.parametrize("memory", ["short", "convolution", "short and sticky"])
    def test_a_longer_short_term_memory_with_the_same_weights(self, memory, positions):
        """While both hold all that was read, they say the same; afterwards the longer one knows more."""
        shorter = trained(replace(MEMORIES[memory], short_term_length=SEGMENT), positions=positions).double()
        config = copy.deepcopy(shorter.config)
        config.memory["short_term_length"] = 3 * SEGMENT
        longer = with_weights_of(shorter, config)
        pairs = list(zip(read(shorter, document(5)), read(longer, document(5)), strict=True))
        for one, other in pairs[:2]:
            tolerance = 1e-10 if positions == "relative" else 1e-5
            torch.testing.assert_close(one.logits, other.logits, rtol=tolerance, atol=tolerance)
        for one, other in pairs[2:]:
            assert (one.logits - other.logits).abs().max() > 1e-3
        assert pairs[-1][1].state.layers[0].short_term.filled.tolist() == [3 * SEGMENT] * 2


class TestWithinASegment:
    @every_memory
    @every_scheme
    def test_with_cache_as_at_once(self, memory, positions):
        model = trained(memory, positions=positions).double()
        state = read(model, document(3))[-1].state
        segment = tokens(seed=7)
        logits, cache = [], None
        for piece in segment.split([2, 1, 1, 2], dim=1):
            output = model(piece, state=state, segment_cache=cache, use_cache=True)
            logits.append(output.logits)
            cache = output.segment_cache
            assert_same_memory(output.state, state)
        whole = model(segment, state=state)
        tolerance = 1e-10 if positions == "relative" else 1e-5
        torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, rtol=tolerance, atol=tolerance)
        assert whole.segment_cache is None

    @every_memory
    @pytest.mark.parametrize(("length", "temperature"), [(1, 1), (2 * SEGMENT, 0)])
    @torch.no_grad()
    def test_text_is_continued_as_a_literal_loop_would(self, memory, length, temperature):
        """Every token by reading everything anew."""
        model, start = trained(memory), tokens(1, length, seed=length)[0]
        text, generator = start, torch.Generator().manual_seed(0)
        for _ in range(SEGMENT + 4):
            logits = read(model, [segment.unsqueeze(0) for segment in text.split(SEGMENT)])[-1].logits[0, -1]
            if temperature == 0:
                token = logits.argmax(keepdim=True)
            else:
                token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            text = torch.cat([text, token])
        generator.manual_seed(0)
        continued = continue_text(model, start, SEGMENT + 4, SEGMENT, temperature, generator)
        assert continued.tolist() == text[length:].tolist()

    @every_remembering
    def test_a_part_of_a_segment_is_not_written(self, memory):
        model = trained(memory)
        state = read(model, document(3))[-1].state
        assert_same_memory(model(tokens(length=4), state=state).state, state)


class TestRows:
    @every_memory
    def test_rows_are_independent(self, memory):
        model = trained(memory)
        changed = [segment.clone() for segment in document(4, rows=3)]
        for segment in changed:
            segment[1] = (segment[1] + 1) % VOCABULARY
        together = read(model, document(4, rows=3))
        for one, other in zip(together, read(model, changed), strict=True):
            assert torch.equal(one.logits[[0, 2]], other.logits[[0, 2]])
            assert not torch.equal(one.logits[1], other.logits[1])
        for row in range(3):
            alone = read(model, [segment[row : row + 1] for segment in document(4, rows=3)])
            torch.testing.assert_close(alone[3].logits, together[3].logits[row : row + 1], rtol=1e-4, atol=1e-4)

    @every_memory
    def test_a_reset_row_is_a_new_row(self, memory):
        """Row 0 begins another document; row 1 goes on."""
        model = trained(memory)
        before = read(model, document(4))[-1].state
        reset = model(tokens(seed=5), state=before, reset=torch.tensor([True, False]))
        fresh, went_on = model(tokens(seed=5)), model(tokens(seed=5), state=before)
        for row, expected in enumerate((fresh, went_on)):
            assert torch.equal(reset.logits[row], expected.logits[row])
            index = torch.tensor([row])
            assert_same_memory(reset.state.select_rows(index), expected.state.select_rows(index))
        assert torch.equal(fresh.logits[0], went_on.logits[0]) == (memory is None)

    @every_memory
    @pytest.mark.parametrize("position", [1, SEGMENT - 1])
    def test_no_token_sees_a_later_one(self, memory, position):
        model = trained(memory)
        changed = document(5)
        changed[1][:, position:] = (changed[1][:, position:] + 1) % VOCABULARY
        ours, theirs = read(model, document(5)), read(model, changed)
        assert torch.equal(ours[0].logits, theirs[0].logits)
        assert torch.equal(ours[1].logits[:, :position], theirs[1].logits[:, :position])
        assert (ours[1].logits[:, position:] != theirs[1].logits[:, position:]).any(-1).all()
        for one, other in zip(ours[2:], theirs[2:], strict=True):  # by the memory
            if memory is None:
                assert torch.equal(one.logits, other.logits)
        if memory is not None:
            assert not torch.equal(ours[2].logits[:, 0], theirs[2].logits[:, 0])

    @every_memory
    def test_padding_changes_nothing(self, memory):
        """A row of 4 real tokens: whatever stands behind them, and beside a whole row as on its own."""
        model = trained(memory)
        state = read(model, document(4))[-1].state
        lengths = torch.tensor([4, SEGMENT])
        last, other_padding = tokens(seed=9), tokens(seed=9)
        other_padding[0, 4:] = (other_padding[0, 4:] + 1) % VOCABULARY
        padded, other = (
            model(segment, state=state, targets=segment, lengths=lengths, return_logits=True)
            for segment in (last, other_padding)
        )
        assert torch.equal(padded.logits[0, :4], other.logits[0, :4])
        assert torch.equal(padded.logits[1], other.logits[1])
        assert torch.equal(padded.token_losses, other.token_losses)
        assert ((padded.token_losses > 0).sum(1) == lengths).all()
        assert torch.equal(padded.loss, other.loss)
        assert_same_memory(padded.state, other.state)

        short = model(last[:1, :4], state=state.select_rows(torch.tensor([0])), targets=last[:1, :4])
        torch.testing.assert_close(padded.token_losses[:1, :4], short.token_losses, rtol=1e-4, atol=1e-5)
        index = torch.tensor([0])
        assert_same_memory(padded.state.select_rows(index), state.select_rows(index))
        assert changed_somewhere(padded.state, state, row=1) == (memory is not None)

    @every_memory
    @pytest.mark.parametrize("lengths", [[0, SEGMENT], [0, 0]])
    def test_an_idle_row_is_left_alone(self, memory, lengths):
        """Its memory stays, nothing of it is scored, and it makes nothing that is not a number, also if it is new."""
        model = trained(memory).train()
        for state in (read(model, document(3))[-1].state, empty(model)):
            model.zero_grad()
            segment = tokens(seed=9)
            output = model(segment, state=state, targets=segment, lengths=torch.tensor(lengths))
            output.loss.backward()
            assert (output.token_losses[0] == 0).all()
            assert output.loss.isfinite()
            assert (output.loss > 0) == (lengths[1] > 0)
            assert all(
                parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None
            )
            index = torch.tensor([0])
            assert_same_memory(output.state.select_rows(index), state.select_rows(index))

    @every_remembering
    def test_the_memory_of_a_call_is_not_changed_by_it(self, memory):
        model = trained(memory)
        state = read(model, document(3))[-1].state
        before = state.map_tensors(Tensor.clone)
        model(tokens(seed=3), state=state, reset=torch.tensor([True, False]))
        assert_same_memory(state, before)

    @every_memory
    def test_the_state_goes_to_a_file_and_back(self, memory):
        model = trained(memory)
        outputs = read(model, document(4, rows=4))
        state = outputs[-1].state
        empty_state = model.initial_state(4)
        assert list(empty_state.named_tensors()) == list(state.named_tensors())
        assert_same_memory(empty_state.with_tensors(state.named_tensors()), state)
        assert_same_memory(type(state).concatenate(state.split(2)), state)
        halves = [model(half, state=part) for half, part in zip(tokens(4).split(2), state.split(2), strict=True)]
        whole = model(tokens(4), state=state)
        torch.testing.assert_close(torch.cat([half.logits for half in halves]), whole.logits, rtol=1e-4, atol=1e-4)


class TestTraces:
    @every_memory
    def test_they_say_what_happened_in_each_layer(self, memory):
        model = trained(memory)
        before = read(model, document(4))[-1].state
        calls = [watch(layer.attention) for layer in model.layers]
        plain = model(tokens(seed=9), state=before)
        output = model(tokens(seed=9), state=before, return_intermediates=True)
        assert plain.intermediates is None
        assert torch.equal(output.logits, plain.logits)
        assert_same_memory(output.state, plain.state)
        remembering = list(model.layer_memories().values())
        assert len(remembering) == (0 if memory is None else 2)
        for trace, own, state, ((hidden, attended), _) in zip(
            output.intermediates, remembering, before.layers, calls if remembering else [], strict=True
        ):
            assert torch.equal(trace.hidden, hidden)
            assert torch.equal(trace.attended, attended)
            assert (trace.memory.context is None) == (not isinstance(memory, LongTermMemoryConfig))
            if trace.memory.context is not None:
                context = behind(own).read(hidden, behind(state)).context
                torch.testing.assert_close(trace.memory.context, context)
                assert context.abs().max() > 1e-3


class TestTimeShuffle:
    @every_memory
    def test_every_memory_keeps_what_it_holds_in_another_order(self, memory):
        model = trained(memory)
        before = read(model, document(4, rows=3))[-1].state.reset_rows(torch.tensor([False, True, False]))
        after = model.shuffle_time(before)
        for old, new in zip(before.layers, after.layers, strict=True):
            for queue, shuffled in zip(queues(old), queues(new), strict=True):
                assert torch.equal(shuffled.filled, queue.filled)
                for row in range(3):
                    assert sorted(shuffled.entries[row].tolist()) == sorted(queue.entries[row].tolist())
                    if queue.filled[row] > 1:
                        assert not torch.equal(shuffled.entries[row], queue.entries[row])
            old, new = behind(old), behind(new)
            if isinstance(old, LongTermState):
                assert torch.equal(new.segments, old.segments)
                assert torch.equal(new.coefficients, model.time_shuffle() @ old.coefficients)
                assert (new.coefficients[1] == 0).all()

    @every_memory
    def test_how_long_the_short_term_memory_is(self, memory):
        assert trained(memory).short_term_length == (0 if memory is None else memory.short_term_length)


class TestLosses:
    @every_memory
    def test_labels_and_shift_labels(self, memory):
        """`labels` are shifted inside and lose one at the end; `targets` are not and lose none."""
        model = trained(memory, dropout=0.0, attention_dropout=0.0)
        state, segment = read(model, document(3))[-1].state, tokens(seed=9)
        following = torch.roll(segment, -1, dims=1)
        by_labels = model(segment, labels=segment, state=state)
        by_shifted = model(segment, targets=following, state=state)
        logits = model(segment, state=state).logits
        expected = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none").view(2, SEGMENT)
        auxiliary = sum(by_labels.auxiliary_losses.values())
        torch.testing.assert_close(by_shifted.token_losses, expected)
        torch.testing.assert_close(by_shifted.loss, expected.mean() + auxiliary)
        torch.testing.assert_close(by_labels.token_losses, F.pad(expected[:, :-1], (0, 1)))
        torch.testing.assert_close(by_labels.loss, expected[:, :-1].mean() + auxiliary)
        assert by_labels.logits is None

    def test_what_has_no_label_is_not_scored(self):
        model, segment = trained(), tokens(seed=9)
        labels = segment.masked_fill(torch.arange(SEGMENT) % 2 == 0, IGNORE_INDEX)
        output = model(segment, targets=labels)
        assert ((output.token_losses > 0) == (labels != IGNORE_INDEX)).all()
        torch.testing.assert_close(output.loss, output.token_losses.sum() / (2 * SEGMENT / 2))

    @pytest.mark.parametrize("memory", ["convolution", "most used", "long", "short and sticky"])
    def test_of_a_batch_are_the_mean_of_its_halves(self, memory):
        """Weighted by their real tokens; some rows are new, padded or idle."""
        model = trained(MEMORIES[memory]).double()
        state = read(model, document(3, rows=4))[-1].state.reset_rows(torch.tensor([False, True, False, False]))
        segment, lengths = tokens(4, seed=9), torch.tensor([6, 6, 6, 0])
        whole = model(segment, state=state, lengths=lengths).auxiliary_losses
        halves = [
            model(half, state=part, lengths=real).auxiliary_losses
            for half, part, real in zip(segment.split(2), state.split(2), lengths.split(2), strict=True)
        ]
        assert whole.keys() == halves[0].keys() != set()
        for name, value in whole.items():
            assert value > 0
            assert halves[0][name] != halves[1][name]
            torch.testing.assert_close(value, (12 * halves[0][name] + 6 * halves[1][name]) / 18)

    def test_the_divergence_counts_rows_with_a_memory_alone(self):
        model = trained(MEMORIES["long"])
        state = read(model, document(2))[-1].state
        segment = tokens(seed=9)
        both = model(segment, state=state).auxiliary_losses["divergence"]
        first, second = (
            model(segment, state=state, reset=torch.tensor(reset)).auxiliary_losses["divergence"]
            for reset in ([True, False], [False, True])
        )
        torch.testing.assert_close(first + second, both)
        assert model(segment).auxiliary_losses["divergence"] == 0

    @every_memory
    def test_the_names_are_the_same_in_every_segment(self, memory):
        model = trained(memory)
        names = {tuple(output.auxiliary_losses) for output in read(model, document(4))}
        assert names == {tuple(model(tokens(length=2)).auxiliary_losses)}

    @every_memory
    def test_bfloat16_is_near_float32(self, memory):
        """By autocast and as a whole; what is remembered stays float32."""
        model = trained(memory)
        exact = read(model, document(4))[-1].logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = read(model, document(4), labelled=True)[-1]
        assert cast.loss.isfinite()
        model.to(torch.bfloat16)
        rounded = read(model, document(4), memory=model.initial_state(2))[-1]
        for output in (cast, rounded):
            assert output.logits.dtype == torch.bfloat16
            assert (output.logits - exact).norm() < 0.1 * exact.norm()
            floating = [t for t in output.state.named_tensors().values() if t.is_floating_point()]
            assert {tensor.dtype for tensor in floating} == (set() if memory is None else {torch.float32})


class TestGradients:
    @staticmethod
    def train_four_segments(model: DecoderForCausalLM) -> tuple[list[Tensor], dict[str, Tensor]]:
        """One backward pass through four segments; dropout draws the same numbers every time."""
        torch.manual_seed(0)
        model.train().zero_grad()
        losses = [output.loss for output in read(model, document(4), labelled=True)]
        sum(losses).backward()
        return losses, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    @every_memory
    def test_gradient_checkpointing_changes_nothing(self, memory):
        model = trained(memory)
        calls = [watch(layer.attention) for layer in model.layers]
        losses, gradients = self.train_four_segments(model)
        assert [len(made) for made in calls] == [4, 4]
        model.checkpoint_activations()
        again, gradients_again = self.train_four_segments(model)
        assert [len(made) for made in calls] == [4 + 2 * 4] * 2  # recomputed
        assert torch.equal(torch.stack(losses), torch.stack(again))
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, gradients_again[name], rtol=1e-5, atol=1e-7, msg=name)
        torch.manual_seed(1)
        assert not torch.equal(model(tokens(), labels=tokens()).loss, losses[0])  # there is dropout

    @every_memory
    @pytest.mark.parametrize(("positions", "placement"), [("relative", "post"), ("rotary", "pre")])
    def test_every_parameter_is_used_in_the_very_first_step(self, memory, positions, placement):
        """With empty memories, as data parallel training needs it."""
        model = DecoderForCausalLM(configure(memory, positions=positions, normalization_placement=placement))
        model(tokens(), labels=tokens()).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []

    @every_memory
    def test_every_parameter_matters(self, memory):
        """A few segments on, no gradient is zero."""
        _, gradients = self.train_four_segments(trained(memory))
        assert [name for name, gradient in gradients.items() if gradient.abs().max() < 1e-9] == []

    @pytest.mark.parametrize("function", ["convolution", "mean", "max", "most_used"])
    def test_the_reconstruction_trains_the_convolution_and_nothing_else(self, function):
        model = trained(compressive(function=function))
        outputs = read(model, document(4), labelled=True)
        reconstruction = sum(output.auxiliary_losses["reconstruction"] for output in outputs)
        likelihood = sum(output.token_losses.sum() for output in outputs)
        assert reconstruction > 0
        convolution = {name for name, _ in model.named_parameters() if "compression" in name}
        assert len(convolution) == (4 if function == "convolution" else 0)
        assert reconstruction.requires_grad == (function == "convolution")
        if function == "convolution":
            assert self.reached(model, reconstruction) == convolution
        assert self.reached(model, likelihood) == dict(model.named_parameters()).keys() - convolution

    @staticmethod
    def reached(model: DecoderForCausalLM, loss: Tensor) -> set[str]:
        """Parameters whose gradient is not zero."""
        names = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, list(names.values()), retain_graph=True, materialize_grads=True)
        return {name for name, gradient in zip(names, gradients, strict=True) if (gradient != 0).any()}

    @every_remembering
    def test_gradients_reach_the_first_segment_through_a_long_term_memory_alone(self, memory):
        """What a short-term memory keeps has no graph; what passes through one has lost it."""
        model = trained(memory)
        calls = watch(model.vocabulary.embedding)
        loss = read(model, document(4), labelled=True)[-1].loss
        (gradient,) = torch.autograd.grad(loss, calls[0][1], materialize_grads=True)
        assert (gradient != 0).any() == (isinstance(memory, LongTermMemoryConfig) and memory.short_term_length == 0)

    @pytest.mark.parametrize("cutoffs", [[], [20, 35]])
    def test_learns(self, cutoffs):
        """The same two segments by heart, with a plain and with an adaptive vocabulary."""
        torch.manual_seed(0)
        model = DecoderForCausalLM(
            configure(MEMORIES["long"], adaptive_cutoffs=cutoffs, adaptive_divisor=2.0, dropout=0.0)
        ).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = sum(output.loss for output in read(model, document(2), labelled=True)) / 2
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]


class TestDropout:
    @every_scheme
    def test_where_it_is(self, positions):
        """Distances, embeddings and the last hidden states; what each part adds; inside the feed-forward part."""
        model = trained(positions=positions, activation="silu").train()
        first = model.layers[0]
        residuals = (first.attention_residual.dropout, first.feed_forward_residual.dropout)
        own, attention, transformed, inside = map(watch, (model.dropout, *residuals, first.feed_forward.dropout))
        torch.manual_seed(0)
        model(tokens())
        hidden, distances = (2, SEGMENT, HIDDEN), [(SEGMENT, HIDDEN)] if positions == "relative" else []
        assert [argument.shape for argument, _ in own] == [*distances, hidden, hidden]
        assert [argument.shape for argument, _ in (*attention, *transformed)] == [hidden, hidden]
        assert [argument.shape for argument, _ in inside] == [(2, SEGMENT, 20)]
        for argument, result in (*own, *attention, *transformed, *inside):
            dropped = (argument != 0) & (result == 0)
            assert 0 < dropped.float().mean() < 0.5
            kept = result != 0
            torch.testing.assert_close(result[kept], argument[kept] / 0.8)

    def test_only_in_training(self):
        model = trained()
        assert torch.equal(model(tokens()).logits, model(tokens()).logits)
        assert not torch.equal(model.train()(tokens()).logits, model(tokens()).logits)


class TestNewModel:
    @pytest.mark.parametrize("deviation", [0.02, 0.1, None])
    @pytest.mark.parametrize("memory", ["convolution", "long"])
    def test_weights(self, memory, deviation):
        """Normal, of the deviation that is asked for, or of 1/√inputs; the memory's too."""
        torch.manual_seed(0)
        model = DecoderForCausalLM(configure(MEMORIES[memory], initializer_range=deviation, feed_forward_size=100))
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                assert (parameter == 1).all(), name
            elif "bias" in name:
                assert (parameter == 0).all(), name
            else:
                inputs = math.prod(parameter.shape[1:])
                expected = 1 / math.sqrt(inputs) if deviation is None else deviation
                error = expected / math.sqrt(2 * parameter.numel())
                assert abs(parameter.std().item() - expected) < 4 * error, name

    def test_a_new_model_knows_nothing(self):
        """So every token costs the logarithm of the vocabulary."""
        loss = DecoderForCausalLM(configure()).eval()(tokens(20), labels=tokens(20)).loss.item()
        assert loss == pytest.approx(math.log(VOCABULARY), rel=0.05)

    @every_memory
    def test_what_it_says_of_itself(self, memory):
        model = DecoderForCausalLM(configure(memory))
        assert model.has_memory == (memory is not None)
        assert model.segment_length == (None if memory is None else SEGMENT)
        assert model.positions is None
        assert model.vocabulary_size == VOCABULARY
        sticky = getattr(memory, "sticky", False)
        assert model.noise_size == (SAMPLES if sticky else 0)
        memories = {id(parameter) for parameter in model.memory_parameters()}
        named = {name for name, parameter in model.named_parameters() if id(parameter) in memories}
        assert named == {name for name, _ in model.named_parameters() if ".memory." in name}
        learned = isinstance(memory, LongTermMemoryConfig) or getattr(memory, "function", "") == "convolution"
        assert bool(named) == bool(learned)


class TestSaving:
    @every_memory
    def test_round_trip(self, memory, tmp_path):
        saved = trained(memory)
        self.assert_returns(saved, AutoModelForCausalLM, tmp_path)

    @pytest.mark.parametrize("placement", ["post", "pre"])
    @pytest.mark.parametrize("normalization", ["layer", "rms"])
    def test_round_trip_of_its_own_class(self, normalization, placement, tmp_path):
        architecture = {"normalization": normalization, "normalization_placement": placement, "positions": "rotary"}
        saved = trained(MEMORIES["long"], **architecture)
        self.assert_returns(saved, DecoderForCausalLM, tmp_path)

    def test_round_trip_with_an_adaptive_vocabulary(self, tmp_path):
        saved = trained(MEMORIES["short"], adaptive_cutoffs=[20, 35], adaptive_divisor=2.0)
        self.assert_returns(saved, AutoModelForCausalLM, tmp_path)

    @staticmethod
    def assert_returns(saved: DecoderForCausalLM, opener: type, folder) -> None:
        saved.save_pretrained(folder)
        loaded = opener.from_pretrained(folder)
        assert type(loaded) is DecoderForCausalLM
        assert not loaded.training
        assert loaded.config.memory_config == saved.config.memory_config
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

    def test_loaded_with_a_longer_short_term_memory(self, tmp_path):
        saved = trained(MEMORIES["short and sticky"])
        saved.save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        assert isinstance(config, DecoderConfig)
        config.memory["short_term_length"] = 3 * SEGMENT
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
        assert loaded.initial_state(2).layers[0].short_term.length == 3 * SEGMENT
        for name, tensor in saved.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)

    def test_the_memory_of_a_saved_model_is_all_of_it(self, tmp_path):
        """Defaults are written too: another version's defaults do not change a model."""
        trained(MEMORIES["convolution"]).save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())["memory"]
        assert stored == {
            "kind": "compressive",
            "short_term_length": SEGMENT,
            "length": 5,
            "rate": 2,
            "function": "convolution",
            "reconstruction_weight": 1.0,
        }

    def test_a_stored_memory_with_an_unknown_option(self, tmp_path):
        trained(MEMORIES["long"]).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["memory"]["stickiness"] = 3
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=r"config\.json.*stickiness"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


class TestErrors:
    @pytest.mark.parametrize(
        ("architecture", "message"),
        [
            ({"positions": "absolute"}, "positions=absolute: choose one of relative, rotary"),
            ({"normalization": "batch"}, "normalization=batch: choose one of layer, rms"),
            ({"normalization_placement": "both"}, "normalization_placement=both: choose one of post, pre"),
            ({"activation": "swoosh"}, "activation=swoosh: transformers knows no such activation"),
            ({"positions": "rotary", "head_size": 5}, "head_size=5: rotary positions turn pairs; make it even"),
            (
                {"num_attention_heads": 5, "memory": MEMORIES["long"]},
                r"num_attention_heads=5: .* model\.architecture\.hidden_size=12 .* choose a number that divides it",
            ),
            (
                {"adaptive_cutoffs": [20, 50]},
                r"adaptive_cutoffs=\[20, 50\] cannot cut a vocabulary of 50 tokens: .* from 1 to 49",
            ),
        ],
    )
    def test_an_error_names_the_option_and_what_to_do(self, architecture, message):
        with pytest.raises(UserError, match=rf"^model\.architecture\.{message}"):
            DecoderForCausalLM(configure(**architecture))

    def test_heads_need_not_divide_the_width_without_a_long_term_memory(self):
        assert trained(MEMORIES["short"], num_attention_heads=5, head_size=4)(tokens()).logits.isfinite().all()

    def test_more_tokens_than_a_segment(self):
        model = trained(MEMORIES["short"])
        with pytest.raises(UserError, match="7 tokens are more than the memory's segment of 6: cut the text up"):
            model(tokens(length=SEGMENT + 1))

    def test_a_segment_continued_past_its_end(self):
        model = trained(MEMORIES["short"])
        cache = model(tokens(), use_cache=True).segment_cache
        with pytest.raises(UserError, match="7 tokens are more than the memory's segment of 6"):
            model(tokens(length=1), segment_cache=cache, use_cache=True)

    def test_without_memory_there_is_no_longest_segment(self):
        assert trained()(tokens(length=40)).logits.shape == (2, 40, VOCABULARY)

    @pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
    def test_reentrant_checkpointing(self):
        """It runs the first forward pass without a graph: the memory would lose its gradient and nobody would know."""
        with pytest.raises(UserError, match="use_reentrant"):
            trained(MEMORIES["long"]).gradient_checkpointing_enable({"use_reentrant": True})
