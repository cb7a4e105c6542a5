"""Checkpoints: everything a run needs to go on as if it had never stopped, on any number of processes.

    checkpoints/step-00000200/
        model/                       a Hugging Face folder, with the tokenizer if there is one
        optimizer.safetensors        Adam's moments, by parameter
        process-00000.safetensors    of each process: its lanes and their memory
        state.json                   step, tokens, where the task stands, schedule, best, format
        manifest.json                sizes of all files, written last
    checkpoints/best -> step-…       the lowest validation loss

Weights and moments are whole, however the engine keeps them, and memory is stored by lane; so neither the engine nor
the number of processes matters to who goes on. There is no random state: every draw is a function of the seed and of
where it is made. A checkpoint is written while the training goes on, from a copy in the main process's memory (12 bytes
a parameter), under a temporary name, and renamed when whole. Nothing in it is unpickled.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from infformer.errors import UserError
from infformer.memory.state import MemoryState
from infformer.models.memory_model import MemoryModel
from infformer.tasks.task import Task
from infformer.training.metrics import StepMetrics
from infformer.training.runtime import Accelerator, highest
from infformer.training.shards import Shards

logger = logging.getLogger(__name__)

FORMAT = 3
"""Raised when a checkpoint of before can no longer be read."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written, read, or gone on from."""


@dataclass
class TrainingState:
    """All that changes while a run trains."""

    model: MemoryModel
    """The model itself, not what the engine wraps around it."""
    shards: Shards
    """Its weights and its optimiser's moments, as the engine keeps them."""
    schedule: LRScheduler
    task: Task
    """May be a step ahead."""
    position: dict[str, Any]
    """Where it stood after the last step that was made."""
    memories: list[MemoryState]
    """Of the lanes of this process, part by part."""
    step: int = 0
    tokens: int = 0
    """Read so far, in all lanes."""
    unreported: list[StepMetrics] = field(default_factory=list)
    """What was measured since the last line of metrics."""
    measured: bool = True
    """False: the run was stopped in the middle of the evaluation that is due after this step."""
    best_loss: float | None = None
    """Lowest validation loss so far, nats per token."""
    best_step: int | None = None
    results_before: dict[str, Any] = field(default_factory=dict)
    """Test figures before the first step."""


@dataclass(frozen=True)
class _Copy:
    """What one process writes of a checkpoint: taken at once, so that the training may go on meanwhile."""

    step: int
    is_best: bool
    process: int
    own: dict[str, Tensor]
    """Its lanes and their memory."""
    weights: dict[str, Tensor]
    """This and what follows: on the main process only."""
    moments: dict[str, Tensor]
    shared: dict[str, Any]

    @property
    def name(self) -> str:
        return f"step-{self.step:08d}"

    @property
    def is_main(self) -> bool:
        return self.process == 0


class CheckpointWriter:
    """Writes one checkpoint after the other, each in the background.

    All processes call each method together, with the same arguments.

    Args:
        root: the folder of the checkpoints, which all processes share.
        keep: how many of the last ones stay, beside the best.
    """

    def __init__(self, root: Path, accelerator: Accelerator, keep: int) -> None:
        self._root = root
        self._accelerator = accelerator
        self._keep = keep
        self._copy: _Copy | None = None
        self._thread: threading.Thread
        self._error: Exception | None = None

    def begin(self, state: TrainingState, share: range) -> None:
        """Take a copy of everything and begin to write it; waits for the checkpoint before, if that is not whole yet.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.finish(wait=True)
        self._copy, self._error = _copy_of(state, self._accelerator, share), None
        self._thread = threading.Thread(target=self._write, args=(self._copy, state), name="checkpoint")
        self._thread.start()

    def finish(self, wait: bool) -> None:
        """If a checkpoint is being written and all processes are done with it, give it its name, and remove old ones.

        Args:
            wait: until it is written.

        Raises:
            CheckpointError: it could not be written; earlier ones are as they were.
        """
        copy = self._copy
        if copy is None:
            return
        if wait:
            self._thread.join()
        writing, failed = self._thread.is_alive(), self._error is not None
        # All processes learn here how it went, and give up together. A failure is told at once.
        outcome = highest(self._accelerator, 2 if failed else int(writing))
        if outcome == 1:
            return
        self._thread.join()
        partial = self._root / f"{copy.name}.partial"
        if outcome == 0 and copy.is_main:
            try:
                _rename_when_whole(partial, self._root / copy.name, self._accelerator.num_processes)
                if copy.is_best:
                    _point_to(self._root / "best", self._root / copy.name)
            except OSError as error:
                self._error = error
        self._copy = None
        if highest(self._accelerator, int(self._error is not None or outcome == 2)):
            if copy.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {copy.step} could not be written to {self._root}: "
                f"{self._error or 'another process failed'}. Earlier checkpoints are untouched; make room, or set "
                "output_dir= to another place."
            ) from self._error
        if copy.is_main:
            remove_old_checkpoints(self._root, self._keep)

    def _write(self, copy: _Copy, state: TrainingState) -> None:
        """In the background; of the state only what never changes is used."""
        partial = self._root / f"{copy.name}.partial"
        try:
            partial.mkdir(parents=True, exist_ok=True)
            save_file(copy.own, partial / f"process-{copy.process:05d}.safetensors")
            if copy.is_main:
                state.model.save_pretrained(partial / "model", state_dict=copy.weights)
                if state.task.tokenizer is not None:
                    state.task.tokenizer.save_pretrained(partial / "model")
                save_file(copy.moments, partial / "optimizer.safetensors")
                (partial / "state.json").write_text(json.dumps(copy.shared, indent=1))
        except Exception as error:  # whatever it is: what is not whole must not be taken for it
            self._error = error


def load_checkpoint(folder: Path, state: TrainingState, accelerator: Accelerator, share: range) -> None:
    """Put everything but the weights back into place; all processes call this together.

    The weights are loaded first of all, by `load_weights`: engines copy them when they take the model over.
    """
    saved = json.loads((folder / "state.json").read_text())
    state.shards.put_moments(load_file(folder / "optimizer.safetensors"))
    state.schedule.load_state_dict(saved["schedule"] | {"lr_lambdas": []})  # they are the configuration's
    for group, rate in zip(state.schedule.optimizer.param_groups, state.schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    if accelerator.scaler is not None and saved["scaler"]:
        accelerator.scaler.load_state_dict(saved["scaler"])
    state.task.load_state_dict(saved["task"])
    state.position = saved["task"]
    state.memories = _load_memories(folder, state.memories, share, accelerator.device)
    state.unreported = [StepMetrics(**entry) for entry in saved["unreported"]]
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
    """Keep the last `keep` whole checkpoints and the best.

    What other processes are writing at this moment, perhaps of the next checkpoint already, is not touched.
    """
    best = best_checkpoint(root)
    folders = sorted(root.glob("step-????????"))
    kept = [folder for folder in folders if what_is_wrong(folder) is None][-keep:]
    for folder in folders:
        if folder < kept[0] and folder.resolve() != best:
            removed = root / f"{folder.name}.partial"  # if killed now, nothing looks like a checkpoint but is none
            os.replace(folder, removed)
            shutil.rmtree(removed, ignore_errors=True)


def load_weights(folder: Path, model: MemoryModel) -> None:
    """The weights alone, into a model that no engine has taken over yet."""
    model.load_state_dict(model_tensors(folder, model), strict=True)


def model_tensors(folder: Path, model: MemoryModel) -> dict[str, Tensor]:
    """The weights in a checkpoint by their names in the model, tied ones under all of theirs."""
    tensors: dict[str, Tensor] = {}
    for path in sorted((folder / "model").glob("*.safetensors")):
        tensors |= load_file(path)
    for target, source in model.all_tied_weights_keys.items():  # stored once
        if source in tensors:
            tensors.setdefault(target, tensors[source])
        elif target in tensors:
            tensors.setdefault(source, tensors[target])
    return tensors


def remove_unfinished(root: Path) -> None:
    """What a run that was killed had begun to write."""
    for partial in root.glob("*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _copy_of(state: TrainingState, accelerator: Accelerator, share: range) -> _Copy:
    main = accelerator.is_main_process
    weights, moments = dict[str, Tensor](), dict[str, Tensor]()
    for tensors, whole in ((weights, state.shards.weights()), (moments, state.shards.moments())):
        for name, tensor in whole:  # also where nothing is kept: all processes put a tensor together
            if main:
                tensors[name] = _to_host(tensor)
    memory = MemoryState.concatenate(state.memories).named_tensors()
    own = {"lanes": torch.tensor(share)} | {f"memory.{name}": _to_host(tensor) for name, tensor in memory.items()}
    schedule = {name: value for name, value in state.schedule.state_dict().items() if name != "lr_lambdas"}
    shared = {
        "format": FORMAT,
        "step": state.step,
        "tokens": state.tokens,
        "measured": state.measured,
        "best_loss": state.best_loss,
        "best_step": state.best_step,
        "task": state.position,
        "schedule": schedule,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "unreported": [asdict(entry) for entry in state.unreported],
        "results_before": state.results_before,
    }
    is_best = state.best_step == state.step
    return _Copy(state.step, is_best, accelerator.process_index, own, weights, moments, shared if main else {})


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True).contiguous()


def _rename_when_whole(partial: Path, folder: Path, processes: int) -> None:
    found = len(list(partial.glob("process-*.safetensors")))
    if found != processes:
        raise FileNotFoundError(
            f"of {processes} processes only {found} have written to it; all machines must share this folder"
        )
    sizes = {
        str(path.relative_to(partial)): path.stat().st_size for path in sorted(partial.rglob("*")) if path.is_file()
    }
    (partial / "manifest.json").write_text(json.dumps(sizes, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _load_memories(folder: Path, memories: list[MemoryState], share: range, device: torch.device) -> list[MemoryState]:
    """The memories of these lanes, whichever process had them, cut into parts like those given."""
    files = [load_file(path) for path in sorted(folder.glob("process-*.safetensors"))]
    lanes = torch.cat([file["lanes"] for file in files])
    rows = torch.stack([(lanes == lane).nonzero()[0, 0] for lane in share])
    template = MemoryState.concatenate(memories)
    stored = {name: torch.cat([file[f"memory.{name}"] for file in files]) for name in template.named_tensors()}
    return template.with_tensors(stored).select_rows(rows.to(device)).split(len(memories))


def _point_to(link: Path, folder: Path) -> None:
    """Make a symbolic link, or change it at once."""
    temporary = link.with_name(link.name + ".new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    os.replace(temporary, link)
