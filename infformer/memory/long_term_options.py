"""The options of ∞-former's long-term memory, and which memories they build."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from infformer.memory.dyadic import DyadicSignal
from infformer.memory.key_value_signal import KeyValueSignal
from infformer.memory.long_term import LongTermMemory
from infformer.memory.memory import Memory
from infformer.memory.options import MemoryConfig, own_heads
from infformer.memory.signal import ContinuousSignal
from infformer.options import check_at_least, check_choices, check_finite


@dataclass
class LongTermMemoryConfig(MemoryConfig):
    """What one long-term memory is; the defaults are the published GPT-2 constants, without stickiness."""

    kind: ClassVar[str] = "long_term"

    basis_functions: int = 512
    """N, the size of the memory: N vectors of the model's width, whatever has been read."""
    widths: list[float] = field(default_factory=list)
    """Widths of the basis functions, as parts of the whole memory; each centre has one function of each width. Empty:
    two, 1.275 and 2.55 times the distance between centres: the published 0.005 and 0.01 for 512 functions."""
    past_samples: int = 512
    """M, at how many points the old signal is sampled when a segment is written."""
    contraction: str = "constant"
    """`constant`: the past shrinks to `contraction_rate` at every write and fades geometrically. `uniform`: to n/(n+1)
    at write n, so that all segments keep equal room, and all their tokens equal weight in the regression, which then
    fits no zeros outside [0, 1]. In the mean of the signal each segment of hundreds counts the same within some per
    cent, but for those within a function's width of an end: of 800 the oldest 0.8 of the mean, the newest 1.4.
    `dyadic`: to half of its resolution whenever it is twice as old, which is exact and fits nothing; see `levels`."""
    levels: int = 8
    """For the dyadic contraction: N/levels slots hold the newest tokens, as many each those before them, in pairs, in
    fours …: with 6 levels 768 slots reach back 8,064 tokens. Exact if the segment is a multiple of 2 to the levels − 1;
    if not, slots at the borders share tokens. A slot that stands for n tokens weighs as n of them."""
    contraction_rate: float = 0.5
    """τ, the part of the memory that the past keeps, for the constant contraction."""
    training_rates: list[float] = field(default_factory=list)
    """For the constant contraction: in training each write of each row takes one of these at random, so that the memory
    is read at many resolutions, where it would learn only one; a measurement takes `contraction_rate`. Empty: so does
    training."""
    ridge: float = 0.5
    """λ, the penalty of the regression."""
    read: str = "affine"
    """`affine`: mean and variance of a query's density are affine in its scores. `moments`: they are those of the
    softmax of the scores over the basis. `slots`: that softmax reads the coefficients themselves. `gibbs`: the softmax
    of the scores of the signal itself, p(t) ∝ exp(qᵀK(t)/√d), which can look a place up, and have several."""
    points: int | None = None
    """For the Gibbs read: at how many even points the signal is looked at. Null: as many as basis functions."""
    sharpness: float = 1.0
    """By how much scores are multiplied before a softmax, in all reads but the affine one. ∞-Video takes 20."""
    density: str = "gaussian"
    """`gaussian` or `truncated_parabola`, for the affine and the moments read."""
    sticky: bool = False
    """Resample the past where it was attended to. With the uniform contraction, a place that alone is attended to for
    hundreds of segments spreads over all of the memory, and the ridge makes it smaller: a constant of 1 is 0.5 after
    300 segments of attention of mean 0.3 and deviation 0.2."""
    sticky_by: str = "attention"
    """What a sticky past is given room by. `attention`, as published. `loss`: how badly its tokens were predicted,
    which is known when they are written, and costs the scores of each segment once more. `both`: the product."""
    sticky_bins: int = 128
    """Resolution of the histogram of attention, or of losses, on [0, 1]."""
    sticky_placement: str = "sampled"
    """Where sample m of M of a sticky past is placed, which is taken at (m − ½)/M of the attention. `sampled`: at
    (m − ½)/M of its room, so that under even attention nothing moves. `published`: at m/M, half a sample later at every
    write, which a past that fades does not notice."""
    stores: str = "hidden"
    """`hidden`: hidden states, with projections of the memory's own, as published. `keys_values`: what the layer's own
    attention makes of them, before any rotation by places; it is read with that attention's queries and goes through
    its output projection, so that beside a pretrained model nothing has to be learned but how much of it to take."""
    combination: str = "gates"
    """Of keys and values with what attention reads. `gates`: tanh(g) times it is added, with a g for each head that
    begins at 0. `joint`: one softmax over the memory and what attention sees, with a number for each head, at first −2,
    added to the memory's scores, for a slots or Gibbs read; beside a pretrained model it changes something from the
    first segment that is read from memory. Both learn at `optimizer.gate_learning_rate`."""
    key_convolution: int = 0
    """Of keys and values: what is kept as a token's key is a sum of its own and those before it in what is written, so
    many in all, each number by itself with weights that are learned. A value can then lie under the token before it,
    which otherwise a layer below has to bring to it. 0: its own alone, and nothing is learned."""
    input_gate: bool = False
    """Multiply what is written by sigmoid(Conv1d(kernel 3)) of it."""
    divergence_weight: float = 1e-6
    """Weight of the divergence of the densities' variance from `prior_standard_deviation`²."""
    prior_standard_deviation: float = 0.05
    """σ₀ of that divergence."""
    heads: int | None = None
    """By how many heads hidden states are read, which divide the model's width. Null: as many as attention has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite("model.memory.", self)
        check_choices(
            "model.memory.",
            self,
            contraction=("constant", "uniform", "dyadic"),
            read=("affine", "moments", "slots", "gibbs"),
            stores=("hidden", "keys_values"),
            combination=("gates", "joint"),
            density=("gaussian", "truncated_parabola"),
            sticky_placement=("sampled", "published"),
            sticky_by=("attention", "loss", "both"),
        )
        check_at_least(1, "model.memory.", self, "basis_functions", "past_samples", "sticky_bins", "levels")
        if self.points is not None and (self.read != "gibbs" or self.points < 2):
            raise ValueError(
                f"model.memory.points={self.points}: so many points of the signal, at least 2, are looked at by "
                f"model.memory.read=gibbs alone, and here it is {self.read}; set it to null"
            )
        if self.read == "affine" and self.sharpness != 1:
            raise ValueError(
                f"model.memory.sharpness={self.sharpness}: model.memory.read=affine has no softmax to be sharper; take "
                "moments, slots or gibbs, or leave it at 1"
            )
        if self.combination == "joint" and (self.stores != "keys_values" or self.read not in ("slots", "gibbs")):
            raise ValueError(
                f"model.memory.combination=joint: one softmax is over scores of keys, which stores={self.stores} with "
                f"read={self.read} does not have; take model.memory.stores=keys_values with read=slots or gibbs, or "
                "combination=gates"
            )
        if self.heads is not None and (self.heads < 1 or self.stores == "keys_values"):
            raise ValueError(
                f"model.memory.heads={self.heads}: give a number of at least 1, or null; keys and values "
                "(model.memory.stores=keys_values) are read by the heads of attention, so there it is null"
            )
        if self.stores == "keys_values" and self.input_gate:
            raise ValueError(
                "model.memory.input_gate=true: keys and values are kept as attention has made them; leave the gate "
                "out, or take model.memory.stores=hidden"
            )
        if self.key_convolution < 0 or (self.key_convolution and self.stores != "keys_values"):
            raise ValueError(
                f"model.memory.key_convolution={self.key_convolution}: so many keys, 0 or more, are summed where keys "
                "are kept; take model.memory.stores=keys_values, or 0"
            )
        if self.sticky_by != "attention" and not self.sticky:
            raise ValueError(
                f"model.memory.sticky_by={self.sticky_by}: without model.memory.sticky=true nothing is given more "
                "room; set that, or leave this out"
            )
        # Far outside of these, numbers of the densities are 0 or infinite; and of less ridge the normal equations, to
        # which every write of the uniform contraction adds, are no longer positive definite in float64.
        for name, lowest, highest in (
            ("ridge", 1e-6, 1e12),
            ("prior_standard_deviation", 1e-6, 1e6),
            ("sharpness", 1e-6, 1e6),
        ):
            if not lowest <= getattr(self, name) <= highest:
                raise ValueError(
                    f"model.memory.{name}={getattr(self, name)}: must be positive, from {lowest:g} to {highest:g}"
                )
        check_at_least(0, "model.memory.", self, "divergence_weight")
        if not 0 < self.contraction_rate < 1:
            raise ValueError(f"model.memory.contraction_rate={self.contraction_rate}: must lie between 0 and 1")
        if not all(0 < rate < 1 for rate in self.training_rates):
            raise ValueError(
                f"model.memory.training_rates={list(self.training_rates)}: each must lie between 0 and 1; [] draws none"
            )
        if self.training_rates and self.contraction != "constant":
            raise ValueError(
                f"model.memory.training_rates={list(self.training_rates)}: with model.memory.contraction="
                f"{self.contraction} the rate of a write is not free; set it to [], or take contraction=constant"
            )
        if self.sticky_placement == "published" and self.contraction == "uniform":
            raise ValueError(
                "model.memory.sticky_placement=published moves the past by half a sample at every write, and with "
                "model.memory.contraction=uniform all of it is moved out of the memory in time: take "
                "sticky_placement=sampled or contraction=constant"
            )
        if self.contraction == "dyadic":
            self._check_dyadic()
        if not self.widths and self.basis_functions < 4:
            raise ValueError(
                f"model.memory.basis_functions={self.basis_functions}: must be at least 4, or give model.memory.widths="
            )
        if not self.widths:
            self.widths = [round(factor / (self.basis_functions / 2 - 1), 6) for factor in (1.275, 2.55)]
        if not all(1e-6 <= width <= 1e3 for width in self.widths):
            raise ValueError(
                f"model.memory.widths={list(self.widths)}: they must all be positive, from 1e-06 to 1000 times the "
                "whole memory"
            )
        if self.basis_functions % len(self.widths) or self.basis_functions < 2 * len(self.widths):
            raise ValueError(
                f"model.memory.basis_functions={self.basis_functions} cannot be divided among the {len(self.widths)} "
                f"widths {list(self.widths)}: take a multiple of their number, and two functions of each at least"
            )

    def _check_dyadic(self) -> None:
        """Make sure that slots are all there is, and give their functions the width with which they fill [0, 1]."""
        if self.levels > 30 or self.basis_functions % self.levels or self.basis_functions < 2:
            raise ValueError(
                f"model.memory.levels={self.levels}: that many levels, 30 at most, have to divide "
                f"model.memory.basis_functions={self.basis_functions} evenly"
            )
        if self.sticky:
            raise ValueError(
                "model.memory.sticky=true: with model.memory.contraction=dyadic the room of a token follows from its "
                "age alone; set it to false, or take contraction=constant or uniform"
            )
        if self.points is not None:
            raise ValueError(
                f"model.memory.points={self.points}: with model.memory.contraction=dyadic the points are the slots; "
                "set it to null"
            )
        width = round(1 / (math.sqrt(2 * math.pi) * (self.basis_functions - 1)), 9)
        if self.widths not in ([], [width]):
            raise ValueError(
                f"model.memory.widths={list(self.widths)}: with model.memory.contraction=dyadic they follow from the "
                "number of slots; set them to []"
            )
        self.widths = [width]

    def check_training(self, bptt_segments: int) -> None:
        if self.input_gate and bptt_segments == 1:
            raise ValueError(
                "model.memory.input_gate=true with training.bptt_segments=1: the gate shapes what later segments read, "
                "so it learns nothing where gradients stay in one segment; set training.bptt_segments=2 or more"
            )
        if self.key_convolution and bptt_segments == 1:
            raise ValueError(
                f"model.memory.key_convolution={self.key_convolution} with training.bptt_segments=1: it shapes what "
                "later segments read, so it learns nothing where gradients stay in one segment; set "
                "training.bptt_segments=2 or more"
            )

    def numbers(self, hidden_size: int, layers: int, rows: int, rows_at_once: int, segment_length: int) -> int:
        """The states, the operators in float64, and the histograms of one layer."""
        states = super().numbers(hidden_size, layers, rows, rows_at_once, segment_length)
        if self.stores == "hidden":  # keys and values may be fewer
            states += rows * layers * hidden_size * self.basis_functions
        operators = 2 * self.basis_functions * (self.basis_functions + segment_length + self.past_samples)
        return states + operators + rows_at_once * segment_length * (self.sticky_bins if self.sticky else 0)

    def build_behind(self, hidden_size: int, heads: int, layers: int, segment_length: int) -> list[Memory]:
        heads = own_heads(self.heads, heads, hidden_size, "a long-term memory")
        signal = self.build_signal(segment_length)
        return [LongTermMemory(self, hidden_size, heads, signal) for _ in range(layers)]

    def build_signal(self, segment_length: int) -> ContinuousSignal:
        """The fixed part, one for all layers."""
        return (DyadicSignal if self.contraction == "dyadic" else ContinuousSignal)(self, segment_length)

    @property
    def keeps_key_values(self) -> bool:
        return self.stores == "keys_values"

    def build_told(
        self, hidden_size: int, heads: int, layers: int, segment_length: int, key_values: tuple[int, int]
    ) -> list[Memory]:
        if self.stores == "hidden":
            return self.build_behind(hidden_size, heads, layers, segment_length)
        signal = self.build_signal(segment_length)
        return [KeyValueSignal(self, heads, key_values, signal) for _ in range(layers)]
