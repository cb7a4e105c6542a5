"""How the past is kept as a continuous signal: its basis, and the regression that contracts the old one.

They are one for all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from infformer.continuous.basis import GaussianBasis, GaussianGrid
from infformer.continuous.regression import (
    even_middles,
    even_points,
    even_steps,
    first_operator,
    next_operators,
    rounded,
)
from infformer.memory.memory import DerivedBuffers
from infformer.memory.sticky import places_after_warp
from infformer.memory.time_shuffle import shuffled_positions

if TYPE_CHECKING:
    from infformer.memory.long_term_options import LongTermMemoryConfig


class WriteOperators(NamedTuple):
    """Regression operators of one write; rows differ where their number of segments does."""

    past: Tensor
    """From samples of the old signal to coefficients, shape [batch or 1, M, N]."""
    new: Tensor
    """From the tokens of a segment to coefficients, shape [batch, T, N]."""
    contraction: Tensor
    """τ of each row, 0 where nothing has been written, float32 [batch]."""


class ContinuousSignal(DerivedBuffers):
    """The fixed part of a long-term memory, one for all layers: the basis and the regression operators.

    They follow from the configuration alone, so they are buffers that no checkpoint stores. They are computed in
    float64 and kept in float32, also where the model is cast to a shorter type.

    Args:
        segment_length: T, tokens of a segment.
    """

    centres: Tensor
    widths: Tensor
    grid_centres: Tensor
    past_places: Tensor
    first: Tensor
    past: Tensor
    new: Tensor
    at_points: Tensor
    drawn_past: Tensor
    drawn_new: Tensor
    drawn_rates: Tensor

    def __init__(self, config: LongTermMemoryConfig, segment_length: int) -> None:
        super().__init__()
        self.config = config
        self.segment_length = segment_length
        for name, tensor in self._buffers_in(torch.device("cpu"), torch.float32).items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def basis(self) -> GaussianBasis:
        return GaussianBasis(self.centres, self.widths)

    @property
    def grid(self) -> GaussianGrid:
        """The same functions, by centre and width."""
        return GaussianGrid(self.grid_centres, self.widths[: len(self.config.widths)])

    @property
    def past_steps(self) -> Tensor:
        """Where the M samples of the past belong before it is contracted, float64: even steps as published, or middles.

        A past that does not fade needs middles: steps that end at 1 and do not begin at 0 favour one end of it.
        """
        config = self.config
        published = config.sticky_placement == "published" if config.sticky else config.contraction == "constant"
        return (even_steps if published else even_middles)(config.past_samples)

    def operators(self, segments: Tensor, noise: Tensor | None = None) -> WriteOperators:
        """Operators for rows that have written `segments` (int64, [batch]) segments so far.

        Args:
            noise: random numbers in [0, 1), [batch, noise_size], of which the last draws a rate, if they are drawn.
        """
        config = self.config
        past, new, rate = self.past, self.new, torch.full_like(segments, config.contraction_rate, dtype=torch.float32)
        if config.training_rates and noise is not None:
            chosen = (noise[:, -1] * len(config.training_rates)).long().clamp(max=len(config.training_rates) - 1)
            past, new = self.drawn_past[chosen], self.drawn_new[chosen]
            rate = self.drawn_rates[chosen]
        if config.contraction == "uniform":
            # Rows that have written equally much share their operators, and their operators' factorisation.
            counts, rows = segments.clamp(min=1).unique(return_inverse=True)
            contraction = counts.double() / (counts + 1)
            rate = contraction.float()[rows]
            past, new = (
                rounded(operator, self.new.dtype)[rows]
                for operator in next_operators(
                    self._exact_basis(),
                    self.segment_length,
                    self.past_steps,
                    contraction,
                    config.ridge,
                    # A sample stands for so many tokens. If it counted for one, the newest segment, of which there are
                    # many more samples to a stretch, would outweigh the past around it, and tokens there would not
                    # be remembered alike.
                    past_weight=counts.double() * self.segment_length / config.past_samples,
                    zeros=self._zeros,
                )
            )
        begins = segments == 0
        return WriteOperators(past, torch.where(begins.view(-1, 1, 1), self.first, new), rate.masked_fill(begins, 0))

    def carried(self, operators: WriteOperators, positions: Tensor) -> Tensor:
        """From coefficients to the part of the new ones that is of the past: [batch or 1, N, N], without a gradient.

        Args:
            positions: where the old signal is sampled, [M] or [batch, M].
        """
        return operators.past.mT @ self.basis.evaluate(positions)

    def log_tokens(self, segments: Tensor) -> Tensor | None:
        """The logarithm of how many tokens each key stands for in rows that have written so many segments.

        Returns:
            [batch, keys], −∞ where a key stands for nothing; None if all stand for as many.
        """
        return None

    def heights(self, places: Tensor) -> Tensor:
        """What the signal at places [P] is made of: [P, N], to be multiplied with coefficients."""
        return self.basis.evaluate(places)

    def moved_places(self, places: Tensor, segments: int, histogram: Tensor | None) -> Tensor:
        """Where the tokens of `segments` segments, and of one more, lie after a write; see `LongTermMemory`.

        Args:
            histogram: by which the past is resampled, of one row; None without stickiness.
        """
        config = self.config
        if segments == 0:
            return even_middles(self.segment_length).to(places)
        if histogram is not None:
            places = places_after_warp(histogram.to(places), places.unsqueeze(0)).squeeze(0)
            if config.sticky_placement == "published":
                places = (places + 0.5 / config.past_samples).clamp(max=1)
        contraction = segments / (segments + 1) if config.contraction == "uniform" else config.contraction_rate
        new = contraction + (1 - contraction) * even_steps(self.segment_length).to(places)
        return torch.cat([contraction * places, new])

    def looked_at(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """What keys are made of, and what values are.

        With a Gibbs read both are the signal at points. Where keys are kept themselves, that of a function is what it
        adds to the signal at its own centre: of the size of a key, where its coefficient is smaller by a factor of the
        width, so that all scores would be alike. Otherwise the keys' projection learns their size.

        Args:
            coefficients: [batch, N, width].

        Returns:
            Each [batch, N or points, width].
        """
        if self.config.read == "gibbs":
            at_points = self.at_points @ coefficients
            return at_points, at_points
        if self.config.read == "affine" or self.config.stores == "hidden":
            return coefficients, coefficients
        return self.basis.peaks.unsqueeze(-1).to(coefficients) * coefficients, coefficients

    def shuffle(self, coefficients: Tensor, segments: Tensor, shuffle: Tensor) -> Tensor:
        """Coefficients of a past in another order.

        Args:
            segments: how many each row has written, [batch].
            shuffle: what `time_shuffle` returned.
        """
        return shuffle @ coefficients

    def time_shuffle(self) -> Tensor | None:
        """The matrix [N, N] from a signal's coefficients to those of the signal with its past in another order.

        The signal is sampled in the middle of 4N equal parts (at least), there where `shuffled_positions` says, and
        fitted anew. Computed in float64 at every call.
        """
        samples = max(self.config.past_samples, 4 * self.config.basis_functions)
        basis = self._exact_basis()
        positions = shuffled_positions(even_middles(samples).to(basis.centres))
        shuffle = first_operator(basis, samples, self.config.ridge, self._zeros).mT @ basis.evaluate(positions)
        return shuffle.to(self.centres.dtype)

    def reset_parameters(self) -> None:
        """Compute the buffers anew where they are: after a loader has materialised them with arbitrary contents."""
        for name, tensor in self._buffers_in(self.centres.device, self.centres.dtype).items():
            setattr(self, name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ContinuousSignal:
        """Move with the model, but stay at least float32: operators rounded to bfloat16 would not fit anything."""
        super()._apply(fn, recurse)
        if self.centres.is_floating_point() and self.centres.dtype.itemsize < 4:
            for name, tensor in self._buffers_in(self.centres.device, torch.float32).items():
                setattr(self, name, tensor)
        return self

    @property
    def _zeros(self) -> bool:
        """Whether zeros are fitted outside [0, 1]: as published, but not to a past that has to last.

        They take a little off its ends at every write, which nothing that fades lives to see.
        """
        return self.config.contraction == "constant"

    def _exact_basis(self) -> GaussianBasis:
        """The basis in float64, where the buffers are."""
        basis = GaussianBasis.even_grid(self.config.basis_functions, self.config.widths)
        return GaussianBasis(basis.centres.to(self.centres.device), basis.widths.to(self.centres.device))

    def _buffers_in(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        config = self.config
        with torch.device("cpu"):  # also where a loader builds the model on the meta device
            basis = GaussianBasis.even_grid(config.basis_functions, config.widths)
            rate = torch.tensor(config.contraction_rate, dtype=torch.float64)
            past, new = next_operators(basis, self.segment_length, self.past_steps, rate, config.ridge)
            first = first_operator(basis, self.segment_length, config.ridge, self._zeros)
            buffers = {
                "centres": basis.centres.to(dtype),
                "widths": basis.widths.to(dtype),
                "grid_centres": basis.centres[:: len(config.widths)].to(dtype),
                "past_places": self.past_steps.to(dtype),
            }
            if config.training_rates:
                drawn = (
                    next_operators(basis, self.segment_length, self.past_steps, rate.new_tensor(own), config.ridge)
                    for own in config.training_rates
                )
                buffers["drawn_rates"] = torch.tensor(config.training_rates, dtype=torch.float32)
                for name, operators in zip(("drawn_past", "drawn_new"), zip(*drawn, strict=True), strict=True):
                    buffers[name] = torch.stack([rounded(operator, dtype) for operator in operators])
            if config.read == "gibbs":
                points = even_points(config.points or config.basis_functions)
                buffers["at_points"] = rounded(basis.evaluate(points), dtype)
            for name, operator in {"first": first, "past": past, "new": new}.items():
                buffers[name] = rounded(operator, dtype).unsqueeze(0)
        return {name: tensor.to(device) for name, tensor in buffers.items()}
