"""Take a model out of a checkpoint, as a folder that can be shared; it is there whole or not at all.

python scripts/export.py outputs/tiny/checkpoints/best FOLDER
python scripts/export.py outputs/tiny/checkpoints/best FOLDER --what backbone --dtype float16

all: the model with its memories, its tokenizer and its card. AutoModelForCausalLM opens it after `import infformer`.
backbone: the stock model in it, which needs no infformer, with the tokenizer.
memories: the memories and adapters alone, for those who have the backbone (model.memories=FOLDER).
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import argparse
from pathlib import Path

import torch

from infformer.durable import check_new_folder, new_folder
from infformer.errors import UserError
from infformer.models.base import MemoryModel
from infformer.models.loading import has_tokenizer, load_tokenizer, load_trained
from infformer.models.memories import save_memories
from infformer.models.pretrained import InfformerForCausalLM


def main() -> None:
    """Load, take out, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run's folder, a checkpoint of it, or a model folder")
    parser.add_argument("folder", help="where it is written: a new folder, or an empty one")
    parser.add_argument("--what", choices=["all", "backbone", "memories"], default="all", help="as above; default: all")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of all weights but memories"
    )
    arguments = parser.parse_args()
    export(arguments.checkpoint, Path(arguments.folder), arguments.what, getattr(torch, arguments.dtype))


def export(checkpoint: str, folder: Path, what: str, dtype: torch.dtype) -> None:
    """Write the folder, whole or not at all.

    Raises:
        UserError: the checkpoint is none with such a model in it, or the folder cannot be written.
    """
    check_new_folder("FOLDER", folder)
    model = load_trained(checkpoint)
    if what != "all" and not isinstance(model, InfformerForCausalLM):
        raise UserError(
            f"checkpoint={checkpoint} is a decoder from scratch, in which there is no stock model and beside which "
            f"nothing was trained: --what={what} is for others, take --what=all"
        )
    with new_folder("FOLDER", folder) as temporary:
        _save(model, what, dtype, temporary)
        if what != "memories" and has_tokenizer(checkpoint):
            load_tokenizer(checkpoint, "checkpoint").save_pretrained(temporary)
    print(f"written to {folder}")


def _save(model: MemoryModel, what: str, dtype: torch.dtype, folder: Path) -> None:
    if what == "all" or not isinstance(model, InfformerForCausalLM):
        memories = {id(parameter) for parameter in model.memory_parameters()}
        for parameter in model.parameters():
            if id(parameter) not in memories:
                parameter.data = parameter.data.to(dtype)
        model.save_pretrained(folder)
    elif what == "backbone":
        model.stock_backbone().to(dtype).save_pretrained(folder)  # type: ignore[arg-type] # whose decorator hides its own self
    else:
        save_memories(model, folder)


if __name__ == "__main__":
    command.run(main)
