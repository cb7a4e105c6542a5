"""A model that becomes larger within a run: tried out before the first step, and made between two of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from infformer.config import EngineConfig, GrowthConfig, RunConfig
from infformer.errors import ModelError
from infformer.models.base import MemoryModel
from infformer.models.expansion import expand_model, expansions, new_model_of
from infformer.training.before import GIB, SizeError, memory_of_this_machine
from infformer.training.runtime import EngineError


def check_growth(growths: Sequence[GrowthConfig], model: MemoryModel) -> None:
    """Try all growths of a run, one after the other, on what has the shapes of its model and no numbers.

    Raises:
        ModelError: it cannot become so large.
        SizeError: it certainly would not fit into memory.
    """
    config = model.config
    moments = {f"{name}.exp_avg": tensor.to("meta") for name, tensor in model.state_dict().items()}
    state = model.initial_state(1).to("meta")
    for number, growth in enumerate(growths):
        try:
            for expansion in expansions(config, **growth.sizes):
                moments, state = expansion.moments(moments), expansion.state(state)
                config = expansion.after
            with torch.device("meta"):
                larger = new_model_of(type(model), config)
        except (ModelError, ValueError) as error:
            raise ModelError(f"growth[{number}]={growth.sizes}: {error}") from error
        config = larger.config
        expected = {f"{name}.exp_avg": tensor for name, tensor in larger.state_dict().items()}
        if _shapes(expected) | _shapes(larger.initial_state(1).named_tensors()) != _shapes(moments) | _shapes(
            state.named_tensors()
        ):
            raise ModelError(f"growth[{number}]={growth.sizes}: this model does not grow so; leave these sizes out")
        needed = 16 * sum(parameter.numel() for parameter in larger.parameters())  # gradients and moments among them
        if needed > (there := memory_of_this_machine()):
            raise SizeError(
                f"growth[{number}]={growth.sizes}: this would take {needed / GIB:,.0f} GiB of memory at least, and "
                f"there are {there / GIB:,.0f} GiB; choose less"
            )


def check_engine(growths: Sequence[GrowthConfig], engine: EngineConfig) -> None:
    """Make sure that an engine leaves the model whole.

    Raises:
        EngineError: it does not, and the model is to grow.
    """
    if growths and engine.name != "ddp":
        raise EngineError(
            f"engine={engine.name} with growth: an engine that cuts up weights keeps the sizes that it has cut; choose "
            "engine=ddp, or leave growth out"
        )


def grown(model: MemoryModel, growth: GrowthConfig, config: RunConfig) -> MemoryModel:
    """The larger model. What is new in it is drawn from the seed of the run, on every process the same."""
    seed = np.random.SeedSequence([config.seed, growth.step]).generate_state(1, np.uint32)[0]
    larger = expand_model(cast(Any, model), int(seed), **growth.sizes)
    if config.training.gradient_checkpointing:
        larger.checkpoint_activations()
    return cast(MemoryModel, larger)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
