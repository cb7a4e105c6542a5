"""Make a model larger that computes the same, as a folder that is measured, that writes, and that is trained on.

python scripts/expand.py outputs/decoder/checkpoints/best FOLDER --hidden 512 --layers 8

What stays as it is, and what cannot grow, docs/growing.md says.
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import argparse
from pathlib import Path

from infformer.durable import check_new_folder, new_folder
from infformer.errors import UserError
from infformer.models.expansion import expand_model
from infformer.models.loading import has_tokenizer, load_tokenizer, load_trained

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
    if not sizes:
        raise UserError(f"nothing is to grow: give one of {', '.join(option for option, _ in OPTIONS.values())}")
    write_expanded(arguments.checkpoint, Path(arguments.folder), sizes, arguments.seed)


def write_expanded(checkpoint: str, folder: Path, sizes: dict[str, int], seed: int) -> None:
    """Write the folder, whole or not at all.

    Raises:
        UserError: the checkpoint is none of a model that can grow so, or the folder cannot be written.
    """
    check_new_folder("FOLDER", folder)
    model = load_trained(checkpoint)
    larger = expand_model(model, seed, **sizes)
    with new_folder("FOLDER", folder) as temporary:
        larger.save_pretrained(temporary)
        if has_tokenizer(checkpoint):
            load_tokenizer(checkpoint, "checkpoint").save_pretrained(temporary)
    before, after = (sum(parameter.numel() for parameter in one.parameters()) for one in (model, larger))
    print(f"written to {folder}: {after:,} weights, of {before:,}")


if __name__ == "__main__":
    command.run(main)
