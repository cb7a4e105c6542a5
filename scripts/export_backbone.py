"""Take the stock language model out of a checkpoint, with its tokenizer, as a plain Hugging Face folder.

python scripts/export_backbone.py outputs/pretrain_tiny/checkpoints/best FOLDER --dtype float16
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import argparse
import sys

import torch

from infformer.errors import UserError
from infformer.models.loading import load_tokenizer, load_trained


def main() -> None:
    """Load, take out, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint of a run, or a model folder")
    parser.add_argument("folder", help="where the stock model is written")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    arguments = parser.parse_args()
    try:
        model, tokenizer = load_trained(arguments.checkpoint), load_tokenizer(arguments.checkpoint, "checkpoint")
    except UserError as error:
        sys.exit(f"error: {error}")
    model.backbone.to(getattr(torch, arguments.dtype)).save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)


if __name__ == "__main__":
    command.run(main)
