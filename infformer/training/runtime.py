"""Processes, devices and precision: turns `engine=` into an Accelerator. The only file that imports accelerate.

Started by `python`, `accelerate launch` or `torchrun`; the same options make the same run.
"""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import set_seed

from infformer.config import EngineConfig
from infformer.errors import UserError

__all__ = ["Accelerator", "seed_everything", "share_of_lanes", "start_processes"]

_MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


class EngineError(UserError, RuntimeError):
    """Processes or devices that cannot do what is asked."""


def start_processes(engine: EngineConfig, precision: str) -> Accelerator:
    """Join the processes that the launcher started.

    Raises:
        EngineError: the processes do not work together as asked. Several combinations of launcher and device fall back
            silently to lone processes that each train a model of their own.
    """
    has_accelerator = torch.accelerator.is_available()
    if precision == "float16" and not has_accelerator:
        raise EngineError("training.precision=float16: the CPU has no float16 training; use bfloat16 or float32")
    accelerator = Accelerator(mixed_precision=_MIXED_PRECISION[precision], cpu=not has_accelerator)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise EngineError(
            f"engine.name={engine.name}: the launcher started {launched} processes, but only "
            f"{accelerator.num_processes} of them found each other. On CPUs start them with "
            "torchrun --nproc_per_node N train.py …"
        )
    data_parallel = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.NO)
    if accelerator.distributed_type not in data_parallel:
        raise EngineError(
            f"engine.name={engine.name} is one process or data parallel, but the launcher's configuration asks for "
            f"{accelerator.distributed_type.value}: run `accelerate config`, or launch with torchrun"
        )
    return accelerator


def seed_everything(seed: int) -> None:
    """Seed every generator that initialisation and dropout draw from."""
    set_seed(seed)


def share_of_lanes(accelerator: Accelerator, lanes: int) -> range:
    """The lanes of this process: an equal, contiguous part."""
    each = lanes // accelerator.num_processes
    return range(accelerator.process_index * each, (accelerator.process_index + 1) * each)
