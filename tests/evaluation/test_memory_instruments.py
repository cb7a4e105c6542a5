"""The instruments against the same figures measured another way."""

import copy
import json
import math

import pytest
import torch
from scipy import integrate
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from infformer.continuous.basis import GaussianBasis
from infformer.continuous.density import Gaussian, Slots, TruncatedParabola
from infformer.evaluation.memory_instruments import (
    WrittenPast,
    centre_and_width,
    contribution,
    costs_without,
    density_figures,
    few_layers,
    inspect_document,
    losses_without,
    pieces_of_text,
    read_segments,
    sampled_places,
)
from infformer.evaluation.streaming import EvaluationError
from infformer.memory.cache import CacheConfig
from infformer.memory.compressive import CompressiveMemoryConfig
from infformer.memory.long_term import Reading
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.memory import MemoryOutput
from infformer.memory.options import MemoryConfig
from infformer.memory.state import ModelState
from infformer.models.base import MemoryModel
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.pretrained import InfformerForCausalLM
from infformer.models.segment_read import LayerRead
from infformer.plots.page import describe_figures

SEGMENT, HEADS = 8, 2
MEMORY = {"basis_functions": 16, "past_samples": 32, "sticky_bins": 16}


@pytest.fixture
def wrapped(backbone):
    """A wrapped GPT-2 whose memories matter."""

    def build(memory_layers: list[int] | None = None, **options) -> InfformerForCausalLM:
        memory = LongTermMemoryConfig(**{**MEMORY, **options})
        return trained(InfformerForCausalLM.from_backbone(copy.deepcopy(backbone), memory, memory_layers, SEGMENT))

    return build


@pytest.fixture
def decoder(tokenizer):
    """A decoder whose memories matter."""

    def build(memory: int | MemoryConfig, **options) -> DecoderForCausalLM:
        if isinstance(memory, int):
            memory = LongTermMemoryConfig(**{**MEMORY, **options, "short_term_length": memory})
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": HEADS, "feed_forward_size": 20}
        torch.manual_seed(0)
        return trained(
            DecoderForCausalLM(DecoderConfig(vocab_size=len(tokenizer), **sizes, memory=memory, segment_length=SEGMENT))
        )

    return build


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """A stock model that may have a short-term memory."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=24, initializer_range=0.3))


def trained(model: MemoryModel) -> MemoryModel:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.memory_parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return model.eval()


def document(tokens: int) -> Tensor:
    return torch.randint(0, 257, (tokens,), generator=torch.Generator().manual_seed(0))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestInspectDocument:
    @pytest.mark.parametrize("options", [{}, {"sticky": True, "contraction": "uniform"}, {"read": "slots"}])
    def test_an_inspection_is_json_with_a_place_for_every_segment_layer_and_head(self, wrapped, options):
        found = inspect_document(wrapped(**options), document(5 * SEGMENT + 4), progress=False)
        assert json.loads(json.dumps(found)) == found
        assert found["document"]["tokens"] == 5 * SEGMENT + 3
        assert found["document"]["segments"] == 6
        assert found["memory"]["layers"] == [0, 1]
        reading = found["reading"]
        assert reading["segment"] == [1, 2, 3, 4, 5]
        assert reading["tokens"] == [8, 8, 8, 8, 3]
        for name in ("centre", "centre_spread", "width", "width_spread", "tokens_back"):
            assert torch.tensor(reading[name]).shape == (5, 2, HEADS)
        assert torch.tensor(reading["contribution"]).shape == (5, 2)
        assert [len(layers) for layers in reading["nats_without_layer"]] == [2] * 5
        if "sticky" in options:
            assert found["writing"]["segment"] == [1, 2, 3, 4]
            assert torch.tensor(found["writing"]["sampled_places"]).shape == (4, 2, 64)
        else:
            assert found["writing"] == {}
        assert [measured["segments"] for measured in found["reconstruction"]] == [1, 2, 4, 5]
        last = found["reconstruction"][-1]
        assert torch.tensor(last["by_age"]).shape == (2, 5)
        assert last["tokens_back"] == [4, 12, 20, 28, 36]
        assert all(best >= total for best, total in zip(last["best"], last["total"], strict=True))

    def test_the_first_write_is_reconstructed_as_it_is(self, wrapped):
        """Literally, from the model's own memory and hidden states after one segment."""
        model, tokens = wrapped(), document(3 * SEGMENT)
        found = inspect_document(model, tokens, progress=False)["reconstruction"][0]
        with torch.no_grad():
            output = model(tokens[None, :SEGMENT], return_intermediates=True)
        for layer in range(2):
            hidden = output.intermediates[layer].hidden[0].double()
            places = (torch.arange(SEGMENT) + 0.5) / SEGMENT
            signal = model.memories[0].signal.basis.evaluate(places) @ output.state.layers[layer].coefficients[0]
            expected = 1 - (hidden - signal).square().sum() / (hidden - hidden.mean(0)).square().sum()
            assert found["total"][layer] == pytest.approx(float(expected), abs=1e-4)
            assert found["by_age"][layer] == [pytest.approx(float(expected), abs=1e-4)]

    @pytest.mark.parametrize("cached", [1, 2])
    def test_what_leaves_the_short_term_memory_is_what_is_reconstructed(self, decoder, cached):
        """With one basis function for every two tokens the newest of what was written is told from what was not."""
        model = decoder(cached * SEGMENT, basis_functions=64, past_samples=64)
        tokens = document(6 * SEGMENT + 1)
        found = inspect_document(model, tokens, progress=False)
        written = 6 - cached
        assert [measured["segments"] for measured in found["reconstruction"]] == sorted({1, 2, 4, written})
        assert found["reading"]["segment"] == list(range(cached + 1, 6))
        last = found["reconstruction"][-1]
        assert last["tokens_back"][0] == (cached + 0.5) * SEGMENT
        memory, hidden = None, []
        with torch.no_grad():
            for segment in tokens[:-1].split(SEGMENT):
                output = model(segment[None], state=memory, return_intermediates=True)
                memory, hidden = output.state, [*hidden, output.intermediates[0].hidden[0]]
        past = torch.stack(hidden[:written])
        newest = 0.5 + 0.5 * torch.arange(1, SEGMENT + 1) / SEGMENT
        signal = model.layers[0].memory.behind.signal.basis.evaluate(newest) @ memory.layers[0].behind.coefficients[0]
        expected = 1 - (past[-1] - signal).square().sum() / (past[-1] - past.mean((0, 1))).square().sum()
        assert last["by_age"][0][0] == pytest.approx(float(expected), abs=1e-4)

    @pytest.mark.parametrize("kind", ["wrapped", "decoder"])
    def test_losses_without_a_memory_are_those_of_outputs_at_zero(self, wrapped, decoder, kind):
        model = wrapped() if kind == "wrapped" else decoder(SEGMENT)
        tokens = document(4 * SEGMENT + 1)
        reading = inspect_document(model, tokens, progress=False)["reading"]
        memory, inputs = None, tokens[:-1].split(SEGMENT)
        rows = []
        with torch.no_grad():
            for segment, labels in zip(inputs, tokens[1:].split(SEGMENT), strict=True):

                def nats(outputs: dict[int, nn.Module], segment=segment, labels=labels, memory=memory) -> float:
                    """With some output projections at zero, by which a memory adds nothing."""
                    kept = {number: layer.output.weight.clone() for number, layer in outputs.items()}
                    for layer in outputs.values():
                        layer.output.weight.zero_()
                    loss = model(segment[None], state=memory, targets=labels[None]).token_losses.mean()
                    for number, layer in outputs.items():
                        layer.output.weight.copy_(kept[number])
                    return float(loss)

                layers = {
                    number: memory.innermost(memory.initial_state(1))[0]
                    for number, memory in model.layer_memories().items()
                }
                rows.append((nats({}), nats(layers), *(nats({number: layer}) for number, layer in layers.items())))
                memory = model(segment[None], state=memory).state
        rows = rows[reading["segment"][0] :]
        assert len(rows) == len(reading["nats"]) > 1
        assert reading["nats"] == pytest.approx([row[0] for row in rows], abs=1e-5)
        assert reading["nats_without_memory"] == pytest.approx([row[1] for row in rows], abs=1e-5)
        for number, (measured, row) in enumerate(zip(reading["nats_without_layer"], rows, strict=True)):
            turn = number % 2  # one layer in each segment
            assert measured[turn] == pytest.approx(row[2 + turn], abs=1e-5)
            assert measured[1 - turn] is None
        assert max(abs(row[0] - row[1]) for row in rows) > 1e-3

    def test_some_layers_are_the_same_as_among_all(self, wrapped):
        tokens = document(3 * SEGMENT)
        model = wrapped([1, 0], sticky=True)
        every = inspect_document(model, tokens, progress=False)
        assert every["memory"]["layers"] == [1, 0]
        one = inspect_document(model, tokens, layers=[0], progress=False)
        assert one["memory"]["layers"] == [0]
        for name in ("centre", "tokens_back", "contribution"):
            assert one["reading"][name] == [[layers[1]] for layers in every["reading"][name]]
        alone = [layers[0] for layers in one["reading"]["nats_without_layer"]]
        assert alone[1] == every["reading"]["nats_without_layer"][1][1]
        assert None not in alone
        assert one["reconstruction"][-1]["by_age"] == every["reconstruction"][-1]["by_age"][1:]
        assert one["writing"]["sampled_places"] == [[layers[1]] for layers in every["writing"]["sampled_places"]]

    def test_a_part_of_a_document_is_its_beginning(self, wrapped):
        tokens = document(6 * SEGMENT)
        part = inspect_document(wrapped(), tokens, segments=3, progress=False)
        assert part == inspect_document(wrapped(), tokens[: 3 * SEGMENT + 1], progress=False)
        assert part["document"]["tokens"] == 3 * SEGMENT

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tokens": document(1)}, "the document has 1 token: there is nothing to predict"),
            ({"tokens": document(0)}, "the document has 0 tokens: there is nothing to predict"),
            ({"tokens": document(9)}, r"9 tokens, and nothing is read from memory before token 9: .* a longer one"),
            ({"segments": 1}, r"segments=1: nothing is read from memory before segment 2; take 2 at least"),
            ({"layers": [0, 2]}, r"layers=\[0, 2\]: choose among .* \[0, 1\]"),
            ({"layers": []}, r"layers=\[\]: choose among"),
        ],
    )
    def test_what_cannot_be_inspected_is_refused(self, wrapped, options, message):
        with pytest.raises(EvaluationError, match=message):
            inspect_document(wrapped(), **{"tokens": document(40), **options}, progress=False)

    def test_a_short_term_memory_fills_first(self, decoder):
        with pytest.raises(EvaluationError, match="17 tokens, and nothing is read from memory before token 17"):
            inspect_document(decoder(SEGMENT), document(17), progress=False)
        assert len(inspect_document(decoder(SEGMENT), document(18), progress=False)["reading"]["segment"]) == 1

    def test_a_model_without_memory_is_refused(self, backbone):
        model = InfformerForCausalLM.from_backbone(copy.deepcopy(backbone))
        with pytest.raises(EvaluationError, match="this model has no memory to look into"):
            inspect_document(model, document(40), progress=False)

    @pytest.mark.parametrize("kind", ["short_term", "compressive"])
    def test_a_memory_that_is_no_signal_shows_what_it_gains(self, tokenizer, kind):
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "feed_forward_size": 20}
        memory = MemoryConfig(SEGMENT) if kind == "short_term" else CompressiveMemoryConfig(SEGMENT, 4, 2)
        config = DecoderConfig(vocab_size=len(tokenizer), **sizes, memory=memory, segment_length=SEGMENT)
        torch.manual_seed(0)
        model, tokens = DecoderForCausalLM(config).eval(), document(5 * SEGMENT + 1)
        found = inspect_document(model, tokens, progress=False)
        first = 1 if kind == "short_term" else 2  # what is behind the short-term memory is taken away, not that
        assert found["reading"]["segment"] == list(range(first, 5))
        for name in ("centre", "tokens_back", "contribution"):
            assert found["reading"][name] == []
        assert (found["writing"], found["reconstruction"]) == ({}, [])
        if kind == "short_term":
            with torch.no_grad():
                alone = [
                    float(model(tokens[None, start:][:, :SEGMENT], targets=tokens[None, start + 1 :][:, :SEGMENT]).loss)
                    for start in range(SEGMENT, 5 * SEGMENT, SEGMENT)
                ]
            assert found["reading"]["nats_without_memory"] == pytest.approx(alone, abs=1e-5)

    @pytest.mark.parametrize("memory", [MemoryConfig(2 * SEGMENT), CompressiveMemoryConfig(SEGMENT, 4, 2)], ids=str)
    def test_a_layer_without_its_memory_sees_nothing_there_and_the_others_see_theirs(self, decoder, memory):
        model, entries = decoder(memory), memory.length if isinstance(memory, CompressiveMemoryConfig) else 2 * SEGMENT
        for layer in model.layers:
            nn.init.normal_(layer.attention.value.weight)
        *_, segment = read_segments(model, document(5 * SEGMENT + 1), 5)

        def cut(attention: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, context, allowed, encoding = args
            return hidden, context[:, entries:], allowed[..., entries:], encoding[entries:]

        for number, layer in enumerate(model.layers):
            with_it = float(losses_without(model, segment, []).mean())
            measured = float(losses_without(model, segment, [number]).mean())
            hook = layer.attention.register_forward_pre_hook(cut)
            assert measured == pytest.approx(float(losses_without(model, segment, []).mean()), abs=1e-5)
            hook.remove()
            assert abs(measured - with_it) > 1e-4

    def test_keys_and_values_of_a_layer_are_taken_away_as_if_it_had_none(self, llama):
        full, other = (
            InfformerForCausalLM.from_backbone(copy.deepcopy(llama), memory, layers, SEGMENT).eval()
            for memory, layers in ((MemoryConfig(SEGMENT), None), (CacheConfig(length=SEGMENT), [1]))
        )
        *_, segment = read_segments(full, document(4 * SEGMENT + 1), 4)
        kept = ModelState(segment.before.layers[1:])
        with torch.no_grad():
            expected = other(segment.input_ids, state=kept, targets=segment.targets).token_losses[0]
        torch.testing.assert_close(losses_without(full, segment, [0]), expected, atol=1e-5, rtol=0)
        assert (expected - segment.token_losses).abs().max() > 1e-4

    def test_behind_short_term_memories_of_all_layers_those_are_looked_into_that_stand_in_some(self, llama):
        memory = LongTermMemoryConfig(**MEMORY, short_term_length=SEGMENT)
        model = trained(InfformerForCausalLM.from_backbone(copy.deepcopy(llama), memory, [1], SEGMENT))
        found = inspect_document(model, document(5 * SEGMENT), progress=False)
        assert found["memory"]["layers"] == [1]
        assert found["reading"]["segment"] == [2, 3, 4]
        alone = [layers[0] for layers in found["reading"]["nats_without_layer"]]
        assert found["reading"]["nats_without_memory"] == alone != found["reading"]["nats"]

    def test_of_layers_that_have_to_see_alike_none_is_taken_away_alone(self):
        sizes = {"vocab_size": 257, "hidden_size": 16, "n_layer": 2, "n_head": 2}
        bloom = BloomForCausalLM(BloomConfig(**sizes, initializer_range=0.3))
        model = InfformerForCausalLM.from_backbone(bloom, MemoryConfig(SEGMENT), segment_length=SEGMENT)
        found = inspect_document(model, document(4 * SEGMENT), progress=False)
        assert found["reading"]["nats_without_layer"] == [[None, None]] * 3
        assert found["reading"]["nats_without_memory"] != found["reading"]["nats"]
        assert describe_figures(found)["losses"].count("layer") == 0

    def test_of_many_layers_a_few_are_looked_at(self):
        assert few_layers(range(3)) == [0, 1, 2]
        assert few_layers(range(30)) == [0, 10, 19, 29]
        assert few_layers([1, 3, 5, 7, 9, 11]) == [1, 5, 7, 11]

    def test_each_segment_is_read_three_times(self, wrapped):
        """And the first only once: it finds nothing in memory."""
        model, calls = wrapped(), []
        model.register_forward_hook(lambda *_: calls.append(1))
        inspect_document(model, document(6 * SEGMENT), progress=False)
        assert len(calls) == 1 + 5 * 3

    def test_costs_are_over_all_tokens_with_intervals_over_segments(self):
        reading = {
            "tokens": [8, 8, 2],
            "nats": [3.0, 2.0, 1.0],
            "nats_without_layer": [[3.5, None], [None, 2.25], [2.0, None]],
            "nats_without_memory": [4.0, 3.0, 2.0],
        }
        costs = costs_without(reading)
        assert costs["without_memory"] == {"nats_per_token": pytest.approx(1), "interval": pytest.approx([1, 1])}
        one, other = costs["without_layer"]
        assert one["nats_per_token"] == pytest.approx((8 * 0.5 + 2 * 1) / 10)
        assert one["interval"][0] < one["nats_per_token"] < one["interval"][1]
        assert other == {"nats_per_token": pytest.approx(0.25), "interval": None}


class TestStretches:
    """The text is shown where memories gained most and where they gained least."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(f"<{token}>" for token in tokens)

    def test_they_are_the_best_and_the_worst_of_the_document_token_by_token(self, wrapped):
        model, tokens = wrapped(), document(5 * SEGMENT + 1)
        found = inspect_document(model, tokens, progress=False, decode=self.decode)
        reading = found["reading"]
        gains = [off - on for off, on in zip(reading["nats_without_memory"], reading["nats"], strict=True)]
        for stretch, gain in zip(found["stretches"], (max(gains), min(gains)), strict=True):
            assert stretch["gain"] == pytest.approx(gain, abs=1e-6)
            assert sum(stretch["gains"]) / SEGMENT == pytest.approx(gain, abs=1e-6)
            start = (1 + gains.index(gain)) * SEGMENT + 1
            assert stretch["first"] == start
            assert stretch["pieces"] == [f"<{token}>" for token in tokens[start : start + SEGMENT].tolist()]
            for source in stretch["sources"]:
                first = source["first"]
                size = source["text"].count("<")
                assert source["text"] == self.decode(tokens[first : first + size].tolist())
                assert source["tokens_back"] == start - first > 0
                assert source["even_share"] == pytest.approx(size / (start - 1))
                assert 0 <= source["share"] <= 1

    def test_without_the_text_there_are_none(self, wrapped):
        assert inspect_document(wrapped(), document(40), progress=False)["stretches"] == []

    def test_a_character_of_several_tokens_is_that_of_its_last(self):
        text = "aé—".encode()
        pieces = pieces_of_text(list(text), lambda tokens: bytes(tokens).decode(errors="replace"))
        assert pieces == ["a", "", "é", "", "", "—"]

    def test_passages_are_seen_as_much_as_densities_lie_on_them(self, wrapped):
        past = WrittenPast(wrapped().layer_memories()[0])
        narrow = Gaussian(torch.tensor([[[0.2, 0.2], [0.2, 0.9]]]), torch.full((1, 2, 2), 1e-6))
        for seed in range(4):
            past.write(random(1, SEGMENT, 16, seed=seed), narrow)
        shares = past.looked_at(narrow, SEGMENT)
        where = [int(torch.searchsorted(past.places, torch.tensor(place).double())) // SEGMENT for place in (0.2, 0.9)]
        expected = torch.zeros(4)
        expected[where[0]], expected[where[1]] = 0.75, 0.25
        assert torch.allclose(shares, expected, atol=1e-3)


class TestReadSegments:
    def test_every_token_is_predicted_once(self, wrapped):
        tokens = document(3 * SEGMENT)
        segments = list(read_segments(wrapped(), tokens, 64))
        assert torch.equal(torch.cat([segment.input_ids[0] for segment in segments]), tokens[:-1])
        assert torch.equal(torch.cat([segment.targets[0] for segment in segments]), tokens[1:])
        assert [int(segment.before.layers[0].segments) for segment in segments] == [0, 1, 2]
        assert [int(segment.after.layers[0].segments) for segment in segments] == [1, 2, 2]
        assert len(list(read_segments(wrapped(), tokens, 2))) == 2


class TestDensities:
    BASIS = GaussianBasis.even_grid(6, [0.05, 0.2])

    @pytest.mark.parametrize(
        "attention",
        [
            Gaussian(torch.tensor([0.3, 0.6]), torch.tensor([0.01, 0.2])),
            TruncatedParabola(torch.tensor([0.3, 0.6]), torch.tensor([0.01, 0.2])),
            Slots(random(2, 6).double().mul(2).softmax(-1)),
        ],
        ids=["gaussian", "truncated parabola", "slots"],
    )
    def test_centre_and_width_are_those_by_quadrature(self, attention):
        """Of the density whose cumulative function is known: E[t] and E[t²] from ∫ 1 − P(t)."""
        centre, width = centre_and_width(attention, self.BASIS)
        exact = GaussianBasis(*(part.double() for part in self.BASIS))
        doubled = type(attention)(*(part.double() for part in attention))

        def tail(t: float, power: int, which: int) -> float:
            below = float(doubled.cumulative(torch.tensor([t - 10.0], dtype=torch.float64), exact)[which, 0])
            return power * t ** (power - 1) * (1 - below)

        for which in range(2):
            points = {"points": [8.0, 9.5, 10.0, 10.5, 12.0], "limit": 200}
            first, second = (integrate.quad(tail, 0, 20, args=(power, which), **points)[0] for power in (1, 2))
            assert float(centre[which]) == pytest.approx(first - 10, abs=1e-4)
            assert float(width[which]) == pytest.approx(math.sqrt(second - first**2), abs=1e-4)

    def test_figures_of_densities_are_means_and_spreads_over_queries(self, wrapped):
        memory = wrapped().layer_memories()[0]
        past = WrittenPast(memory)
        centre = torch.tensor([[[0.1, 0.3], [0.8, 0.8]]])
        width = torch.tensor([[[0.2, 0.2], [0.1, 0.5]]])
        attention = Gaussian(centre, width.square())
        for seed in range(2):
            past.write(random(1, SEGMENT, 16, seed=seed), attention)
        figures = density_figures(Reading(torch.zeros(1, 2, 16), attention), past, short_term_length=100)
        assert figures["centre"] == pytest.approx([0.2, 0.8])
        assert figures["centre_spread"] == pytest.approx([0.1, 0], abs=1e-6)
        assert figures["width"] == pytest.approx([0.2, 0.3])
        assert figures["width_spread"] == pytest.approx([0, 0.2], abs=1e-6)
        # The first half of the memory holds the first segment, of which token i lies at (i − ½)/16; 16 − i + 1 tokens
        # are left from it to the end. The second half holds the second, token i at (8 + i)/16.
        assert figures["tokens_back"] == pytest.approx([100 + 16 - (0.2 * 16 - 0.5), 100 + 8 - (0.8 * 16 - 9)])


def test_contribution_is_the_mean_ratio_of_norms():
    attended = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    context = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    reading = Reading(context, Gaussian(torch.rand(1, 1, 2), torch.rand(1, 1, 2)))
    output = MemoryOutput(ModelState(()), reading.context, reading=reading)
    assert contribution(LayerRead(output, torch.zeros(1, 2, 2), attended)) == pytest.approx((1 / 5 + 1 / 2) / 2)


def test_sampled_places_are_counted(wrapped):
    memory = wrapped(sticky=True, past_samples=200, sticky_bins=64).layer_memories()[0]
    narrow = Gaussian(torch.full((1, HEADS, 3), 0.4), torch.full((1, HEADS, 3), 1e-4))
    share = sampled_places(memory, Reading(torch.zeros(1, 3, 16), narrow))
    assert sum(share) == pytest.approx(1)
    # 0.38 to 0.42 are one standard deviation either way: bins 24 to 26 of 64, and what lies beside them.
    assert sum(share[22:29]) > 0.99
    assert share[25] == max(share)


KINDS_OF_SIGNALS = {
    "gibbs": {"read": "gibbs", "sharpness": 2.0},
    "keys and values": {"stores": "keys_values", "read": "gibbs", "sticky": True},
    "joint and dyadic": {"stores": "keys_values", "read": "slots", "combination": "joint", "contraction": "dyadic"},
    "sticky by loss": {"sticky": True, "sticky_by": "both", "contraction": "uniform"},
}


@pytest.mark.parametrize("options", KINDS_OF_SIGNALS.values(), ids=KINDS_OF_SIGNALS)
@pytest.mark.parametrize("short_term_length", [None, SEGMENT])
def test_every_kind_of_signal_is_looked_into(wrapped, decoder, options, short_term_length):
    """What was written is what the reconstruction is held against, be it hidden states or keys and values."""
    model = wrapped(**options) if short_term_length is None else decoder(short_term_length, **options)
    found = inspect_document(model, document(6 * SEGMENT + 3), 7, progress=False)
    assert found["reading"]["nats"] != found["reading"]["nats_without_memory"]
    assert ("sampled_places" in found["writing"]) == options.get("sticky", False)
    last = found["reconstruction"][-1]
    assert last["segments"] == (6 if short_term_length is None else 5)
    for total, best, by_age in zip(last["total"], last["best"], last["by_age"], strict=True):
        assert total <= best + 1e-6
        assert by_age[0] > by_age[-1] or options.get("contraction") == "uniform"
