"""Train a language model with a memory: `accelerate launch train.py model=gpt2_ltm data=wikitext103`.

Options are Hydra's: `conf/` holds their groups, `infformer/config.py` is their map, `--help` lists them.
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

from pathlib import Path

from infformer.config import CONF, RunConfig
from infformer.training.command_line import end_of_sweep, start


def main() -> None:
    """Compose the configuration, check it, run it; a sweep ends with a table of its runs."""
    folders: list[Path] = []

    def run(config: RunConfig) -> None:
        train(config)
        if config.dry_run:
            return
        folders.append(Path(config.output_dir))

    if start("train", RunConfig, CONF, run):
        print(end_of_sweep(folders), flush=True)


def train(config: RunConfig) -> None:
    """Run; a run that was stopped ends with the exit code by which it can be told."""
    from infformer.training import trainer  # what follows loads for seconds

    try:
        trainer.train(config)
    except trainer.TrainingStopped as stopped:
        raise command.Ended(str(stopped), trainer.EXIT_CODE) from stopped


if __name__ == "__main__":
    command.run(main)
