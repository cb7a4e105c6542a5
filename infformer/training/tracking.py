"""Experiment trackers: where a run's numbers are shown while it trains. The only file that imports wandb.

A tracker is a view. What a run must keep is in its own folder (`metrics.jsonl`, `results.json`), so a tracker that
fails in the middle of a run costs a warning and nothing else. One that cannot start is an error, before any work.
"""

from __future__ import annotations

import html
import logging
import os
import textwrap
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.image import imread

from infformer.config import TrackerConfig
from infformer.errors import UserError
from infformer.training.folder import flatten

logger = logging.getLogger(__name__)


class TrackerError(UserError, RuntimeError):
    """A tracker that cannot start."""


class Tracker:
    """What the training loop needs of a tracker; this one reports nothing."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Report numbers by name."""

    def log_text(self, name: str, text: str, step: int) -> None:
        """Report a text, shown as it is."""

    def log_figure(self, name: str, path: Path, step: int) -> None:
        """Report a figure that was saved as a PNG file."""

    def summarise(self, figures: Mapping[str, float], step: int) -> None:
        """Report the final figures, by which runs are compared."""

    def finish(self) -> None:
        """Send what is still on its way, and close."""


def open_tracker(
    options: TrackerConfig, run_name: str, run_directory: Path, config: Mapping[str, object], step: int = 0
) -> Tracker:
    """Open the tracker of a run, on the main process only.

    Args:
        options: which tracker, and its settings.
        run_name: the name under which the run is listed.
        run_directory: the run's folder; what the tracker stores locally goes below it. Opening a tracker again on the
            same folder continues the same run.
        config: the run's resolved configuration, nested as it is.
        step: after which the run goes on; what was reported of later ones is reported again.

    Raises:
        TrackerError: the tracker's package is not installed, or wandb would report online and nobody is logged in.
    """
    if options.name == "none":
        return Tracker()
    run_directory.mkdir(parents=True, exist_ok=True)
    if options.name == "wandb":
        return _ForgivingTracker(_WandbTracker(options, run_name, run_directory, config))
    return _ForgivingTracker(_TensorBoardTracker(run_directory, config, step))


def check_tracker(options: TrackerConfig) -> None:
    """Make sure, before any work, that a tracker can be opened.

    Raises:
        TrackerError: its package is not installed, its options are none that it takes, or nobody is logged in.
    """
    if options.name == "tensorboard":
        _import_tensorboard()
    if options.name == "wandb":
        wandb = _import_wandb()
        try:
            wandb.Settings(project=options.project, entity=options.entity, run_tags=tuple(options.tags))
        except (wandb.errors.Error, ValueError) as error:
            raise _refused(error) from error
        _mode_of_wandb(options, wandb)


class _ForgivingTracker(Tracker):
    """Passes everything on to a tracker until that fails; then warns once and goes on without it."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._attempt(self._tracker.log, metrics, step)

    def log_text(self, name: str, text: str, step: int) -> None:
        self._attempt(self._tracker.log_text, name, text, step)

    def log_figure(self, name: str, path: Path, step: int) -> None:
        self._attempt(self._tracker.log_figure, name, path, step)

    def summarise(self, figures: Mapping[str, float], step: int) -> None:
        self._attempt(self._tracker.summarise, figures, step)

    def finish(self) -> None:
        self._attempt(self._tracker.finish)

    def _attempt(self, report: Callable[..., None], *arguments: Any) -> None:
        try:
            report(*arguments)
        except Exception:
            logger.warning("The tracker failed; the run goes on without it.", exc_info=True)
            self._tracker = Tracker()


class _WandbTracker(Tracker):
    """Weights & Biases."""

    def __init__(
        self, options: TrackerConfig, run_name: str, run_directory: Path, config: Mapping[str, object]
    ) -> None:
        self._wandb = wandb = _import_wandb()
        mode = _mode_of_wandb(options, wandb)
        # The id lives in the run's folder, so that a resumed run continues its own curves.
        id_file = run_directory / "wandb_id"
        run_id = id_file.read_text().strip() if id_file.exists() else uuid.uuid4().hex[:12]
        start = partial(
            wandb.init,
            project=options.project,
            entity=options.entity,
            name=run_name,
            id=run_id,
            tags=list(options.tags),
            dir=run_directory,
            config=config,
        )
        try:
            self._run = start(mode=mode, resume="allow" if mode == "online" else None)
        except wandb.errors.CommError as error:
            _record_offline(error)
            self._run = start(mode="offline")
        except (wandb.errors.Error, ValueError) as error:
            raise _refused(error) from error
        id_file.write_text(run_id + "\n")
        # A metric of its own instead of wandb's step, which may only grow: a run resumed from a checkpoint does some
        # steps again, and wandb would drop them.
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log({**metrics, "step": step})

    def log_text(self, name: str, text: str, step: int) -> None:
        self._run.log({name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>"), "step": step})

    def log_figure(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._wandb.Image(str(path)), "step": step})

    def summarise(self, figures: Mapping[str, float], step: int) -> None:
        self._run.summary.update(dict(figures))

    def finish(self) -> None:
        self._run.finish()


def _mode_of_wandb(options: TrackerConfig, wandb: Any) -> Any:
    """The mode in which wandb reports: offline if its server cannot be reached.

    Raises:
        TrackerError: nobody is logged in.
    """
    # Asked of wandb itself, as there are many places to log in from: the environment, netrc, settings files.
    mode = options.mode or os.environ.get("WANDB_MODE") or wandb.setup().settings.mode
    try:
        somebody = mode != "online" or wandb.login(prompt=False)
    except wandb.errors.CommError as error:
        _record_offline(error)
        return "offline"
    except (wandb.errors.Error, ValueError) as error:
        raise _refused(error) from error
    if not somebody:
        raise TrackerError(
            "tracker.name=wandb, but nobody is logged in to wandb. Run `wandb login`, or record on this machine "
            "alone with tracker.mode=offline (or WANDB_MODE=offline), or choose another tracker."
        )
    return mode


def _record_offline(error: Exception) -> None:
    logger.warning(
        "wandb cannot be reached, or does not know the key (%s); it records in wandb/ of the run's folder, from where "
        "`wandb sync` can send it",
        error,
    )


def _refused(error: Exception) -> TrackerError:
    """The error for a project, an entity or tags that wandb refuses."""
    return TrackerError(
        f"tracker.name=wandb does not take its options ({' '.join(str(error).split())}): mend tracker.project=, "
        "tracker.entity=, tracker.tags= or tracker.mode=, or choose tracker=none"
    )


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise _missing_package("wandb") from error
    return wandb


def _import_tensorboard() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing_package("tensorboard") from error
    return SummaryWriter


class _TensorBoardTracker(Tracker):
    """TensorBoard event files under `tensorboard/` in the run's folder."""

    def __init__(self, run_directory: Path, config: Mapping[str, object], step: int) -> None:
        self._writer = _import_tensorboard()(log_dir=str(run_directory / "tensorboard"), purge_step=step + 1)
        from torch.utils.tensorboard.summary import hparams

        # Plain values, the only ones that it accepts.
        plain = {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in flatten(config).items()
        }
        # Without the list of metrics that `add_hparams` writes: TensorBoard then shows all that there are.
        _, options, _ = hparams(plain, {})
        self._writer.file_writer.add_summary(options)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_text(self, name: str, text: str, step: int) -> None:
        # TensorBoard reads Markdown; an indented block is shown as it is.
        self._writer.add_text(name, textwrap.indent(text, "    ", lambda line: True), step)

    def log_figure(self, name: str, path: Path, step: int) -> None:
        self._writer.add_image(name, imread(path), step, dataformats="HWC")

    def summarise(self, figures: Mapping[str, float], step: int) -> None:
        """As scalars: its table of hyperparameters shows the last of each beside them."""
        self.log(figures, step)

    def finish(self) -> None:
        self._writer.close()


def _missing_package(name: str) -> TrackerError:
    return TrackerError(
        f"tracker.name={name} needs the package {name}, which is not installed. Install it with "
        f"pip install 'infformer[{name}]' (in a checkout: pip install -e '.[{name}]')."
    )
