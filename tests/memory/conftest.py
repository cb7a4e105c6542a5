from collections.abc import Callable

import pytest
import torch

from infformer.memory.long_term import LongTermMemory
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.signal import ContinuousSignal


@pytest.fixture
def small_config() -> Callable[..., LongTermMemoryConfig]:
    """Sizes that all differ, so that no axis can stand for another."""

    def build(**options) -> LongTermMemoryConfig:
        sizes = {"basis_functions": 16, "past_samples": 20, "sticky_bins": 32}
        return LongTermMemoryConfig(**{**sizes, "widths": [0.03, 0.08], **options})

    return build


@pytest.fixture
def build_memory(small_config) -> Callable[..., LongTermMemory]:
    """A trained memory in the place of a new one: every weight is random, the output's too."""

    def build(
        dtype: torch.dtype = torch.float64, hidden_size: int = 6, heads: int = 3, segment_length: int = 12, **options
    ) -> LongTermMemory:
        config = small_config(**options)
        signal = ContinuousSignal(config, segment_length).to(dtype)
        signal.reset_parameters()  # anew in `dtype`, not rounded to float32 on the way
        memory = LongTermMemory(config, hidden_size, heads, signal).to(dtype)
        generator = torch.Generator().manual_seed(0)
        for parameter in memory.parameters():
            torch.nn.init.normal_(parameter, std=0.8, generator=generator)
        return memory

    return build
