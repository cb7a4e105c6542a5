"""Take the stock language model out of a checkpoint, with its tokenizer, as a plain Hugging Face folder.

python scripts/export_backbone.py outputs/pretrain_tiny/checkpoints/best FOLDER --dtype float16
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

from infformer.durable import check_place, rename, synchronise
from infformer.errors import UserError
from infformer.models.loading import load_tokenizer, load_trained
from infformer.models.pretrained import InfformerForCausalLM


def main() -> None:
    """Load, take out, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint of a run, or a model folder")
    parser.add_argument("folder", help="where the stock model is written")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    arguments = parser.parse_args()
    try:
        export(arguments.checkpoint, Path(arguments.folder), getattr(torch, arguments.dtype))
    except UserError as error:
        sys.exit(f"error: {error}")


def export(checkpoint: str, folder: Path, dtype: torch.dtype) -> None:
    """Write the folder, whole or not at all.

    Raises:
        UserError: the checkpoint is none with a stock model in it, or the folder cannot be written.
    """
    check_place("FOLDER", folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"FOLDER={folder} is not empty: name a new folder, or remove what is in it")
    model, tokenizer = load_trained(checkpoint), load_tokenizer(checkpoint, "checkpoint")
    if not isinstance(model, InfformerForCausalLM):
        raise UserError(
            f"checkpoint={checkpoint} is a decoder from scratch, in which there is no stock model: load it as it is"
        )
    temporary = folder.with_name(folder.name + ".partial")
    try:
        if temporary.exists():  # of an export that was killed
            shutil.rmtree(temporary)
        model.stock_backbone().to(dtype).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        synchronise(temporary)
        rename(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"FOLDER={folder}: it could not be written ({error}); make room, or name another") from error
    print(f"written to {folder}")


if __name__ == "__main__":
    command.run(main)
