"""Train a language model with a memory: `accelerate launch train.py model=gpt2_ltm data=wikitext103`.

Options are Hydra's: `conf/` holds their groups, `infformer/config.py` is their map, `--help` lists them.
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from infformer.config import RunConfig, register_schemas
from infformer.errors import UserError

register_schemas()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(composed: DictConfig) -> None:
    """Compose the configuration, check it, run it."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), composed))
    except (OmegaConfBaseException, ValueError) as error:
        sys.exit(f"error: {error}")
    assert isinstance(config, RunConfig)

    from infformer.training.loop import EXIT_CODE, TrainingStopped  # what follows loads for seconds
    from infformer.training.run import run

    try:
        run(config)
    except TrainingStopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(EXIT_CODE)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
