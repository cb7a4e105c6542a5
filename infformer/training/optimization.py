"""The optimiser, its groups of parameters, and the schedule of their learning rates."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from infformer.config import OptimizerConfig, ScheduleConfig
from infformer.models.base import MemoryModel

ENDING_SCHEDULES = ("cosine", "linear")
"""The schedules whose learning rates depend on `training.max_steps`, at which they end."""


def make_optimizer(model: MemoryModel, config: OptimizerConfig) -> Optimizer:
    """Adam over backbone and memory, each with and without weight decay, and the gates behind which memories begin.

    Groups are named `backbone`, `backbone_without_decay`, `gates`, `memory`, `memory_without_decay`; empty ones are
    left out.
    """
    rates = {
        "backbone": config.learning_rate,
        "gates": config.gate_learning_rate,
        "memory": config.memory_learning_rate,
    }
    in_memory = {id(parameter) for parameter in model.memory_parameters()}
    groups: dict[str, list[nn.Parameter]] = {}
    for place, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = "memory" if id(parameter) in in_memory else "backbone"
            # Norms and biases, which are not matrices, and the memory's input gates, which decay would pull half open.
            name += "_without_decay" if parameter.dim() < 2 or ".gate." in place else ""
            name = "gates" if place.endswith(".gate") else name
            groups.setdefault(name, []).append(parameter)
    kind = AdamW if config.name == "adamw" else Adam
    return kind(
        [
            {
                "name": name,
                "params": parameters,
                "lr": rates[name.removesuffix("_without_decay")],
                "weight_decay": 0.0 if name.endswith("_without_decay") or name == "gates" else config.weight_decay,
            }
            for name, parameters in sorted(groups.items())
        ],
        betas=(config.betas[0], config.betas[1]),
        eps=config.epsilon,
        fused=torch.cuda.is_available(),
    )


def make_schedule(optimizer: Optimizer, config: ScheduleConfig, max_steps: int) -> LRScheduler:
    """Learning rates by step, each group's rate times the same factor."""
    names = {
        "cosine": "cosine_with_min_lr",
        "linear": "linear",
        "constant": "constant_with_warmup",
        "inverse_sqrt": "inverse_sqrt",
    }
    return get_scheduler(
        names[config.name],
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=max_steps,
        scheduler_specific_kwargs={"min_lr_rate": config.final_ratio} if config.name == "cosine" else None,
    )


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The current rates by name, as metrics."""
    rates = {group["name"].removesuffix("_without_decay"): group["lr"] for group in optimizer.param_groups}
    names = {
        "backbone": "train/learning_rate",
        "gates": "train/gate_learning_rate",
        "memory": "train/memory_learning_rate",
    }
    return {names[name]: rate for name, rate in rates.items()}
