"""The Compressive Transformer's memory (Rae et al., arXiv 1911.05507): what is older is kept, but shorter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infformer.errors import check_finite

FUNCTIONS = ("convolution", "mean", "max", "most_used")

ContentAttention = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Attention of the current segment on entries [batch, length, hidden] by their content alone, through which gradients
reach nothing but the entries: what is read [batch, queries, width], and the weights [batch, heads, queries, length]."""


@dataclass
class CompressiveMemoryConfig:
    """What one compressed memory is."""

    length: int = 128
    """Compressed entries; each stands for `rate` tokens."""
    rate: int = 4
    """Hidden states that become one entry; must divide the segment."""
    function: str = "convolution"
    """`convolution` (kernel = stride = rate; learned), `mean` or `max` over `rate` neighbours, or `most_used`: of the
    leaving hidden states one in `rate` stays as it is, those that the current segment attends to most."""
    reconstruction_weight: float = 1.0
    """Weight of the attention-reconstruction loss, which trains the convolution and nothing else."""

    def __post_init__(self) -> None:
        check_finite("model.compressive.", self)
        if self.function not in FUNCTIONS:
            raise ValueError(f"model.compressive.function={self.function}: choose one of {', '.join(FUNCTIONS)}")
        for name in ("length", "rate"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.compressive.{name}={getattr(self, name)}: must be at least 1")
        if self.reconstruction_weight < 0:
            raise ValueError(
                f"model.compressive.reconstruction_weight={self.reconstruction_weight}: must not be negative"
            )


class Compression(nn.Module):
    """Hidden states [batch, length, hidden] to length / rate entries.

    Args:
        config: which function, and its rate.
        hidden_size: width of the model.
    """

    def __init__(self, config: CompressiveMemoryConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        if config.function == "convolution":
            self.convolution = nn.Conv1d(hidden_size, hidden_size, config.rate, stride=config.rate)

    def forward(self, leaving: Tensor, attend: ContentAttention) -> tuple[Tensor, Tensor]:
        """Compress what leaves the short-term memory.

        The reconstruction error compares what the current segment's attention reads from the hidden states with what it
        reads from the entries that replace them: ‖attend(leaving) − attend(compressed)‖², the mean over the width.

        Args:
            leaving: [batch, length, hidden]; no gradient goes back through it.
            attend: the layer's attention.

        Returns:
            The entries [batch, length / rate, hidden], and the error of each query [batch, queries].
        """
        leaving = leaving.detach()
        target, weights = attend(leaving)
        compressed = self._compress(leaving, weights)
        reconstructed, _ = attend(compressed)
        return compressed, (target.detach() - reconstructed).square().mean(-1)

    def _compress(self, leaving: Tensor, weights: Tensor) -> Tensor:
        rate = self.config.rate
        if self.config.function == "convolution":
            return self.convolution(leaving.mT).mT
        if self.config.function == "mean":
            return F.avg_pool1d(leaving.mT, rate).mT
        if self.config.function == "max":
            return F.max_pool1d(leaving.mT, rate).mT
        usage = weights.mean(dim=(1, 2))  # [batch, length]
        most_used = usage.topk(leaving.shape[1] // rate, dim=-1).indices.sort(dim=-1).values  # in the order of the text
        return torch.take_along_dim(leaving, most_used.unsqueeze(-1), dim=1)
