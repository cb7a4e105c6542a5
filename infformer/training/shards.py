"""Weights and moments as whole tensors, however an engine has cut them up: what checkpoints hold.

So a checkpoint fits every engine and every number of processes. Tensors are put together one after the other: what a
process needs at a time is its shard and one whole tensor. All processes go through them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from infformer.models.base import MemoryModel

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of each parameter, beside the number of its steps."""


class Shards(Protocol):
    """The weights of a model and the moments of its optimiser, as one engine keeps them."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by its name, whole; tied ones once."""

    def put_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the weights by whole ones: to measure with, not to train on."""

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """`<parameter>.step`, `<parameter>.exp_avg` and `<parameter>.exp_avg_sq` of every trained parameter, whole."""

    def put_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the moments by whole ones, to go on training with."""


class TorchShards:
    """The shards of one process, of data parallel, and of FSDP2, whose parameters are distributed tensors."""

    def __init__(self, model: MemoryModel, optimizer: Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in _weights(self._model):
            yield name, _whole(tensor)

    @torch.no_grad()
    def put_weights(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in _weights(self._model):
            tensor.copy_(_cut_like(tensor, tensors[name]))

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in _trained(self._model):
            for kind, value in self._optimizer.state[parameter].items():
                yield f"{name}.{kind}", _whole(torch.as_tensor(value))

    def put_moments(self, tensors: Mapping[str, Tensor]) -> None:
        ordered = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        places = {id(parameter): place for place, parameter in enumerate(ordered)}
        state = {
            places[id(parameter)]: {
                "step": tensors[f"{name}.step"],
                **{kind: _cut_like(parameter, tensors[f"{name}.{kind}"]) for kind in MOMENTS},
            }
            for name, parameter in _trained(self._model)
        }
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})


class ZeroShards:
    """The shards of DeepSpeed's ZeRO: each process keeps a stretch of all parameters' moments, one after the other.

    Args:
        model: after DeepSpeed has taken it over.
        zero: DeepSpeed's own optimiser, which keeps the one that was made for the model.
    """

    def __init__(self, model: MemoryModel, zero: Any) -> None:
        self._model = model
        self._zero = zero
        third_stage = hasattr(zero, "fp32_partitioned_groups_flat")
        self._stretches: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if third_stage else zero.single_partition_of_fp32_groups
        )

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        for name, tensor in _weights(self._model):
            with GatheredParameters([tensor]):
                yield name, tensor.detach()

    @torch.no_grad()
    def put_weights(self, tensors: Mapping[str, Tensor]) -> None:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        for name, tensor in _weights(self._model):
            with GatheredParameters([tensor], modifier_rank=0):
                tensor.copy_(tensors[name])

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_moments()
        step = torch.as_tensor(self._zero.optimizer.state[self._stretches[0]]["step"])
        for name, parameter in _trained(self._model):
            yield f"{name}.step", step
            for kind in MOMENTS:
                yield f"{name}.{kind}", safe_get_full_optimizer_state(parameter, kind)

    def put_moments(self, tensors: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        adam = self._zero.optimizer
        trained = list(_trained(self._model))
        step = tensors[f"{trained[0][0]}.step"]
        for stretch in self._stretches:  # as Adam would at its first step
            fused = bool(adam.defaults.get("fused"))
            adam.state[stretch] = {
                "step": step.to(stretch.device, copy=True) if fused else step.clone(),
                **{kind: torch.zeros_like(stretch) for kind in MOMENTS},
            }
        self._link_moments()
        for name, parameter in trained:
            for kind in MOMENTS:
                value = tensors[f"{name}.{kind}"].to(self._stretches[0].device)
                safe_set_full_optimizer_state(parameter, value, kind)

    def _link_moments(self) -> None:
        """In the first two stages a parameter has to know where its moments are.

        DeepSpeed 0.19 sees to it when the first group of parameters has made its first step: too early for the others.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if not hasattr(self._zero, "bit16_groups"):
            return
        for parameters, stretch in zip(self._zero.bit16_groups, self._stretches, strict=True):
            lazy_init_hp_params_optimizer_state(parameters, stretch, self._zero.optimizer.state)


def _weights(model: MemoryModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that are stored, as the engine keeps them, tied ones once."""
    stored = model.state_dict(keep_vars=True)
    tied = model.all_tied_weights_keys
    for name, tensor in stored.items():
        if tied.get(name) not in stored:
            yield name, tensor


def _trained(model: MemoryModel) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _cut_like(pattern: Tensor, whole: Tensor) -> Tensor:
    """This process's part of a tensor that every process has whole; all of it if `pattern` is not cut up."""
    if not isinstance(pattern, DTensor):
        return whole
    whole = whole.to(pattern.device)
    return distribute_tensor(whole, pattern.device_mesh, pattern.placements, src_data_rank=None)
