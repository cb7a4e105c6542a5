"""The Compressive Transformer's memory (Rae et al., arXiv 1911.05507): what is older is kept, but shorter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infformer.memory.memory import ContentAttention, Entries, Memory, MemoryOutput, SegmentContext
from infformer.memory.options import MemoryConfig
from infformer.memory.short_term import Queue
from infformer.options import check_at_least, check_choices, check_finite

FUNCTIONS = ("convolution", "mean", "max", "most_used")


@dataclass
class CompressiveMemoryConfig(MemoryConfig):
    """A compressed memory behind the short-term one."""

    kind: ClassVar[str] = "compressive"

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
        super().__post_init__()
        check_finite("model.memory.", self)
        if self.short_term_length == 0:
            raise ValueError(
                "model.memory.short_term_length=0: a compressed memory keeps what leaves the short-term memory; set it "
                "to a multiple of the segment, or to null"
            )
        check_choices("model.memory.", self, function=FUNCTIONS)
        check_at_least(1, "model.memory.", self, "length", "rate")
        check_at_least(0, "model.memory.", self, "reconstruction_weight")

    def check_segment_length(self, segment_length: int) -> None:
        super().check_segment_length(segment_length)
        if segment_length % self.rate:
            raise ValueError(
                f"model.memory.rate={self.rate} does not divide training.segment_length={segment_length}: choose a "
                "rate that does"
            )

    def check_pretrained(self) -> None:
        raise ValueError(
            "model/memory=compressive: only model=decoder has a compressed memory, whose attention sees hidden states; "
            "beside a Hugging Face model choose model/memory=none, short_term, long_term, sticky or published"
        )

    @property
    def adds_to_attention(self) -> bool:
        return False

    @property
    def entries(self) -> int:
        return super().entries + self.length

    def build_behind(self, hidden_size: int, heads: int, layers: int, segment_length: int) -> list[Memory]:
        return [CompressiveMemory(self, hidden_size) for _ in range(layers)]


class Compression(nn.Module):
    """Hidden states [batch, length, hidden] to length / rate entries."""

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


class CompressiveMemory(Memory):
    """The last compressed entries of a layer, behind its short-term memory."""

    def __init__(self, config: CompressiveMemoryConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.compression = Compression(config, hidden_size)
        self.loss_weights = {"reconstruction": config.reconstruction_weight}

    def initial_state(self, batch: int) -> Queue:
        return Queue.empty(batch, self.config.length, self.hidden_size)

    def entries(self, state: Queue) -> Entries:
        return Entries(state.entries, state.real)

    def forward(self, hidden: Tensor, state: Queue, context: SegmentContext, shared: Any) -> MemoryOutput:
        """Compress what leaves the short-term memory; attention alone reads it."""
        if context.complete is None or context.leaving is None or context.attend is None:
            return MemoryOutput(state)
        entries, error = self.compression(context.leaving, context.attend)
        state, _ = state.push(entries, context.complete)
        return MemoryOutput(state, losses={"reconstruction": error * context.complete.unsqueeze(-1)})

    def without_past(self, state: Queue) -> Queue:
        return state.without_places()

    def shuffle_time(self, state: Queue, shuffle: Any) -> Queue:
        return state.shuffle_time()
