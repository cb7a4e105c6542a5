"""Show what a model's memory holds and gains while it reads one document: a page with its text, `index.html`.

python scripts/inspect_memory.py outputs/tiny/checkpoints/best sample
python scripts/inspect_memory.py outputs/mine/checkpoints/best book.txt --segments 128 --layers 0 5 11
python scripts/inspect_memory.py outputs/mine/checkpoints/best book.txt --layers all

Beside the page lie its figures as PNG, and all its numbers in `inspection.json`.
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import argparse
from pathlib import Path

import torch

from infformer.data.options import DataConfig
from infformer.data.tokenization import tokenize_documents
from infformer.durable import check_new_folder
from infformer.errors import UserError
from infformer.evaluation.memory_instruments import inspect_document, inspected_memories
from infformer.evaluation.report import write_results
from infformer.models.base import MemoryModel
from infformer.models.loading import check_vocabulary, load_tokenizer, load_trained
from infformer.plots.memory import plot_inspection
from infformer.plots.page import write_page
from infformer.results import Inspection


def main() -> None:
    """Read the options, read the document, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint of a run, or a model folder")
    parser.add_argument(
        "document", help="a text file, or `sample`: the first held-out novel that comes with the package"
    )
    parser.add_argument("--tokenizer", help="its folder or name on the hub, where the checkpoint has none")
    parser.add_argument("--segments", type=int, default=64, help="read at most so many segments (default: 64)")
    parser.add_argument(
        "--layers", nargs="+", help="look at these layers, numbered from 0, or at `all`; by default at four of them"
    )
    parser.add_argument("--folder", type=Path, default=Path("outputs/inspection"), help="a new one, for the page")
    arguments = parser.parse_args()
    inspection = inspect(arguments)
    write_results(arguments.folder / "inspection.json", inspection)
    figures = plot_inspection(arguments.folder / "inspection.json")
    print(f"written to {write_page(arguments.folder / 'inspection.json', figures)}")


def inspect(arguments: argparse.Namespace) -> Inspection:
    """What `inspect_document` finds, with the names of the checkpoint and of the document.

    Raises:
        UserError: the checkpoint, the document or an option cannot be used.
    """
    check_new_folder("--folder", arguments.folder)
    sample = arguments.document == "sample"
    if not sample and not Path(arguments.document).expanduser().exists():
        raise UserError(f"document={arguments.document}: there is no such file; name a text file, or `sample`")
    model = load_trained(arguments.checkpoint)
    tokenizer = load_tokenizer(
        arguments.tokenizer or arguments.checkpoint, "--tokenizer" if arguments.tokenizer else "checkpoint"
    )
    check_vocabulary(model, tokenizer, "--tokenizer")
    source = {"source": "sample"} if sample else {"source": "files", "test": arguments.document}
    documents = tokenize_documents(DataConfig(**source, max_documents=1), "test", tokenizer)
    tokens = torch.from_numpy(documents.tokens(0, 0, int(documents.token_counts[0])))
    if torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type] # whose decorator hides its own self
    found = inspect_document(
        model,
        tokens,
        arguments.segments,
        _layers(arguments.layers, model),
        decode=lambda part: str(tokenizer.decode(part, clean_up_tokenization_spaces=False)),
    )
    return {"checkpoint": str(arguments.checkpoint), "name": documents.ids[0], **found}


def _layers(typed: list[str] | None, model: MemoryModel) -> list[int] | None:
    if typed == ["all"]:
        return list(inspected_memories(model))
    unknown = [layer for layer in typed or [] if not layer.isdecimal()]
    if unknown:
        raise UserError(f"--layers {' '.join(unknown)}: give the numbers of layers, from 0, or `all`")
    return None if typed is None else [int(layer) for layer in typed]


if __name__ == "__main__":
    command.run(main)
