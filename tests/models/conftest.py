"""What several tests of models compare."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from infformer.models.base import MemoryModel


@pytest.fixture(scope="session")
def assert_same_model() -> Callable[[MemoryModel, MemoryModel, Sequence[Tensor]], None]:
    """Make sure that a loaded model is the saved one: name by name, to the last bit and type, and in what they read."""

    def check(saved: MemoryModel, loaded: MemoryModel, segments: Sequence[Tensor]) -> None:
        assert type(loaded) is type(saved)
        assert not loaded.training
        assert loaded.config.memory_config == saved.config.memory_config
        assert loaded.segment_length == saved.segment_length
        for (name, tensor), (other_name, other) in zip(
            itertools.chain(saved.named_parameters(), saved.named_buffers()),
            itertools.chain(loaded.named_parameters(), loaded.named_buffers()),
            strict=True,
        ):
            assert name == other_name
            assert tensor.dtype == other.dtype, name
            assert torch.equal(tensor, other), name
        state, other_state = None, None
        for segment in segments:
            one, other = saved(segment, state=state), loaded(segment, state=other_state)
            state, other_state = one.state, other.state
            assert torch.equal(one.logits, other.logits)
            assert state.named_tensors().keys() == other_state.named_tensors().keys()
            for name, tensor in state.named_tensors().items():
                assert torch.equal(tensor, other_state.named_tensors()[name]), name

    return check
