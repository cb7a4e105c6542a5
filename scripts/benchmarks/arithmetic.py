"""How much work the parts of a model are: floating-point operations and bytes, by formula.

A multiplication and an addition are two operations. Products of matrices alone are counted; the Gaussians, the norms
and the softmax are passes over memory, which a floor may do on the way. Attention is counted over the entries that a
token may see. Bytes are those that have to move if everything else stays in the cache: what goes in, what comes out,
and the weights, once for a forward pass and once more for a backward pass, in float32.

Sizes: batch b, segment T, basis functions N, samples of the past M, width d, heads H.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.machine import Machine

FLOAT = 4
"""Bytes of a number. Under autocast too the weights, and all of the memory, are float32."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes that have to move."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, factor: float) -> Work:
        return Work(self.flops * factor, self.bytes * factor)

    def floor(self, machine: Machine) -> float:
        """Seconds that it takes at least: at the speed of a large matrix product, or of a large copy."""
        return max(self.flops / machine.matmul_flops, self.bytes / machine.bandwidth)


NO_WORK = Work(0, 0)


@dataclass(frozen=True)
class Sizes:
    """Of a model and its long-term memory."""

    batch: int
    segment: int
    hidden: int
    heads: int
    layers: int = 1
    vocabulary: int = 0
    basis_functions: int = 0
    past_samples: int = 0
    feed_forward: int = 0
    feed_forward_matrices: int = 2
    """GPT-2 has two, a gated feed-forward part three."""
    key_value_heads: int = 0
    """Of grouped queries; 0: as many as heads."""

    @property
    def tokens(self) -> int:
        """Of one segment of all rows."""
        return self.batch * self.segment


def read(sizes: Sizes, backward: bool) -> Work:
    """One layer's read of the memory, affine and collapsed: W_V on N rows, r·V, W_O on T rows, and the placement.

    The placement takes two mixtures of the coefficients, both pushed through W_K and W_Q, then 2H products a token.
    All factors have gradients, so backward is twice the forward pass.
    """
    b, length, functions, d = sizes.batch, sizes.segment, sizes.basis_functions, sizes.hidden
    placement = 4 * functions * d + 8 * d**2 + 4 * sizes.heads * length * d
    flops = b * (placement + 2 * functions * d**2 + 2 * length * functions * d + 2 * length * d**2)
    segment, signal, weights = b * length * d, b * functions * d, 4 * d**2 + 2 * functions
    work = Work(flops, FLOAT * (2 * segment + signal + weights))
    # Backward reads all inputs and the gradient of the context, and writes a gradient of each input.
    return work + Work(2 * flops, FLOAT * (3 * segment + 2 * signal + 2 * weights)) if backward else work


def density_read(sizes: Sizes, backward: bool) -> Work:
    """r·V of all heads, from the densities and the values; backward gives each of r and V a gradient by one product."""
    b, length, functions, d = sizes.batch, sizes.segment, sizes.basis_functions, sizes.hidden
    flops = 2 * b * length * functions * d
    queries, values, context = 2 * b * sizes.heads * length, b * functions * d, b * length * d
    work = Work(flops, FLOAT * (queries + values + context))
    return work + Work(2 * flops, FLOAT * (2 * queries + 2 * values + context)) if backward else work


def write(sizes: Sizes, backward: bool) -> Work:
    """One layer's sticky write: Ψ(t)·B at M points, then G_pastᵀ and G_newᵀ on M and T rows.

    Gradients flow to the segment and to the old signal, not to the operators: backward is as much as forward.
    """
    b, length, functions, samples = sizes.batch, sizes.segment, sizes.basis_functions, sizes.past_samples
    flops = 2 * b * functions * sizes.hidden * (2 * samples + length)
    segment, signal = b * length * sizes.hidden, b * functions * sizes.hidden
    work = Work(flops, FLOAT * (segment + 2 * signal + (samples + length) * functions))
    return work * 2 if backward else work


def backbone(sizes: Sizes, backward: bool, window: int = 0) -> Work:
    """All layers of a transformer on one segment: projections, attention and feed-forward.

    Args:
        window: how many tokens each token attends to, itself among them; 0: those before it in its segment.
    """
    d, tokens = sizes.hidden, sizes.tokens
    shared = (sizes.key_value_heads or sizes.heads) / sizes.heads
    weights = 2 * d**2 * (1 + shared) + sizes.feed_forward_matrices * d * sizes.feed_forward
    seen = window or (sizes.segment + 1) / 2
    flops = sizes.layers * tokens * (2 * weights + 4 * d * seen)
    moved = FLOAT * sizes.layers * (weights + 2 * (window or 0) * sizes.batch * d)
    work = Work(flops, moved + FLOAT * 2 * tokens * d)
    return work + Work(2 * flops, 2 * moved + FLOAT * 2 * tokens * d) if backward else work


def head(sizes: Sizes, backward: bool) -> Work:
    """Logits of every token of a segment. To compute them again in backward is a choice, and not counted."""
    flops = 2 * sizes.tokens * sizes.hidden * sizes.vocabulary
    moved = FLOAT * (sizes.tokens * sizes.hidden + sizes.hidden * sizes.vocabulary)
    return Work(flops, moved) + Work(2 * flops, 2 * moved) if backward else Work(flops, moved)


def optimizer(parameters: int) -> Work:
    """Clipping reads the gradients twice and writes them; AdamW reads four numbers a parameter and writes three."""
    return Work(0, FLOAT * parameters * (3 + 7))
