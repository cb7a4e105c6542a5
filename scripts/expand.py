"""Make a model larger that computes the same, as a folder that is measured, that writes, and that is trained on.

python scripts/expand.py outputs/decoder/checkpoints/best FOLDER --hidden 512 --layers 8

What stays as it is, and what cannot grow, docs/growing.md says.
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import argparse
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError

from infformer.durable import check_place, rename, synchronise
from infformer.errors import UserError
from infformer.models.expansion import expand_model
from infformer.models.folders import model_folder
from infformer.models.loading import TOKENIZER_FILES, load_tokenizer, load_trained

OPTIONS = {
    "feed_forward_size": ("--feed-forward", "width inside the feed-forward parts"),
    "num_attention_heads": ("--heads", "heads of attention"),
    "head_size": ("--head-size", "width of a head's values; of a Hugging Face model of its queries and keys too"),
    "key_size": ("--key-size", "width of a head's queries and keys, of our own decoder"),
    "hidden_size": ("--hidden", "width of the residual stream"),
    "num_hidden_layers": ("--layers", "layers"),
}


def main() -> None:
    """Load, expand, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run's folder, a checkpoint of it, or a model folder")
    parser.add_argument("folder", help="where it is written: a new folder, or an empty one")
    for name, (option, meaning) in OPTIONS.items():
        parser.add_argument(option, dest=name, type=int, metavar="N", help=meaning)
    parser.add_argument("--seed", type=int, default=0, help="of new weights that are free")
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
    try:
        if not sizes:
            raise UserError(f"nothing is to grow: give one of {', '.join(option for option, _ in OPTIONS.values())}")
        write_expanded(arguments.checkpoint, Path(arguments.folder), sizes, arguments.seed)
    except UserError as error:
        sys.exit(f"error: {error}")


def write_expanded(checkpoint: str, folder: Path, sizes: dict[str, int], seed: int) -> None:
    """Write the folder, whole or not at all.

    Raises:
        UserError: the checkpoint is none of a model that can grow so, or the folder cannot be written.
    """
    check_place("FOLDER", folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"FOLDER={folder} is not empty: name a new folder, or remove what is in it")
    model = load_trained(checkpoint)
    larger = expand_model(model, seed, **sizes)
    place = Path(model_folder(checkpoint))
    temporary = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a call that was killed
        larger.save_pretrained(temporary)
        if not place.is_dir() or any((place / name).is_file() for name in TOKENIZER_FILES):
            load_tokenizer(checkpoint, "checkpoint").save_pretrained(temporary)
        synchronise(temporary)
        rename(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"FOLDER={folder}: it could not be written ({error}); make room, or name another") from error
    before, after = (sum(parameter.numel() for parameter in one.parameters()) for one in (model, larger))
    print(f"written to {folder}: {after:,} weights, of {before:,}")


if __name__ == "__main__":
    command.run(main)
