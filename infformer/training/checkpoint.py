"""Checkpoints: everything a run needs to go on as if it had never stopped.

    checkpoints/step-00000200/
        model/                       a Hugging Face folder, with the tokenizer if there is one
        optimizer.safetensors        Adam's moments, by index of the parameter
        process-00000.safetensors    of each process: its lanes, their memory, its random state
        state.json                   step, tokens, where the task stands, schedule, best, format
        manifest.json                sizes of all files, written last
    checkpoints/best -> step-…       the lowest validation loss

A checkpoint is written under a temporary name and renamed when whole. Nothing in it is unpickled.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from infformer.errors import UserError
from infformer.memory.state import MemoryState
from infformer.models.memory_model import MemoryModel
from infformer.tasks.task import Task
from infformer.training.runtime import Accelerator

logger = logging.getLogger(__name__)

FORMAT = 2
"""Raised when a checkpoint of before can no longer be read."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written, read, or gone on from."""


@dataclass
class TrainingState:
    """All that changes while a run trains."""

    model: MemoryModel
    """The model itself, not what the engine wraps around it."""
    optimizer: Optimizer
    schedule: LRScheduler
    task: Task
    memories: list[MemoryState]
    """Of the lanes of this process, part by part."""
    step: int = 0
    tokens: int = 0
    """Read so far, in all lanes."""
    measured: bool = True
    """False: the run was stopped in the middle of the evaluation that is due after this step."""
    best_loss: float | None = None
    """Lowest validation loss so far, nats per token."""
    best_step: int | None = None
    results_before: dict[str, Any] = field(default_factory=dict)
    """Test figures before the first step."""


def save_checkpoint(root: Path, state: TrainingState, accelerator: Accelerator, share: range) -> Path:
    """Write a checkpoint; all processes call this together.

    Raises:
        CheckpointError: it could not be written; earlier ones are as they were.
    """
    folder = root / f"step-{state.step:08d}"
    partial = root / f"{folder.name}.partial"

    def begin() -> None:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def write() -> None:
        _write_process(partial, state, accelerator, share)
        if accelerator.is_main_process:
            _write_shared(partial, state, accelerator)

    def finish() -> None:
        if accelerator.is_main_process:
            _rename_when_whole(partial, folder)
            if state.best_step == state.step:
                _point_to(root / "best", folder)

    for work in (begin, write, finish):
        error = None
        try:
            work()
        except (OSError, SafetensorError) as caught:
            error = caught
        # All processes wait here for each other, and give up together.
        failed = torch.tensor(float(error is not None), device=accelerator.device)
        if accelerator.reduce(failed, reduction="sum").item() > 0:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {state.step} could not be written to {root}: "
                f"{error or 'another process failed'}. Earlier checkpoints are untouched; make room, or set "
                "output_dir= to another place."
            ) from error
    return folder


def load_checkpoint(folder: Path, state: TrainingState, accelerator: Accelerator, share: range) -> None:
    """Put everything back into place; all processes call this together."""
    saved = json.loads((folder / "state.json").read_text())
    load_weights(folder, state.model)
    _load_optimizer(folder, state.optimizer, saved["parameter_groups"])
    state.schedule.load_state_dict(saved["schedule"] | {"lr_lambdas": []})  # they are the configuration's
    if accelerator.scaler is not None and saved["scaler"]:
        accelerator.scaler.load_state_dict(saved["scaler"])
    state.task.load_state_dict(saved["task"])
    _load_process(folder, state, accelerator, share)
    for name in ("step", "tokens", "measured", "best_loss", "best_step", "results_before"):
        setattr(state, name, saved[name])


def newest_checkpoint(root: Path) -> Path | None:
    """The newest whole checkpoint; broken ones are passed over with a warning."""
    for folder in sorted(root.glob("step-????????"), reverse=True):
        problem = what_is_wrong(folder)
        if problem is None:
            return folder
        logger.warning("%s is passed over: %s", folder, problem)
    return None


def what_is_wrong(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, in words; None if it can."""
    try:
        sizes = json.loads((folder / "manifest.json").read_text())
        for name, size in sizes.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
        version = json.loads((folder / "state.json").read_text())["format"]
    except (OSError, ValueError, KeyError) as error:
        return f"it is not whole ({error})"
    return None if version == FORMAT else f"its format is {version}, this version reads {FORMAT}"


def best_checkpoint(root: Path) -> Path | None:
    """The checkpoint of the lowest validation loss, if there is one and it is whole."""
    best = (root / "best").resolve()
    return best if what_is_wrong(best) is None else None


def remove_old_checkpoints(root: Path, keep: int) -> None:
    """Keep the last `keep` whole checkpoints and the best; leave nothing half written behind."""
    best = best_checkpoint(root)
    folders = sorted(root.glob("step-????????"))
    kept = [folder for folder in folders if what_is_wrong(folder) is None][-keep:]
    for folder in folders:
        if folder < kept[0] and folder.resolve() != best:
            os.replace(
                folder, root / f"{folder.name}.partial"
            )  # if killed now, nothing looks like a checkpoint but is none
    for partial in root.glob("*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def load_weights(folder: Path, model: MemoryModel) -> None:
    """The weights alone."""
    model.load_state_dict(_load_model_tensors(folder, model), strict=True)


def _write_shared(partial: Path, state: TrainingState, accelerator: Accelerator) -> None:
    state.model.save_pretrained(partial / "model")
    if state.task.tokenizer is not None:
        state.task.tokenizer.save_pretrained(partial / "model")
    saved = state.optimizer.state_dict()
    moments = {
        f"{index}.{name}": torch.as_tensor(value).contiguous()
        for index, entry in saved["state"].items()
        for name, value in entry.items()
    }
    save_file(moments, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(
        json.dumps(
            {
                "format": FORMAT,
                "step": state.step,
                "tokens": state.tokens,
                "measured": state.measured,
                "best_loss": state.best_loss,
                "best_step": state.best_step,
                "task": state.task.state_dict(),
                "schedule": {
                    name: value for name, value in state.schedule.state_dict().items() if name != "lr_lambdas"
                },
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "parameter_groups": saved["param_groups"],
                "results_before": state.results_before,
            },
            indent=1,
        )
    )


def _rename_when_whole(partial: Path, folder: Path) -> None:
    sizes = {
        str(path.relative_to(partial)): path.stat().st_size for path in sorted(partial.rglob("*")) if path.is_file()
    }
    (partial / "manifest.json").write_text(json.dumps(sizes, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _write_process(partial: Path, state: TrainingState, accelerator: Accelerator, share: range) -> None:
    tensors = {"lanes": torch.tensor(share), "random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    memory = MemoryState.concatenate(state.memories)
    tensors |= {f"memory.{name}": tensor.cpu().contiguous() for name, tensor in memory.named_tensors().items()}
    save_file(tensors, partial / f"process-{accelerator.process_index:05d}.safetensors")


def _load_process(folder: Path, state: TrainingState, accelerator: Accelerator, share: range) -> None:
    """Each lane's memory, whichever process had the lane; this process's random state, if it had one."""
    files = [load_file(path) for path in sorted(folder.glob("process-*.safetensors"))]
    lanes = torch.cat([file["lanes"] for file in files])
    rows = torch.stack([(lanes == lane).nonzero()[0, 0] for lane in share])
    template = MemoryState.concatenate(state.memories)
    stored = {name: torch.cat([file[f"memory.{name}"] for file in files]) for name in template.named_tensors()}
    memory = template.with_tensors(stored).select_rows(rows.to(accelerator.device))
    state.memories = memory.split(len(state.memories))
    if accelerator.process_index < len(files):
        own = files[accelerator.process_index]
        torch.set_rng_state(own["random.cpu"])
        if torch.cuda.is_available() and "random.cuda" in own:
            torch.cuda.set_rng_state(own["random.cuda"])


def _load_optimizer(folder: Path, optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    entries: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        entries.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def _load_model_tensors(folder: Path, model: MemoryModel) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted((folder / "model").glob("*.safetensors")):
        tensors |= load_file(path)
    for target, source in model.all_tied_weights_keys.items():  # stored once
        if source in tensors:
            tensors.setdefault(target, tensors[source])
        elif target in tensors:
            tensors.setdefault(source, tensors[target])
    return tensors


def _point_to(link: Path, folder: Path) -> None:
    """Make a symbolic link, or change it at once."""
    temporary = link.with_name(link.name + ".new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    os.replace(temporary, link)
