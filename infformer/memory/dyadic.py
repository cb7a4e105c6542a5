"""Dyadic contraction: levels of equal size, each of which keeps older tokens at half of the resolution of the last.

The newest tokens have a slot each, those before them share one in pairs, those before in fours, and so on; a slot is
the mean of its tokens. So what is k times as old is kept k times as coarsely, at the same cost for each write, and
nothing is fitted. A slot that stands for n tokens has the weight of n: attention on slots is attention on all tokens,
each with the key and the value of its slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infformer.continuous.basis import GaussianBasis
from infformer.continuous.regression import even_points
from infformer.memory.signal import ContinuousSignal, WriteOperators
from infformer.memory.time_shuffle import shuffled_entries


class DyadicSignal(ContinuousSignal):
    """Slots, of which each stands for one of N even places of [0, 1], the oldest first.

    The signal is constant around each place. A coefficient is its slot's value divided by the height of its function,
    so that densities read it as they read any signal.
    """

    ages: Tensor
    """Of the newest token that each slot may hold, in tokens, int64 [N]."""
    sizes: Tensor
    """How many tokens each slot may hold, int64 [N]."""

    def operators(self, segments: Tensor, noise: Tensor | None = None) -> WriteOperators:
        return WriteOperators(self.past, self.new, torch.zeros_like(segments, dtype=torch.float32))

    def carried(self, operators: WriteOperators, positions: Tensor) -> Tensor:
        return operators.past.mT

    def looked_at(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        held = self.basis.peaks.unsqueeze(-1) * coefficients
        return held, held if self.config.read == "gibbs" else coefficients

    def log_tokens(self, segments: Tensor) -> Tensor:
        """Of the tokens that each slot holds; 0 throughout in a row that has none, where all slots are zero."""
        written = (segments * self.segment_length).unsqueeze(-1)
        held = (written - self.ages).clamp(min=0).minimum(self.sizes)
        return torch.where(written == 0, 0, held.to(self.centres).log())

    def heights(self, places: Tensor) -> Tensor:
        last = len(self.centres) - 1
        nearest = (places * last).round().long().clamp(0, last)
        return torch.nn.functional.one_hot(nearest, last + 1).to(places) * self.basis.peaks

    def moved_places(self, places: Tensor, segments: int, histogram: Tensor | None) -> Tensor:
        """By its age alone; what is older than all slots has the place of the oldest."""
        slots = self.config.basis_functions
        size = slots // self.config.levels
        age = torch.arange((segments + 1) * self.segment_length).flip(0).to(places) + 0.5
        level = (age / size + 1).log2().floor().clamp(max=self.config.levels - 1)
        newer = size * level + (age - size * (2**level - 1)) / 2**level
        return (1 - (newer - 0.5) / (slots - 1)).clamp(0, 1)

    def time_shuffle(self) -> None:
        """Nothing has to be prepared."""

    def shuffle(self, coefficients: Tensor, segments: Tensor, shuffle: Tensor | None) -> Tensor:
        """Those slots that hold something change places, and weigh what those there weighed."""
        filled = (self.ages < (segments * self.segment_length).unsqueeze(-1)).sum(-1)
        order = shuffled_entries(filled, coefficients.shape[1])
        return torch.take_along_dim(coefficients, order.unsqueeze(-1), dim=1)

    def _buffers_in(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        config = self.config
        with torch.device("cpu"):  # also where a loader builds the model on the meta device
            basis = GaussianBasis.even_grid(config.basis_functions, config.widths)
            size = config.basis_functions // config.levels
            of_slot = 2 ** torch.arange(config.levels).repeat_interleave(size)
            ages = torch.cat([torch.zeros(1, dtype=torch.int64), of_slot.cumsum(0)])
            tokens = torch.arange(self.segment_length + 1)
            past, new = (shares(ages, pieces).flip(0, 1).mT for pieces in (ages + self.segment_length, tokens))
            buffers = {
                "centres": basis.centres.to(dtype),
                "widths": basis.widths.to(dtype),
                "grid_centres": basis.centres.to(dtype),
                "past_places": even_points(config.basis_functions).to(dtype),
                "past": past.to(dtype).unsqueeze(0),
                "new": (new / basis.peaks[0]).to(dtype).unsqueeze(0),
                "ages": ages[:-1].flip(0),
                "sizes": of_slot.flip(0),
            }
        return {name: tensor.to(device) for name, tensor in buffers.items()}


def shares(ages: Tensor, pieces: Tensor) -> Tensor:
    """Which part of each interval lies in each of others, both by their ascending ends: float64 [S, P] of [S + 1],
    [P + 1]."""
    ages, pieces = ages.double(), pieces.double()
    begins = torch.maximum(ages[:-1].unsqueeze(-1), pieces[:-1])
    ends = torch.minimum(ages[1:].unsqueeze(-1), pieces[1:])
    return (ends - begins).clamp(min=0) / ages.diff().unsqueeze(-1)
