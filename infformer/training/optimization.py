"""The optimiser, its groups of parameters, and the schedule of their learning rates."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from infformer.config import OptimizerConfig, ScheduleConfig
from infformer.errors import ModelError
from infformer.models.base import MemoryModel

logger = logging.getLogger(__name__)

ENDING_SCHEDULES = ("cosine", "linear", "slanted_triangular")
"""The schedules whose learning rates depend on `training.max_steps`, at which they end."""


def make_optimizer(model: MemoryModel, config: OptimizerConfig, by_layer: bool = False) -> Optimizer:
    """Adam over backbone and memory, each with and without weight decay, and the gates behind which memories begin.

    Groups are named `backbone`, `backbone_without_decay`, `gates`, `memory`, `memory_without_decay`; empty ones are
    left out. Where layers differ, each has groups of its own, which say under `below` how deep they lie: see
    `depths_below_head`.

    Args:
        by_layer: layers differ in when they learn, if not in how fast.
    """
    rates = {
        "backbone": config.learning_rate,
        "gates": config.gate_learning_rate,
        "memory": config.memory_learning_rate,
    }
    in_memory = {id(parameter) for parameter in model.memory_parameters()}
    below = depths_below_head(model) if by_layer or config.layer_decay != 1 else {}
    groups: dict[tuple[str, int], list[nn.Parameter]] = {}
    for place, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = "memory" if id(parameter) in in_memory else "backbone"
            # Norms and biases, which are not matrices, and the memory's input gates, which decay would pull half open.
            name += "_without_decay" if parameter.dim() < 2 or ".gate." in place else ""
            name = "gates" if place.endswith(".gate") else name
            groups.setdefault((name, below.get(id(parameter), 0)), []).append(parameter)
    kind = AdamW if config.name == "adamw" else Adam
    return kind(
        [
            {
                "name": name,
                "below": depth,
                "params": parameters,
                "lr": rates[name.removesuffix("_without_decay")] / config.layer_decay**depth,
                "weight_decay": 0.0 if name.endswith("_without_decay") or name == "gates" else config.weight_decay,
            }
            for (name, depth), parameters in sorted(groups.items(), key=lambda entry: entry[0])
        ],
        betas=(config.betas[0], config.betas[1]),
        eps=config.epsilon,
        fused=torch.cuda.is_available(),
    )


def depths_below_head(model: MemoryModel) -> dict[int, int]:
    """How far below the head a backbone's parameters lie, by their `id`.

    The head, and whatever stands above the layers, is at 0, the last layer at 1, and embeddings, also of places, and
    such as are the weights of the head too, below the first layer. A memory's are not in it.
    """
    memories = set(model.layer_memories().values())
    layers = [layer for layer in model.sharding_units() if layer not in memories]
    own = getattr(model, "vocabulary", None) or model.get_input_embeddings()  # of our own decoder
    embeddings = [own, *(part for part in model.modules() if isinstance(part, nn.Embedding))]
    depths = {id(parameter): len(layers) + 1 for part in embeddings for parameter in part.parameters()}
    for depth, layer in enumerate(reversed(layers), start=1):
        depths |= {id(parameter): depth for parameter in layer.parameters()}
    for parameter in model.memory_parameters():
        depths.pop(id(parameter), None)
    return depths


def make_schedule(optimizer: Optimizer, config: ScheduleConfig, max_steps: int, step: int = 0) -> LRScheduler:
    """Learning rates by step, each group's rate times the same factor, or zero as long as it is frozen.

    Args:
        step: how many were made, by an optimiser whose place this one takes.

    Raises:
        ModelError: more layers are to learn than there are.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # as torch wants it of who begins later
    depths = [group.get("below", 0) for group in optimizer.param_groups]
    if config.name != "slanted_triangular" and config.warmup_steps >= max_steps:
        logger.warning(
            "schedule.warmup_steps=%d: the rates still rise when the run ends at training.max_steps=%d",
            config.warmup_steps, max_steps,
        )  # fmt: skip
    every, factor = config.unfreeze_every, _factor(config, max_steps)
    learn = max(depths) if config.unfreeze_layers is None else config.unfreeze_layers
    if learn > max(depths):
        raise ModelError(
            f"schedule.unfreeze_layers={learn}: below the head of this model there are {max(depths)} layers, the "
            "embeddings among them; choose fewer, or null for all"
        )
    if every is None:
        return LambdaLR(optimizer, [factor if depth <= learn else lambda step: 0.0 for depth in depths], step - 1)
    whole = every * learn
    if whole >= max_steps:
        logger.warning(
            "schedule.unfreeze_every=%d: the lowest of %d groups of layers learns from step %d on, and the run ends at "
            "training.max_steps=%d: it stays as it is",
            every, learn + 1, whole + 1, max_steps,
        )  # fmt: skip
    stages = _factor(config, every), _factor(config, max(1, max_steps - whole))

    def of_step(step: int, depth: int) -> float:
        if step < every * depth or depth > learn:
            return 0.0
        if not config.restart:
            return factor(step)
        return stages[0](step % every) if step < whole else stages[1](step - whole)

    return LambdaLR(optimizer, [partial(of_step, depth=depth) for depth in depths])


def _factor(config: ScheduleConfig, max_steps: int) -> Callable[[int], float]:
    """By what rates are multiplied in a step."""
    if config.name == "slanted_triangular":
        return partial(slanted_triangle, steps=max_steps, cut=config.cut, ratio=config.ratio)
    names = {
        "cosine": "cosine_with_min_lr",
        "linear": "linear",
        "constant": "constant_with_warmup",
        "inverse_sqrt": "inverse_sqrt",
    }
    schedule = get_scheduler(
        names[config.name],
        SGD([nn.Parameter(torch.zeros(()))]),
        num_warmup_steps=config.warmup_steps,
        num_training_steps=max_steps,
        scheduler_specific_kwargs={"min_lr_rate": config.final_ratio} if config.name == "cosine" else None,
    )
    factor: Callable[[int], float] = cast(LambdaLR, schedule).lr_lambdas[0]
    return factor


def slanted_triangle(step: int, steps: int, cut: float, ratio: float) -> float:
    """ULMFiT's factor (Howard & Ruder, arXiv 1801.06146): up a line to 1 at the cut, and down a flatter one.

    With s = ⌊steps · cut⌋ and p = t/s before it, p = 1 − (t − s)/(s · (1/cut − 1)) after it: (1 + p(ratio − 1))/ratio.

    Args:
        step: t, from 0.
        cut: which part of the steps goes up.
        ratio: of the highest rate to the lowest, which is that of the first step.
    """
    turn = max(1, math.floor(steps * cut))
    part = step / turn if step < turn else max(0.0, 1 - (step - turn) / (turn * (1 / cut - 1)))
    return (1 + part * (ratio - 1)) / ratio


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The current rates by name, as metrics."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:  # of layers that differ the highest
        name = group["name"].removesuffix("_without_decay")
        rates[name] = max(group["lr"], rates.get(name, 0.0))
    names = {
        "backbone": "train/learning_rate",
        "gates": "train/gate_learning_rate",
        "memory": "train/memory_learning_rate",
    }
    return {names[name]: rate for name, rate in rates.items()}
