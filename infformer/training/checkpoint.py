"""Checkpoints: everything a run needs to go on as if it had never stopped, on any number of processes.

    checkpoints/step-00000200/
        model/                       a Hugging Face folder, with the tokenizer if there is one
        optimizer.safetensors        Adam's moments, by parameter
        process-00000.safetensors    of each process: its lanes and their memory
        state.json                   step, tokens, where the task stands, schedule, best
        manifest.json                format; size and checksum of every file; written last
    checkpoints/best -> step-…       the lowest validation loss

Weights and moments are whole, however the engine keeps them, and memory is stored by lane; so a run can go on with
another engine and another number of processes. There is no random state: every draw is a function of the seed and of
where it is made. A checkpoint is written while the training goes on, from a copy in the main process's memory (12 bytes
a parameter), under a temporary name, and renamed when all of it is on the disk. What is not finite is never saved.
Nothing in a checkpoint is unpickled.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from infformer.durable import rename, synchronise, write_text
from infformer.errors import UserError
from infformer.memory.state import ModelState
from infformer.models.base import MemoryModel
from infformer.models.card import CARD
from infformer.models.quantization import is_quantized
from infformer.training.metrics import StepMetrics
from infformer.training.runtime import Accelerator, all_reduce_max, gathered
from infformer.training.shards import Shards

logger = logging.getLogger(__name__)

FORMAT = 5
"""The format of a checkpoint, raised when older ones can no longer be read. 4: the manifest has checksums."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written, read, or gone on from."""


class DivergedError(CheckpointError):
    """What was to be saved holds numbers that are not finite."""


@dataclass
class Progress:
    """How far a run has come, as JSON."""

    task: Mapping[str, object]
    """Where the task's stream stood after the last step; the stream itself may be a step ahead."""
    step: int = 0
    tokens: int = 0
    """How many tokens all lanes have read so far."""
    unreported: list[StepMetrics] = field(default_factory=list)
    """What was measured since the last line of metrics."""
    measured: bool = True
    """False: the run was stopped in the middle of the evaluation that is due after this step."""
    best_loss: float | None = None
    """Lowest validation loss so far, nats per token."""
    best_step: int | None = None
    results_before: Mapping[str, object] | None = None
    """Test figures before the first step; None, or in older checkpoints nothing, where they were not wanted."""
    held_out: Mapping[str, object] = field(default_factory=dict)
    """The options, as they are typed, by whose texts the best loss and these figures were measured; in older
    checkpoints none."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """The checksums of these texts, by split; in older checkpoints none."""


@dataclass
class TrainingState:
    """All that changes while a run trains, and the tokenizer that is saved beside it."""

    model: MemoryModel
    """The model itself, not what the engine wraps around it."""
    tokenizer: PreTrainedTokenizerBase | None
    shards: Shards
    """The model's weights and its optimiser's moments, as the engine keeps them."""
    schedule: LRScheduler
    memories: list[ModelState]
    """What the lanes of this process remember, microbatch by microbatch."""
    progress: Progress


class _File(TypedDict):
    """What a manifest says of a file."""

    bytes: int
    crc32: int


class _Manifest(TypedDict):
    """What `manifest.json` holds."""

    format: int
    files: dict[str, _File]
    crc32: int
    """The checksum of the files' entries."""


class _SavedState(TypedDict):
    """What `state.json` holds beside the progress, whose fields stand beside these."""

    parts: int
    """Microbatches of a step: processes × `training.gradient_accumulation`."""
    schedule: dict[str, Any]
    """The state that torch gives, as of the scaler."""
    scaler: dict[str, Any] | None


_WHOLE, _WRITING, _FAILED, _DIVERGED = range(4)
"""How the writing of a checkpoint goes, in one process; of all of them the highest counts."""


@dataclass(frozen=True)
class _Copy:
    """What one process writes of a checkpoint: a copy, so that the training can go on while it is written."""

    step: int
    is_best: bool
    process: int
    own: dict[str, Tensor]
    """The lanes of this process and their memory."""
    weights: dict[str, Tensor]
    """This and what follows: on the main process only."""
    moments: dict[str, Tensor]
    shared: Mapping[str, object]

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
        self._files: dict[str, _File] = {}
        """What this process has written: the manifest's entries."""

    def begin(self, state: TrainingState, rank_rows: range) -> None:
        """Take a copy of everything and begin to write it; waits for the checkpoint before, if that is not whole yet.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.finish(wait=True)
        self._copy, self._error, self._files = _copy_of(state, self._accelerator, rank_rows), None, {}
        self._thread = threading.Thread(target=self._write, args=(self._copy, state), name="checkpoint")
        self._thread.start()

    def finish(self, wait: bool) -> None:
        """If a checkpoint is being written and all processes are done with it, give it its name, and remove old ones.

        Args:
            wait: until it is written.

        Raises:
            CheckpointError: it could not be written; earlier ones are as they were.
            DivergedError: there are numbers in it that are not finite.
        """
        copy = self._copy
        if copy is None:
            return
        if wait:
            self._thread.join()
        # All processes learn here how it went, and give up together. A failure is told at once.
        outcome = all_reduce_max(self._accelerator, self._outcome())
        if outcome == _WRITING:
            return
        self._thread.join()
        partial = self._root / f"{copy.name}.partial"
        if outcome == _WHOLE:
            files = gathered(self._accelerator, self._files)
            if copy.is_main:
                try:
                    _rename_when_whole(partial, self._root / copy.name, files)
                    if copy.is_best:
                        point_to_best(self._root, copy.step)
                except OSError as error:
                    self._error = error
        self._copy = None
        outcome = all_reduce_max(self._accelerator, max(outcome, self._outcome()))
        if outcome != _WHOLE and copy.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        if outcome == _DIVERGED:
            raise DivergedError(
                f"after step {copy.step} {self._error or 'what another process holds is not finite'}, so it is not "
                "saved."
            ) from self._error
        if outcome == _FAILED:
            raise CheckpointError(
                f"the checkpoint of step {copy.step} could not be written to {self._root}: "
                f"{self._error or 'another process failed'}. Earlier checkpoints are untouched; make room, or set "
                "output_dir= to another place."
            ) from self._error
        if copy.is_main:
            remove_old_checkpoints(self._root, self._keep)

    def _outcome(self) -> int:
        """How far this process has come with writing."""
        is_alive = self._thread.is_alive()  # asked first: an error may be the last thing that the thread leaves
        if self._error is not None:
            return _DIVERGED if isinstance(self._error, DivergedError) else _FAILED
        return _WRITING if is_alive else _WHOLE

    def _write(self, copy: _Copy, state: TrainingState) -> None:
        """Write a copy to the disk, in the background; of the state only what never changes is used."""
        partial = self._root / f"{copy.name}.partial"
        try:
            for tensors in (copy.weights, copy.moments, copy.own):
                _check_finite(tensors)
            partial.mkdir(parents=True, exist_ok=True)
            written = [partial / f"process-{copy.process:05d}.safetensors"]
            save_file(copy.own, written[0])
            if copy.is_main:
                state.model.save_pretrained(partial / "model", state_dict=copy.weights)
                if state.tokenizer is not None:
                    state.tokenizer.save_pretrained(partial / "model")
                # The card is written anew when the run is over, and no run needs it to go on.
                saved = [path for path in sorted((partial / "model").rglob("*")) if path.is_file()]
                written += [path for path in saved if path.name != CARD]
                written += [partial / "optimizer.safetensors", partial / "state.json"]
                save_file(copy.moments, written[-2])
                write_text(written[-1], json.dumps(copy.shared, indent=1))
                synchronise(partial / "model")
            for path in written:  # here, where it was written: elsewhere a network's disk would not wait for it
                synchronise(path)
            self._files = {
                str(path.relative_to(partial)): {"bytes": path.stat().st_size, "crc32": _checksum(path)}
                for path in written
            }
        except Exception as error:  # whatever it is: what is not whole must not be taken for it
            self._error = error


def load_checkpoint(folder: Path, state: TrainingState, accelerator: Accelerator, rank_rows: range) -> None:
    """Put everything but the weights back into place; all processes call this together.

    The weights are loaded first of all, by `load_weights`: engines copy them when they take the model over.

    Raises:
        CheckpointError: it cannot be read.
    """
    memories = state.memories
    try:
        record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        moments = load_file(folder / "optimizer.safetensors")
        state.memories = _load_memories(folder, memories, rank_rows, accelerator.device)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    saved: _SavedState = record
    state.shards.put_moments(moments)
    state.schedule.load_state_dict(saved["schedule"] | {"lr_lambdas": []})  # they are the configuration's
    for group, rate in zip(state.schedule.optimizer.param_groups, state.schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    if accelerator.scaler is not None and saved["scaler"]:
        accelerator.scaler.load_state_dict(saved["scaler"])
    state.progress = Progress(**{each.name: record[each.name] for each in fields(Progress) if each.name in record})
    state.progress.unreported = [StepMetrics(**entry) for entry in record["unreported"]]
    microbatches = len(memories) * accelerator.num_processes
    if microbatches != saved["parts"] and accelerator.is_main_process:
        logger.warning(
            "the lanes are read in %d microbatch(es) from here on, and were in %d (processes × "
            "training.gradient_accumulation). Dropout is drawn by microbatch, from the step and its first lane: where "
            "the model has dropout, figures are equal to those of a run that did not stop only if every microbatch "
            "holds the same lanes. Without dropout they are equal except for rounding",
            microbatches, saved["parts"],
        )  # fmt: skip


def newest_checkpoint(root: Path) -> Path | None:
    """The newest whole checkpoint; all of it has been read. Damaged ones are passed over with a warning."""
    for folder in sorted(root.glob("step-????????"), reverse=True):
        problem = validate_checkpoint(folder)
        if problem is None:
            return folder
        logger.warning("%s is passed over: %s", folder, problem)
    return None


def validate_checkpoint(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, in words; None if it can. All of it is read."""
    problem = _what_is_missing(folder)
    if problem is not None:
        return problem
    try:
        for name, entry in _manifest(folder)["files"].items():
            if _checksum(folder / name) != entry["crc32"]:
                return f"{name} is damaged: it is not what was written (by its checksum)"
    except OSError as error:
        return f"it cannot be read ({error})"
    return None


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was taken; the checkpoint must be a valid one."""
    return int(json.loads((folder / "state.json").read_text(encoding="utf-8"))["step"])


def best_checkpoint(root: Path) -> Path | None:
    """The checkpoint with the lowest validation loss; None if there is none or, with a warning, if it is not whole."""
    best = (root / "best").resolve()
    if not best.is_dir():
        return None
    problem = validate_checkpoint(best)
    if problem is not None:
        logger.warning("%s, the best, is passed over: %s", best, problem)
    return best if problem is None else None


def point_to_best(root: Path, step: int) -> None:
    """Let `best` point to the checkpoint of this step, if it is there: a run that was killed may not have done so."""
    folder, link = root / f"step-{step:08d}", root / "best"
    if folder.is_dir() and link.resolve() != folder.resolve():
        temporary = link.with_name(link.name + ".new")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name)
        rename(temporary, link)


def remove_old_checkpoints(root: Path, keep: int) -> None:
    """Keep the last `keep` whole checkpoints, by the sizes of their files, and the best one.

    What other processes write meanwhile, perhaps of the next checkpoint already, is not touched.
    """
    best = (root / "best").resolve()
    folders = sorted(root.glob("step-????????"))
    kept = [folder for folder in folders if _what_is_missing(folder) is None][-keep:]
    for folder in folders:
        if kept and folder < kept[0] and folder.resolve() != best:
            removed = root / f"{folder.name}.partial"  # if killed now, nothing looks like a checkpoint but is none
            os.replace(folder, removed)
            shutil.rmtree(removed, ignore_errors=True)


def load_weights(folder: Path, model: MemoryModel) -> None:
    """Load the weights alone into a model that no engine has taken over yet.

    Raises:
        CheckpointError: they cannot be read.
    """
    tensors = model_tensors(folder, model)
    if is_quantized(model):  # what is frozen is there already, in a form that transformers alone can load
        learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        tensors = {name: tensor for name, tensor in tensors.items() if name in learned}
    model.load_state_dict(tensors, strict=not is_quantized(model))


def model_tensors(folder: Path, model: MemoryModel) -> dict[str, Tensor]:
    """The weights in a checkpoint by their names in the model, tied ones under all of theirs."""
    tensors: dict[str, Tensor] = {}
    try:
        for path in sorted((folder / "model").glob("*.safetensors")):
            tensors |= load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    for target, source in model.all_tied_weights_keys.items():  # stored once
        if source in tensors:
            tensors.setdefault(target, tensors[source])
        elif target in tensors:
            tensors.setdefault(source, tensors[target])
    return tensors


def put_back_replaced(root: Path) -> None:
    """Put back a checkpoint that a run had moved away for a newer one, if it was killed before that took its place."""
    for replaced in root.glob("step-????????.replaced"):
        if not replaced.with_suffix("").exists():
            os.replace(replaced, replaced.with_suffix(""))


def remove_unfinished(root: Path) -> None:
    """Remove what a run that was killed had begun to write or to remove."""
    for pattern in ("*.partial", "*.replaced"):
        for folder in root.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def _copy_of(state: TrainingState, accelerator: Accelerator, rank_rows: range) -> _Copy:
    main = accelerator.is_main_process
    weights, moments = dict[str, Tensor](), dict[str, Tensor]()
    for tensors, whole in ((weights, state.shards.weights()), (moments, state.shards.moments())):
        for name, tensor in whole:  # also where nothing is kept: all processes put a tensor together
            if main:
                tensors[name] = _to_host(tensor)
    memory = ModelState.concatenate(state.memories).named_tensors()
    own = {"lanes": torch.tensor(rank_rows)} | {f"memory.{name}": _to_host(tensor) for name, tensor in memory.items()}
    saved: _SavedState = {
        "parts": len(state.memories) * accelerator.num_processes,
        "schedule": {name: value for name, value in state.schedule.state_dict().items() if name != "lr_lambdas"},
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
    }
    shared = {**asdict(state.progress), **saved} if main else {}
    step = state.progress.step
    is_best = state.progress.best_step == step
    return _Copy(step, is_best, accelerator.process_index, own, weights, moments, shared)


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True).contiguous()


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise DivergedError(f"{name} is not finite (NaN or infinite in {count:,} of {tensor.numel():,} numbers)")


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _checksum_of(entries: dict[str, _File]) -> int:
    return zlib.crc32(json.dumps(entries, sort_keys=True).encode())


def _manifest(folder: Path) -> _Manifest:
    manifest: _Manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def _what_is_missing(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, by the names and sizes of its files; None if they are as they should be."""
    try:
        manifest = _manifest(folder)
        found = _format_of(folder, manifest)
        if found != FORMAT:
            return (
                f"its format is {found}, this version reads {FORMAT}; the version that wrote it reads it, which "
                "versions.json in the folder of its run names"
            )
        if _checksum_of(manifest["files"]) != manifest["crc32"]:
            return "manifest.json is damaged: it is not what was written (by its checksum)"
        for name, entry in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}"
        for path in folder.rglob("*.safetensors"):
            if str(path.relative_to(folder)) not in manifest["files"]:
                return f"{path.relative_to(folder)} does not belong to it"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"it is not whole ({type(error).__name__}: {error})"
    return None


def _format_of(folder: Path, manifest: Mapping[str, object]) -> object:
    """The format of a checkpoint: in the manifest, which up to format 3 held nothing but sizes, or in the state."""
    if "format" in manifest:
        return manifest["format"]
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))["format"]


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder} cannot be read ({error}). All machines must see the folder of the run; if they do, go on from an "
        "earlier checkpoint by resume=PATH output_dir=ANOTHER"
    )


def _rename_when_whole(partial: Path, folder: Path, written: list[dict[str, _File]]) -> None:
    """Give a checkpoint its name, if all is there that the processes say they have written."""
    found = sum((partial / f"process-{number:05d}.safetensors").is_file() for number in range(len(written)))
    if found != len(written):
        raise FileNotFoundError(
            f"of {len(written)} processes only {found} have written to it; all machines must share this folder"
        )
    files = {name: entry for entries in written for name, entry in entries.items()}
    manifest: _Manifest = {"format": FORMAT, "files": files, "crc32": _checksum_of(files)}
    write_text(partial / "manifest.json", json.dumps(manifest, indent=1))
    for path in partial.rglob("*.safetensors"):  # of a run on more processes that was killed here
        if str(path.relative_to(partial)) not in files:
            path.unlink()
    replaced = folder.with_name(f"{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.replace(folder, replaced)
    rename(partial, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _load_memories(
    folder: Path, memories: list[ModelState], rank_rows: range, device: torch.device
) -> list[ModelState]:
    """The memories of these lanes, whichever process had them, cut into microbatches like those given."""
    files = [load_file(path) for path in sorted(folder.glob("process-*.safetensors"))]
    lanes = torch.cat([file["lanes"] for file in files])
    rows = torch.stack([(lanes == lane).nonzero()[0, 0] for lane in rank_rows])
    template = ModelState.concatenate(memories)
    stored = {name: torch.cat([file[f"memory.{name}"] for file in files]) for name in template.named_tensors()}
    return template.with_tensors(stored).select_rows(rows.to(device)).split(len(memories))
