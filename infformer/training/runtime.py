"""Processes, devices and precision: turns `engine=` into an Accelerator. The only file that imports accelerate.

Started by `python`, `accelerate launch` or `torchrun`; the same options make the same run. An engine decides where
weights, gradients and Adam's moments lie; what is learned does not depend on it. CPUs talk by gloo, GPUs by their own
backend.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from infformer.config import EngineConfig
from infformer.errors import UserError
from infformer.models.base import MemoryModel

Told = TypeVar("Told")

_MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
_PATIENCE = timedelta(days=7)
"""How long processes wait for each other: one may tokenise for hours. In training the watchdog finds what hangs."""
_SAME_BUFFERS = DistributedDataParallelKwargs(broadcast_buffers=False)
"""Buffers follow from options, the same everywhere; to send them at every step writes into what a graph needs."""
_DECIDED_ELSEWHERE = {
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "fp16": "training.precision",
    "bf16": "training.precision",
    "torch_autocast": "training.precision",
    "gradient_clipping": "training.gradient_clipping",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.batch_size",
}
"""Parts of a DeepSpeed configuration that follow from options of this project."""


class EngineError(UserError, RuntimeError):
    """Processes or devices that cannot do what is asked."""


def resolve_engine(engine: EngineConfig) -> EngineConfig:
    """The engine that is meant: `auto` is what accelerate was configured for, or data parallel.

    Raises:
        EngineError: the launcher was configured for another engine than `engine.name`.
    """
    launched = _engine_of_the_launcher()
    if engine.name == "auto":
        return replace(launched or EngineConfig(name="ddp"), patience=engine.patience)
    if launched is not None and launched.name != engine.name.removesuffix("_offload"):
        raise EngineError(
            f"engine.name={engine.name}, but accelerate was configured for {launched.name}: choose engine=auto to "
            "follow that configuration, or launch with torchrun, which has none"
        )
    return engine


def off_the_device(engine: EngineConfig) -> dict[str, str]:
    """Where DeepSpeed keeps weights (`param`), or gradients and moments (`optimizer`), if not on the device.

    Args:
        engine: resolved, by `resolve_engine`.

    Returns:
        `cpu` or `nvme`, of what lies there.
    """
    options = engine.deepspeed if engine.config is None else _read_deepspeed_file(engine.config)
    zero = options.get("zero_optimization")
    told = {part: zero.get(f"offload_{part}") for part in ("param", "optimizer")} if isinstance(zero, Mapping) else {}
    places = {part: said.get("device", "none") for part, said in told.items() if isinstance(said, Mapping)}
    return {part: place for part, place in places.items() if place != "none"}


def init_distributed(
    engine: EngineConfig,
    precision: str,
    gradient_accumulation: int = 1,
    gradient_clipping: float | None = None,
    option: str = "training.precision",
) -> Accelerator:
    """Join the processes that the launcher started, whatever run these processes have made before.

    Args:
        engine: resolved, by `resolve_engine`.
        precision: of autocast.
        gradient_accumulation: microbatches of a step on each process.
        gradient_clipping: largest norm of the gradient; DeepSpeed has to know both from the beginning.
        option: where the precision was given, for the messages.

    Raises:
        EngineError: the processes do not work together as asked. Several combinations of launcher and device fall back
            silently to lone processes that each train a model of their own.
    """
    has_device = torch.accelerator.is_available()
    zero = engine.name.startswith("zero")
    if precision == "float16" and not has_device:
        raise EngineError(f"{option}=float16: the CPU has no float16 training; use bfloat16 or float32")
    if precision == "float16" and (zero or engine.name == "fsdp2"):
        raise EngineError(
            f"{option}=float16 with engine={engine.name}: its scaled gradients are only known to engine=ddp; "
            "use bfloat16 or float32"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    AcceleratorState._reset_state(reset_partial_state=True)  # of the run before, where a process makes a whole sweep
    GradientState._reset_state()
    plugin = None
    if zero:
        plugin = _deepspeed_plugin(engine, precision, gradient_accumulation, gradient_clipping)
        _be_launched()
    else:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # which accelerate has set if the run before had DeepSpeed
    if engine.name == "fsdp2":
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # it is done by `shard`, and would be done twice
    communication = InitProcessGroupKwargs(timeout=_PATIENCE, backend=None if has_device else "gloo")
    accelerator = Accelerator(
        mixed_precision="no" if zero else _MIXED_PRECISION[precision],  # DeepSpeed has the same autocast of its own
        cpu=not has_device and not zero,
        gradient_accumulation_steps=gradient_accumulation,
        deepspeed_plugin=plugin,
        kwargs_handlers=[communication, _SAME_BUFFERS] if launched > 1 or zero else [],
    )
    if zero:
        # Every process makes the whole model, which is cut up afterwards. Otherwise transformers would cut it up while
        # it is made, draw other random weights, and hang where only some processes load one.
        unset_hf_deepspeed_config()
    if accelerator.num_processes != launched:
        raise EngineError(
            f"engine.name={engine.name}: the launcher started {launched} processes, but only "
            f"{accelerator.num_processes} of them found each other. On CPUs start them with "
            "torchrun --nproc_per_node N train.py …"
        )
    data_parallel = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.NO)
    if accelerator.distributed_type not in ((DistributedType.DEEPSPEED,) if zero else data_parallel):
        raise EngineError(
            f"engine.name={engine.name}, but these processes work as {accelerator.distributed_type.value}: run "
            "`accelerate config`, or launch with torchrun"
        )
    return accelerator


def shard(engine: EngineConfig, accelerator: Accelerator, model: MemoryModel) -> None:
    """Cut the weights up among the processes, in place, if the engine is FSDP2 and there are several of them.

    A layer is whole only while it is used. Gradients and moments are cut up in the same way. Call this
    before the optimiser is made: it replaces the parameters.
    """
    if engine.name != "fsdp2" or accelerator.num_processes == 1:
        return
    # Of the losses, which nobody changes in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for unit in model.sharding_units():
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)


def prepare(accelerator: Accelerator, model: MemoryModel, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """The model and the optimiser as the engine wraps them; the model itself stays what is measured and saved."""
    if isinstance(model, FSDPModule):  # nothing is left to be done but autocast
        return accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare_optimizer(optimizer)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    return prepared, optimizer


def release(accelerator: Accelerator) -> None:
    """Let go of a model and its optimiser, before others take their place; what was compiled of it is forgotten."""
    accelerator.free_memory()
    torch.compiler.reset()


def is_compiled(wanted: bool | str | None, engine: EngineConfig, accelerator: Accelerator) -> bool:
    """Whether layers are compiled, as `training.compile` says; by default on CUDA, where Triton is there to do it.

    Args:
        engine: resolved, that of the accelerator.

    Raises:
        EngineError: they cannot be.
    """
    in_pieces = engine.name.startswith("zero3")
    if wanted and in_pieces:
        raise EngineError(
            f"training.compile={str(wanted).lower()} with engine={engine.name}: DeepSpeed puts together the weights of "
            "each part of a layer when it is called, which is not compiled; set it to false, or choose another engine"
        )
    if wanted is None:
        has_compiler = accelerator.device.type == "cuda" and importlib.util.find_spec("triton") is not None
        return has_compiler and not in_pieces
    return bool(wanted)


def is_zero(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed keeps the weights and the moments."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def all_reduce_max(accelerator: Accelerator, number: int) -> int:
    """All-reduce (max) of one integer, by way of the hosts: no device is waited for. All processes together."""
    if accelerator.num_processes == 1:
        return number
    numbers = torch.tensor(number)
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group=_hosts())
    return int(numbers)


@cache
def _hosts() -> torch.distributed.ProcessGroup | None:
    """The processes as they talk without their devices; None for all of them where they do anyway."""
    has_device = torch.distributed.get_backend() != "gloo"
    return torch.distributed.new_group(backend="gloo", timeout=_PATIENCE) if has_device else None


def gathered(accelerator: Accelerator, value: Told) -> list[Told]:
    """All-gather of a value, in the order of the processes. All processes together."""
    values = [value] * accelerator.num_processes
    if accelerator.num_processes > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def decided_by_main(accelerator: Accelerator, decide: Callable[[], Told]) -> Told:
    """Broadcast of what the main process decides. All processes together.

    Raises:
        UserError: on all processes, if it was raised on the main one: none is left waiting for it.
    """
    told: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            told[0] = decide()
        except UserError as error:
            told[1] = error
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


def use_tf32(accelerator: Accelerator, wanted: bool) -> bool:
    """Whether operands of float32 products are rounded to TF32 from now on: where it is wanted, on CUDA alone."""
    rounded = wanted and accelerator.device.type == "cuda"
    torch.set_float32_matmul_precision("high" if rounded else "highest")
    return rounded


def rows_of_rank(accelerator: Accelerator, lanes: int) -> range:
    """The lanes of this process: an equal, contiguous part."""
    each = lanes // accelerator.num_processes
    return range(accelerator.process_index * each, (accelerator.process_index + 1) * each)


def _engine_of_the_launcher() -> EngineConfig | None:
    """The engine that `accelerate config` or `accelerate launch` ask for; None if for neither DeepSpeed nor FSDP."""
    environment = os.environ
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        return EngineConfig(name=_zero_name(_stage(_read_deepspeed_file(file)), file), config=file)
    if "ACCELERATE_DEEPSPEED_ZERO_STAGE" in environment:
        offload = {
            part: {"device": environment.get(f"ACCELERATE_DEEPSPEED_{part.upper()}_DEVICE", "none")}
            for part in ("offload_optimizer", "offload_param")
        }
        stage = int(environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"])
        name = _zero_name(stage, "the configuration of accelerate")
        return EngineConfig(name=name, deepspeed={"zero_optimization": {"stage": stage, **offload}})
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        version = environment.get("FSDP_VERSION", "1")
        if version != "2":
            raise EngineError(
                f"accelerate was configured for FSDP version {version}: choose version 2, or engine=fsdp2"
            )
        return EngineConfig(name="fsdp2")
    return None


def _deepspeed_plugin(
    engine: EngineConfig, precision: str, gradient_accumulation: int, gradient_clipping: float | None
) -> DeepSpeedPlugin:
    try:
        import deepspeed.ops
    except ImportError as error:
        raise EngineError(
            f"engine={engine.name} needs DeepSpeed: pip install 'infformer[deepspeed]' (from a checkout: "
            "pip install -e '.[deepspeed]')"
        ) from error
    if not torch.accelerator.is_available():
        # Communication through shared memory would be compiled now, for a minute, or fail for want of a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed's calls under their older names.
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    options = dict(engine.deepspeed) if engine.config is None else _read_deepspeed_file(engine.config)
    stage = _stage(options)
    if f"zero{stage}" != engine.name.removesuffix("_offload"):
        raise EngineError(
            f"engine={engine.name}, but zero_optimization.stage is {stage} in {engine.config or 'engine.deepspeed'}: "
            f"choose engine=zero{stage}, or change the stage"
        )
    for part, option in _DECIDED_ELSEWHERE.items():
        if not _says_nothing(options.pop(part, None)):
            raise EngineError(
                f"{engine.config or 'engine.deepspeed'}: {part} is decided by {option}; remove it there, and set that"
            )
    options |= {
        "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own report of its speed alone
        "gradient_accumulation_steps": gradient_accumulation,
        "gradient_clipping": gradient_clipping or 0.0,
    }
    if precision != "float32":
        # As everywhere: the weights are float32, and so is what processes send each other.
        options["torch_autocast"] = {"enabled": True, "dtype": precision, "lower_precision_safe_modules": []}
    return DeepSpeedPlugin(hf_ds_config=options)


def _read_deepspeed_file(path: str) -> dict[str, Any]:
    if Path(path).is_fifo():
        raise EngineError(f"engine.config={path}: this is a pipe, which would be waited for; give a file")
    try:
        options = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(f"engine.config={path}: not a DeepSpeed configuration in JSON ({error})") from error
    if not isinstance(options, dict):
        raise EngineError(f"engine.config={path}: a DeepSpeed configuration is an object with named parts")
    return options


def _stage(options: Mapping[str, Any]) -> Any:
    """The stage of ZeRO in a DeepSpeed configuration; None if it has none."""
    zero = options.get("zero_optimization")
    return zero.get("stage") if isinstance(zero, Mapping) else None


def _zero_name(stage: Any, where: str) -> str:
    if stage not in (1, 2, 3):
        raise EngineError(f"{where}: zero_optimization.stage is {stage}; make it 1, 2 or 3, or launch with torchrun")
    return f"zero{stage}"


def _says_nothing(part: Any) -> bool:
    """Whether a part of a DeepSpeed configuration leaves its values to this project."""
    if isinstance(part, Mapping):
        return part.get("enabled") in ("auto", False) or all(_says_nothing(value) for value in part.values())
    return part in (None, "auto")


def _be_launched() -> None:
    """Set what torchrun would set in the environment of a single process: DeepSpeed asks for it."""
    if "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
