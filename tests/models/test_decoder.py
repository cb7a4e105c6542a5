"""The decoder against its own equations; what it promises as every model does is in test_contract.py."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from infformer.errors import ModelError
from infformer.memory.compressive import CompressiveMemoryConfig
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.options import MemoryConfig
from infformer.memory.state import MemoryState
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.mechanisms import mechanism_kinds
from infformer.models.segment_read import MemoryModelOutput

SEGMENT, VOCABULARY, HIDDEN, HEADS, HEAD, SAMPLES = 6, 50, 12, 3, 6, 16


def long_term(short_term_length: int = 0, **options) -> LongTermMemoryConfig:
    return LongTermMemoryConfig(short_term_length, basis_functions=8, past_samples=SAMPLES, **options)


def compressive(**options) -> CompressiveMemoryConfig:
    return CompressiveMemoryConfig(SEGMENT, **{"length": 5, "rate": 2, **options})


LONG = long_term()
SHORT_AND_STICKY = long_term(SEGMENT, sticky=True, read="moments")
SHORT_AND_UNIFORM = long_term(2 * SEGMENT, contraction="uniform", read="slots")
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


class TestAgainstItsEquations:
    @pytest.mark.parametrize(
        ("normalization", "placement", "activation"),
        [("layer", "post", "relu"), ("layer", "pre", "silu"), ("rms", "post", "silu"), ("rms", "pre", "relu")],
    )
    def test_logits_are_those_of_the_equations_layer_by_layer(self, normalization, placement, activation):
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
    def test_attention_is_one_softmax_over_compressed_short_term_and_segment(self, placement):
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

    @pytest.mark.parametrize(
        ("memory", "random_offsets"), [(LONG, False), (SHORT_AND_STICKY, True), (SHORT_AND_UNIFORM, False)]
    )
    def test_the_long_term_memory_gets_what_leaves_the_short_term_memory(self, memory, random_offsets):
        """Against the memory alone, given the segments by hand; and what it reads is added to what attention reads."""
        model = trained(memory, normalization_placement="pre")
        attentions = [watch(layer.attention) for layer in model.layers]
        before = [watch(layer.attention_residual.norm) for layer in model.layers]
        after = [watch(layer.feed_forward_residual.norm) for layer in model.layers]
        delay = memory.short_term_length // SEGMENT
        memories = [getattr(layer.memory, "behind", layer.memory) for layer in model.layers]
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
                held = getattr(state.layers[index], "behind", state.layers[index])
                assert torch.equal(held.coefficients, states[index].coefficients)
                assert held.segments.tolist() == states[index].segments.tolist() == [max(number + 1 - delay, 0)] * 2
            assert (reading.context.abs().max() > 1e-3) == (number > delay)

    def test_the_reconstruction_error_is_the_literal_one(self):
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


class TestSegments:
    @pytest.mark.parametrize(
        ("positions", "placement", "layers"), [("relative", "post", 1), ("relative", "pre", 3), ("rotary", "post", 3)]
    )
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
    def test_one_layer_sees_the_last_tokens_of_its_short_term_memory(self, positions, length):
        """Position i: the last M + (i mod T) tokens and itself; a change of another token changes no bit."""
        model = trained(MemoryConfig(length), num_hidden_layers=1, positions=positions)
        text = torch.cat(document(5, rows=1), dim=1).expand(5 * SEGMENT, -1)
        others = text + torch.eye(5 * SEGMENT, dtype=torch.int64)  # each row has another token changed
        one, other = (
            torch.cat([output.logits for output in read(model, list(each.split(SEGMENT, dim=1)))], dim=1)
            for each in (text, others % VOCABULARY)
        )
        places = torch.arange(5 * SEGMENT)
        back = places - places.unsqueeze(1)  # of each row's changed token
        assert torch.equal((one != other).any(-1), (back >= 0) & (back <= length + places % SEGMENT))

    @pytest.mark.parametrize(
        ("memory", "positions"),
        [(MemoryConfig(SEGMENT), "rotary"), (compressive(), "relative"), (SHORT_AND_STICKY, "rotary")],
    )
    def test_a_longer_short_term_memory_of_the_same_weights_knows_more_once_the_shorter_is_full(
        self, memory, positions
    ):
        shorter = trained(memory, positions=positions).double()
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


class TestGradients:
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

    def test_two_segments_are_learned_by_heart_with_an_adaptive_vocabulary(self):
        torch.manual_seed(0)
        model = DecoderForCausalLM(configure(LONG, adaptive_cutoffs=[20, 35], adaptive_divisor=2.0, dropout=0.0))
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = sum(output.loss for output in read(model, document(2), labelled=True)) / 2
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]


@every_scheme
def test_dropout_is_where_transformer_xl_has_it(positions):
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


class TestNewModel:
    @pytest.mark.parametrize("deviation", [0.02, 0.1, None])
    @pytest.mark.parametrize("memory", [compressive(), LONG], ids=["compressive", "long-term"])
    def test_weights_of_a_new_model_have_the_deviation_that_is_asked_for(self, memory, deviation):
        """Normal, of the deviation that is asked for, or of 1/√inputs; the memory's too."""
        torch.manual_seed(0)
        model = DecoderForCausalLM(configure(memory, initializer_range=deviation, feed_forward_size=100))
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


class TestSaving:
    def test_a_model_with_an_adaptive_vocabulary_is_loaded_as_it_was_saved(self, tmp_path, assert_same_model):
        saved = trained(MemoryConfig(8), adaptive_cutoffs=[20, 35], adaptive_divisor=2.0)
        saved.save_pretrained(tmp_path)
        assert_same_model(saved, DecoderForCausalLM.from_pretrained(tmp_path), document(3))

    def test_a_model_is_loaded_with_a_longer_short_term_memory(self, tmp_path):
        saved = trained(SHORT_AND_STICKY)
        saved.save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        assert isinstance(config, DecoderConfig)
        config.memory["short_term_length"] = 3 * SEGMENT
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
        assert loaded.initial_state(2).layers[0].short_term.length == 3 * SEGMENT
        for name, tensor in saved.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)


def test_heads_need_not_divide_the_width_without_a_long_term_memory():
    assert trained(MemoryConfig(8), num_attention_heads=5, head_size=4)(tokens()).logits.isfinite().all()


CAUSAL = sorted(name for name, kind in mechanism_kinds().items() if kind.has_causal_form)


@pytest.mark.parametrize(
    ("kind", "memory"),
    [
        *((kind, None) for kind in CAUSAL),
        *((kind, LONG) for kind in CAUSAL[::3]),
        *(pytest.param(kind, LONG, marks=pytest.mark.slow) for kind in CAUSAL if kind not in CAUSAL[::3]),
    ],
)
def test_with_any_causal_mechanism_a_segment_may_come_in_pieces_and_nothing_is_seen_of_later_tokens(kind, memory):
    model = trained(memory, attention=kind, positions="rotary", attention_dropout=0.0, segment_length=24)
    tokens = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    whole = model(tokens)
    first = model(tokens[:, :15], use_cache=True)
    rest = model(tokens[:, 15:], segment_cache=first.segment_cache)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), whole.logits, atol=1e-4, rtol=1e-4)
    later = tokens.clone()
    later[:, 15:] = (later[:, 15:] + 1) % VOCABULARY
    torch.testing.assert_close(model(later).logits[:, :15], whole.logits[:, :15], atol=1e-4, rtol=1e-4)
    model(tokens, labels=tokens).loss.backward()
    used = dict(model.named_parameters()) if memory is None else {}  # what an empty memory reads teaches it nothing
    assert [name for name, parameter in used.items() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "linformer"}, "attention=linformer: it has no form that hides what comes after a position"),
        ({"attention": "reformer"}, "attention=reformer: it has no form that hides what comes after a position"),
        ({"attention": "linear", "positions": "relative"}, "it knows no distances; set model.architecture.positions=r"),
        ({"attention": "linear", "attention_dropout": 0.1}, "it has no weights to drop"),
        ({"attention": "linear", "memory": MemoryConfig(SEGMENT)}, "it looks at the segment alone"),
    ],
)
def test_attention_that_a_decoder_cannot_have_is_refused(options, message):
    with pytest.raises(ModelError, match=message):
        DecoderForCausalLM(configure(**{"positions": "rotary", "attention_dropout": 0.0, **options}))


def test_without_memory_there_is_no_longest_segment():
    assert trained()(tokens(length=40)).logits.shape == (2, 40, VOCABULARY)
