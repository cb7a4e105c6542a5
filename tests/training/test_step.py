"""One step: the same update however the lanes are cut, gradients as far as they should flow, none of a bad loss."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.optim import SGD

from infformer.data.segments import Lanes, Segment
from infformer.data.tokenization import TokenizedDocuments
from infformer.memory.fast_weights import FastWeightMemoryConfig
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.state import MemoryState
from infformer.models.chunked_loss import IGNORE_INDEX
from infformer.models.pretrained import InfformerForCausalLM
from infformer.training.step import (
    Microbatch,
    NonFiniteError,
    StepResult,
    draw_noise,
    draw_without_memory,
    dropout_seed,
    read_steps,
    train_step,
)

SEGMENT, LANES = 16, 4
Gradients = dict[str, Tensor]
NewAccelerator = Callable[[int], Accelerator]


@dataclass
class Step:
    """What one step did."""

    memory: MemoryState
    result: StepResult
    gradients: Gradients
    """As the optimiser saw them."""


@pytest.fixture
def accelerator() -> NewAccelerator:
    """One for steps of so many microbatches."""

    def new(microbatches: int) -> Accelerator:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return Accelerator(cpu=True, gradient_accumulation_steps=microbatches)

    return new


@pytest.fixture
def model(backbone) -> Callable[..., InfformerForCausalLM]:
    """Without dropout, unless asked for, with a memory in which every weight is random."""

    def build(dropout: float = 0.0, **options) -> InfformerForCausalLM:
        torch.manual_seed(1)
        config = copy.deepcopy(backbone.config)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout
        stock = type(backbone)(config)
        sizes = {"basis_functions": 8, "widths": [0.05, 0.1], "past_samples": 16}
        model = InfformerForCausalLM.from_backbone(
            stock, LongTermMemoryConfig(**{**sizes, **options}), segment_length=SEGMENT
        )
        for parameter in model.memories.parameters():
            nn.init.normal_(parameter, std=0.3)
        return model.train()

    return build


def ragged_documents(*lengths: int) -> TokenizedDocuments:
    random = np.random.default_rng(0)
    counts = np.array(lengths)
    return TokenizedDocuments(
        ids=[f"document {number}" for number in range(len(lengths))],
        token_counts=counts,
        word_counts=counts,
        byte_counts=counts,
        fingerprint="",
        largest_token=255,
        _chunks=[random.integers(0, 256, counts.sum()).astype(np.int32)],
        _chunk_of=np.zeros_like(counts),
        _start_in_chunk=np.cumsum(counts) - counts,
    )


@pytest.fixture
def segments() -> list[Segment]:
    """Three segments of four lanes; in each some lanes end, with 1 to 16 tokens, and new documents begin."""
    lanes = Lanes(ragged_documents(33, 6, 41, 19, 70, 50, 24), LANES, SEGMENT, seed=0, shuffle=False)
    segments = [next(lanes) for _ in range(3)]
    assert [segment.lengths.tolist() for segment in segments] == [[16, 5, 16, 16], [16, 16, 16, 2], [16, 16, 8, 16]]
    return segments


def step(
    accelerator: NewAccelerator,
    model: InfformerForCausalLM,
    segments: Sequence[Segment],
    microbatches: int = 1,
    memory: MemoryState | None = None,
    gradient_clipping: float | None = None,
    offsets: Callable[[Segment], Tensor | None] = lambda segment: None,
    dropout_seeds: Sequence[int] | None = None,
) -> Step:
    model = copy.deepcopy(model)
    optimizer = SGD(model.parameters(), 0.5)
    gradients: Gradients = {}

    def remember(*arguments: object) -> None:
        gradients.update({name: parameter.grad.clone() for name, parameter in model.named_parameters()})

    optimizer.register_step_pre_hook(remember)
    rows = LANES // microbatches
    cut = [[segment.rows(slice(first, first + rows)) for segment in segments] for first in range(0, LANES, rows)]
    memories = (memory or model.initial_state(LANES)).split(microbatches)
    seeds = dropout_seeds or range(microbatches)
    memories, measured = train_step(
        accelerator(microbatches),
        model,
        optimizer,
        [
            Microbatch(own, before, [offsets(segment) for segment in own], [None] * len(own), seed)
            for own, before, seed in zip(cut, memories, seeds, strict=True)
        ],
        gradient_clipping,
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(tensor.requires_grad for memory in memories for tensor in memory.named_tensors().values())
    return Step(MemoryState.concatenate(memories), read_steps([measured])[0], gradients)


def assert_close(one: Gradients, other: Gradients) -> None:
    """Up to rounding, beside the largest gradient of the same parameter."""
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        error, scale = (gradient - other[name]).abs().max().item(), other[name].abs().max().item()
        assert error <= 1e-5 * scale + 1e-8, name


class TestHowTheLanesAreCutDoesNotMatter:
    """What a step is, with its clipping and its gradients through memory: test_literal_loop.py."""

    @pytest.mark.parametrize(("together", "microbatches"), [(1, 4), (3, 2)])
    def test_loss_gradients_and_memory_are_the_same(self, accelerator, model, segments, microbatches, together):
        whole, cut = (step(accelerator, model(), segments[:together], count) for count in (1, microbatches))
        tokens = sum(segment.global_tokens for segment in segments[:together])
        assert cut.result.scored_tokens == whole.result.scored_tokens == tokens
        assert cut.result.read_tokens == whole.result.read_tokens == tokens
        assert cut.result.loss == pytest.approx(whole.result.loss, rel=1e-6)
        assert cut.result.gradient_norm == pytest.approx(whole.result.gradient_norm, rel=1e-5)
        assert_close(cut.gradients, whole.gradients)
        for name, tensor in whole.memory.named_tensors().items():
            torch.testing.assert_close(cut.memory.named_tensors()[name], tensor, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("microbatches", [2, 4])
    def test_auxiliary_losses_are_the_same(self, accelerator, model, segments, microbatches):
        """Rows that have no memory yet are not the same number in every microbatch."""
        some = model(divergence_weight=1.0)
        whole, cut = (step(accelerator, some, segments, count) for count in (1, microbatches))
        assert whole.result.auxiliary_losses["divergence"] > 0.01
        assert cut.result.auxiliary_losses["divergence"] == pytest.approx(
            whole.result.auxiliary_losses["divergence"], rel=1e-5
        )
        assert_close(cut.gradients, whole.gradients)


def score_the_end(segment: Segment, tokens: int, lanes: Sequence[int] = range(LANES)) -> Segment:
    """The same segment, of which only the last tokens of some lanes are scored; with 0 none at all."""
    labels = torch.full_like(segment.targets, IGNORE_INDEX)
    for lane in lanes:
        end = int(segment.lengths[lane])
        labels[lane, end - tokens : end] = segment.targets[lane, end - tokens : end]
    return replace(segment, targets=labels, global_tokens=tokens * len(lanes))


class TestSegmentsInWhichNothingIsScored:
    @pytest.mark.parametrize("scored", [(0, 0, 2), (0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
    def test_what_is_not_scored_is_read_as_if_its_memory_were_detached(self, accelerator, model, segments, scored):
        """Loss, gradients and memory of the literal computation, in which every segment has a graph."""
        some = model(divergence_weight=1.0)
        segments = [score_the_end(segment, tokens) for segment, tokens in zip(segments, scored, strict=True)]
        memory, total, divergence, nats = None, LANES * sum(scored), 0.0, 0.0
        for segment, tokens in zip(segments, scored, strict=True):
            output = some(
                segment.input_ids,
                targets=segment.targets,
                state=memory,
                reset=segment.reset,
                lengths=segment.lengths,
                return_logits=True,
            )
            memory = output.state if tokens else output.state.detach()
            if tokens:
                real = segment.targets >= 0
                nats = nats + F.cross_entropy(output.logits[real], segment.targets[real], reduction="sum")
                divergence = divergence + LANES * tokens / total * output.auxiliary_losses["divergence"]
        (nats / total + divergence).backward()
        expected = {name: parameter.grad for name, parameter in some.named_parameters()}
        made = step(accelerator, model(divergence_weight=1.0), segments)
        assert made.result.scored_tokens == total
        assert made.result.read_tokens == sum(int(segment.lengths.sum()) for segment in segments)
        assert made.result.loss == pytest.approx(nats.item() / total, rel=1e-6)
        assert divergence > 0.01
        assert made.result.auxiliary_losses == {"divergence": pytest.approx(divergence.item(), rel=1e-5)}
        assert_close(made.gradients, expected)
        for name, tensor in made.memory.named_tensors().items():
            torch.testing.assert_close(tensor, memory.named_tensors()[name].detach(), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("microbatches", [2, 4])
    def test_what_is_not_scored_is_read_alike_however_the_lanes_are_cut(self, accelerator, model, microbatches):
        lanes = Lanes(ragged_documents(70, 60, 80, 50), LANES, SEGMENT, seed=0, shuffle=False)
        segments = [score_the_end(next(lanes), tokens) for tokens in (0, 0, 3)]
        some = model(divergence_weight=1.0)
        whole, cut = (step(accelerator, some, segments, count) for count in (1, microbatches))
        assert whole.result.auxiliary_losses["divergence"] > 0.01
        for name in ("loss", "auxiliary_losses", "scored_tokens", "read_tokens"):
            assert getattr(cut.result, name) == pytest.approx(getattr(whole.result, name), rel=1e-5), name
        assert_close(cut.gradients, whole.gradients)

    @pytest.mark.parametrize("microbatches", [2, 4])
    def test_a_segment_has_a_graph_where_other_lanes_are_scored(self, accelerator, model, segments, microbatches):
        """Lane 3 is scored in its second segment alone, but what it wrote in the first learns from that."""
        segments = [score_the_end(segments[0], 2, lanes=[0]), score_the_end(segments[1], 2, lanes=[3])]
        some = model(divergence_weight=0.0)
        whole, cut = (step(accelerator, some, segments, count) for count in (1, microbatches))
        assert_close(cut.gradients, whole.gradients)

    def test_what_is_not_scored_keeps_nothing_for_backward(self, accelerator, model, segments):
        def saved(*scored: int) -> int:
            """Numbers kept in a step of so many segments, of which so many tokens of each lane are scored."""
            kept = 0

            def pack(tensor: Tensor) -> Tensor:
                nonlocal kept
                kept += tensor.numel()
                return tensor

            read = [score_the_end(segment, tokens) for segment, tokens in zip(segments, scored, strict=False)]
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                step(accelerator, model(), read)
            return kept

        assert saved(0, 0, 2) == saved(0, 2) == saved(2) < saved(2, 2)

    @pytest.mark.parametrize(
        ("memory", "writes", "count"),
        [
            (FastWeightMemoryConfig(0, strength="loss"), ".writing.", 16),
            (LongTermMemoryConfig(0, basis_functions=8, stores="keys_values", read="gibbs"), ".c_attn.weight", 2),
        ],
        ids=["fast weights", "keys and values"],
    )
    def test_a_memory_that_learns_by_writing_learns_from_what_is_not_scored(
        self, accelerator, backbone, segments, memory, writes, count
    ):
        """As if the losses of both segments were there, and only those of the second counted."""
        some = InfformerForCausalLM.from_backbone(copy.deepcopy(backbone), memory, segment_length=SEGMENT)
        for attached in some.memories:
            nn.init.constant_(attached.gate, 0.5)
        read = [score_the_end(segments[0], 0), score_the_end(segments[1], 2)]
        state = some(segments[0].input_ids, lengths=segments[0].lengths).state
        output = some(
            segments[1].input_ids,
            state=state,
            reset=segments[1].reset,
            targets=read[1].targets,
            lengths=segments[1].lengths,
        )
        (output.token_losses.sum() / (read[1].targets != IGNORE_INDEX).sum()).backward()
        expected = {name: parameter.grad for name, parameter in some.named_parameters()}
        some.zero_grad()
        found = step(accelerator, some, read).gradients
        assert_close(found, expected)
        writing = [found[name].abs().max() for name in found if writes in name]
        assert len(writing) == count
        assert min(writing) > 0

    def test_an_input_gate_learns_from_what_is_not_scored(self, accelerator, model, segments):
        read = [score_the_end(segments[0], 0), score_the_end(segments[1], 2)]
        found = step(accelerator, model(input_gate=True), read).gradients
        assert min(gradient.abs().max() for name, gradient in found.items() if ".gate." in name) > 0

    def test_keys_and_values_of_a_frozen_backbone_learn_nothing_by_writing(self, backbone):
        memory = LongTermMemoryConfig(0, basis_functions=8, stores="keys_values")
        some = InfformerForCausalLM.from_backbone(copy.deepcopy(backbone), memory, segment_length=SEGMENT)
        assert some.learns_by_writing
        some.backbone.requires_grad_(False)
        assert not some.learns_by_writing


def microbatch(
    model: InfformerForCausalLM, segments: Sequence[Segment], memory: MemoryState | None = None
) -> Microbatch:
    """All lanes at once."""
    none = [None] * len(segments)
    return Microbatch(segments, memory or model.initial_state(LANES), none, none, 0)


class TestALossThatIsNotFinite:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_loss_that_is_not_finite_stops_before_the_weights_change(self, accelerator, model, segments, value):
        some = model()
        memory = some.initial_state(LANES).map_tensors(
            lambda tensor: torch.full_like(tensor, value) if tensor.is_floating_point() else tensor + 1
        )
        segment = copy.copy(segments[0])
        object.__setattr__(segment, "reset", torch.zeros_like(segment.reset))
        before = copy.deepcopy(some.state_dict())
        optimizer = SGD(some.parameters(), 0.5, momentum=0.9)
        with pytest.raises(NonFiniteError, match="the loss is nan"):
            train_step(accelerator(1), some, optimizer, [microbatch(some, [segment], memory)], 1.0)
        assert all(torch.equal(tensor, before[name]) for name, tensor in some.state_dict().items())
        assert optimizer.state_dict()["state"] == {}
        assert all(parameter.grad is None for parameter in some.parameters())

    def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(self, accelerator, model, segments):
        some = model()
        some.backbone.transformer.ln_f.weight.register_hook(lambda gradient: gradient * math.nan)
        before = copy.deepcopy(some.state_dict())
        with pytest.raises(NonFiniteError, match="the gradient's norm nan"):
            train_step(accelerator(1), some, SGD(some.parameters(), 0.5), [microbatch(some, segments[:1])], None)
        assert all(torch.equal(tensor, before[name]) for name, tensor in some.state_dict().items())
        assert all(parameter.grad is None for parameter in some.parameters())

    @pytest.mark.parametrize("bad", [0, 1])
    def test_a_loss_of_one_part_of_several_stops_before_the_weights_change(self, accelerator, model, segments, bad):
        """Whichever it is: the gradients of those before it are forgotten too, and the last made none."""
        some = model()
        before = copy.deepcopy(some.state_dict())
        cut = [segments[0].rows(slice(first, first + 2)) for first in (0, 2)]
        memories = some.initial_state(LANES).split(2)
        memories[bad] = memories[bad].map_tensors(
            lambda tensor: torch.full_like(tensor, math.nan) if tensor.is_floating_point() else tensor + 1
        )
        microbatches = [
            Microbatch([replace(own, reset=torch.zeros_like(own.reset))], memory, [None], [None], 0)
            for own, memory in zip(cut, memories, strict=True)
        ]
        new, backwards = accelerator(2), list[Tensor]()
        backward = new.backward
        new.backward = lambda loss: backwards.append(loss.detach()) or backward(loss)
        with pytest.raises(NonFiniteError, match="the loss is nan"):
            train_step(new, some, SGD(some.parameters(), 0.5), microbatches, 1.0)
        assert len(backwards) == 1
        assert all(torch.equal(tensor, before[name]) for name, tensor in some.state_dict().items())
        assert all(parameter.grad is None for parameter in some.parameters())


class TestDropout:
    """What is dropped belongs to the lanes of a microbatch and to the step, not to whoever computes it."""

    RATE = 0.2

    def test_dropout_is_there(self, accelerator, model, segments):
        """So that the other tests mean something."""
        dropped, kept = (step(accelerator, model(rate), segments) for rate in (self.RATE, 0.0))
        assert dropped.result.loss != kept.result.loss

    def test_dropout_is_drawn_from_the_seed_alone(self, accelerator, model, segments):
        some = model(self.RATE)
        torch.manual_seed(5)
        one = step(accelerator, some, segments, dropout_seeds=[7])
        torch.rand(100)  # what others have drawn meanwhile
        same, other = (step(accelerator, some, segments, dropout_seeds=[seed]) for seed in (7, 8))
        assert same.result == one.result
        assert all(torch.equal(gradient, one.gradients[name]) for name, gradient in same.gradients.items())
        assert other.result.loss != one.result.loss

    def test_dropout_is_the_same_wherever_its_part_stands(self, accelerator, model, segments):
        """Two of lanes that read the same: which comes first does not matter, only what each draws from."""
        some = model(self.RATE)
        twice = [segment.rows(torch.tensor([0, 1, 0, 1])) for segment in segments]
        first, swapped, same = (
            step(accelerator, some, twice, 2, dropout_seeds=seeds) for seeds in ([3, 4], [4, 3], [3, 3])
        )
        assert swapped.result.loss == pytest.approx(first.result.loss, rel=1e-6)
        assert_close(swapped.gradients, first.gradients)
        assert same.result.loss != pytest.approx(first.result.loss, rel=1e-6)
        for one, other in ((first, swapped), (swapped, first)):
            for name, tensor in one.memory.select_rows(torch.tensor([0, 1])).named_tensors().items():
                assert torch.equal(tensor, other.memory.select_rows(torch.tensor([2, 3])).named_tensors()[name]), name

    @pytest.mark.parametrize("rate", [RATE, 0.0])
    def test_figures_are_equal_where_parts_hold_the_same_lanes_and_without_dropout_anyway(
        self, accelerator, model, segments, rate
    ):
        """Four lanes at once, two and two on one process, and two each on two processes, whose sums are added."""
        some = model(rate)
        seeds = [dropout_seed(0, 0, lane) for lane in (0, LANES // 2)]
        whole = step(accelerator, some, segments, dropout_seeds=seeds[:1])
        halves = step(accelerator, some, segments, 2, dropout_seeds=seeds)
        processes = [
            step(
                accelerator,
                some,
                [segment.rows(slice(first, first + LANES // 2)) for segment in segments],
                memory=some.initial_state(LANES // 2),
                dropout_seeds=[seed],
            )
            for first, seed in zip((0, LANES // 2), seeds, strict=True)
        ]
        assert sum(one.result.loss for one in processes) == pytest.approx(halves.result.loss, rel=1e-6)
        first, second = (one.gradients for one in processes)
        assert_close({name: first[name] + second[name] for name in first}, halves.gradients)
        assert (whole.result.loss == pytest.approx(halves.result.loss, rel=1e-6)) == (rate == 0)

    def test_seeds_differ_by_run_step_and_lane(self):
        seeds = {
            dropout_seed(seed, made, lane)
            for seed in (0, 1, 2**32 - 1)
            for made in (0, 1, 2, 10**6)
            for lane in (0, 1, 2, 63)
        }
        assert len(seeds) == 3 * 4 * 4
        assert all(0 <= seed < 2**64 for seed in seeds)
        torch.manual_seed(max(seeds))

    def test_a_seed_is_known_to_everybody(self):
        assert dropout_seed(3, 5, 8) == dropout_seed(3, 5, 8)


class TestStickyOffsets:
    SAMPLES = 500

    def test_offsets_are_spread_over_0_to_1(self, segments):
        offsets = draw_noise(segments[0], self.SAMPLES, seed=0)
        assert offsets.shape == (LANES, self.SAMPLES)
        assert offsets.dtype == torch.float32
        assert offsets.min() >= 0
        assert offsets.max() < 1
        assert abs(offsets.mean() - 0.5) < 0.03
        assert offsets.std() == pytest.approx(1 / math.sqrt(12), rel=0.05)

    def test_offsets_belong_to_the_lane_wherever_it_is_read(self, segments):
        whole = draw_noise(segments[2], self.SAMPLES, seed=3)
        for lane in range(LANES):
            alone = draw_noise(segments[2].rows(slice(lane, lane + 1)), self.SAMPLES, seed=3)
            assert torch.equal(alone[0], whole[lane])

    def test_offsets_differ_between_lanes_reads_and_seeds(self, segments):
        draws = [
            row for seed in (0, 1, 2**40) for segment in segments for row in draw_noise(segment, self.SAMPLES, seed)
        ]
        assert len(draws) == 3 * 3 * LANES
        correlations = np.corrcoef(torch.stack(draws).numpy()) - np.eye(len(draws))
        assert np.abs(correlations).max() < 0.25

    def test_so_many_lanes_read_without_memory_each_by_its_own_place(self, segments):
        many = replace(segments[0], lanes=torch.arange(2000), reads=torch.arange(2000) // 4)
        for share in (0.1, 0.6):
            drawn = draw_without_memory(many, share, seed=3)
            assert drawn.dtype == torch.bool
            assert abs(drawn.float().mean() - share) < 0.04
            part = replace(many, lanes=many.lanes[700:], reads=many.reads[700:])
            assert torch.equal(draw_without_memory(part, share, seed=3), drawn[700:])
        later = replace(many, reads=many.reads + 1)
        for other in (draw_without_memory(many, 0.6, seed=4), draw_without_memory(later, 0.6, seed=3)):
            assert 0.4 < (other == drawn).float().mean() < 0.6  # as by chance: 0.52
        offsets = draw_noise(many, 8, seed=3)
        assert np.abs(np.corrcoef(torch.cat([drawn[:, None], offsets], dim=1).T)[0, 1:]).max() < 0.1

    def test_a_sticky_step_does_not_depend_on_how_lanes_are_cut(self, accelerator, model, segments):
        def offsets(segment: Segment) -> Tensor:
            return draw_noise(segment, 16, seed=0)

        sticky = model(sticky=True, sticky_bins=16)
        whole, cut = (step(accelerator, sticky, segments, microbatches, offsets=offsets) for microbatches in (1, 4))
        assert cut.result.loss == pytest.approx(whole.result.loss, rel=1e-6)
        for name, tensor in whole.memory.named_tensors().items():
            torch.testing.assert_close(cut.memory.named_tensors()[name], tensor, rtol=1e-4, atol=1e-5)
