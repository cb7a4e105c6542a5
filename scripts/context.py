"""What more text before each segment is worth to a model as it is: the ceiling of what a memory could give it.

python scripts/context.py --model FOLDER books/*.txt
python scripts/context.py --model FOLDER books/*.txt --characters 8000 --before 0 128 512 1024 1536

Every segment is read with so many of the tokens before it, each time anew: exact context, at its full cost. Prints
tables by the place in the segment and by how far back a token occurred last; writes context.json and context.md.
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import argparse
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grid import write_report
from numpy.typing import NDArray

from infformer.data.files import read_lines
from infformer.durable import check_new_folder
from infformer.errors import UserError
from infformer.evaluation.figures import place_edges, previous_occurrences, ratio_of
from infformer.models.loading import load_tokenizer, load_trained
from infformer.models.streaming import reading
from infformer.progress import follow

DISTANCES = (1, 64, 512, 1024, 1536, 2048)
"""Edges of how many tokens before a token it occurred last."""


def main() -> None:
    """Read the texts with each context, count, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path, metavar="TEXT")
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--characters", type=int, metavar="N", help="of the beginning of each text; default: all")
    parser.add_argument("--segment", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--before", nargs="+", type=int, default=(0, 128, 512, 1024, 1536), metavar="TOKENS")
    parser.add_argument("--folder", type=Path, default=Path("outputs/context"), help="a new one")
    arguments = parser.parse_args()
    rows = measure(arguments)
    write_report(arguments.folder, "context", {"segment": arguments.segment, "rows": rows}, format_tables(rows))


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What `describe` says of the texts, read with each context.

    Raises:
        UserError: the model, a text or an option cannot be used.
    """
    check_new_folder("--folder", arguments.folder)
    characters = [] if arguments.characters is None else [arguments.characters]
    for option, values, least in (
        ("--segment", [arguments.segment], 1), ("--before", arguments.before, 0), ("--characters", characters, 1),
    ):  # fmt: skip
        if min(values, default=least) < least:
            raise UserError(f"{option} {min(values)}: must be at least {least}")
    texts = ["".join(read_lines(path))[: arguments.characters] for path in arguments.texts]
    tokenizer, model = load_tokenizer(arguments.model, "--model"), load_trained(arguments.model)
    longest = max(arguments.before) + arguments.segment
    if model.positions is not None and longest > model.positions:
        raise UserError(
            f"--before {max(arguments.before)} --segment {arguments.segment}: these are {longest} tokens at once, and "
            f"the model has {model.positions} positions; give fewer"
        )
    documents = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    for path, document in zip(arguments.texts, documents, strict=True):
        if len(document) < 2:
            raise UserError(f"{path}: there are fewer than 2 tokens in it, so none to predict; give a longer text")
    nats = {before: list[NDArray[np.float64]]() for before in arguments.before}
    for document in follow(documents, "reading", "texts", len(documents)):
        for before, found in losses(model, document, arguments.segment, arguments.before).items():
            nats[before].append(found)
    return describe([document.numpy() for document in documents], nats, arguments.segment)


def losses(model: Any, document: torch.Tensor, segment: int, contexts: Sequence[int]) -> dict[int, NDArray[np.float64]]:
    """The nats of every token of a document but the first, each segment read with so many tokens before it.

    Near the beginning there are no more than some, and what several contexts have in common is read once.
    """
    found: dict[int, list[NDArray[np.float64]]] = {before: [] for before in contexts}
    with reading(model):
        for start in range(0, len(document) - 1, segment):
            stop = min(start + segment, len(document) - 1)
            read: dict[int, NDArray[np.float64]] = {}
            for before, segments in found.items():
                first = max(0, start - before)
                if first not in read:
                    inputs, targets = document[None, first:stop], document[None, first + 1 : stop + 1]
                    output = model(inputs, targets=targets, return_logits=False)
                    read[first] = output.token_losses[0, start - first :].double().numpy()
                segments.append(read[first])
    return {before: np.concatenate(segments) for before, segments in found.items()}


def describe(
    documents: list[NDArray[np.int64]], nats: dict[int, list[NDArray[np.float64]]], segment: int
) -> list[dict[str, Any]]:
    """For each context the nats of all tokens and of each class, and their differences from the first context's."""
    places, edges = place_edges(segment), [*DISTANCES, math.inf]
    classes: list[list[NDArray[np.bool_]]] = []  # of each class its tokens in each document
    names = ["all"]
    classes.append([np.ones(len(document) - 1, dtype=bool) for document in documents])
    for low, high in pairwise(places):
        names.append(f"places {low} to {high}")
        within = [np.arange(len(document) - 1) % segment for document in documents]
        classes.append([(low <= place) & (place < high) for place in within])
    back = []
    for document in documents:
        previous = previous_occurrences(document)[1:]
        back.append(np.where(previous < 0, 0, np.arange(1, len(document)) - previous))
    for low, high in pairwise(edges):
        names.append(f"last {low} to {high:g} tokens back" if high < math.inf else f"last {low} or more tokens back")
        classes.append([(low <= distance) & (distance < high) for distance in back])
    names.append("nowhere before")
    classes.append([distance == 0 for distance in back])
    first = next(iter(nats.values()))
    rows = []
    for before, found in nats.items():
        cells = []
        for name, chosen in zip(names, classes, strict=True):
            counts = np.array([which.sum() for which in chosen])
            sums = np.array([each[which].sum() for each, which in zip(found, chosen, strict=True)])
            base = np.array([each[which].sum() for each, which in zip(first, chosen, strict=True)])
            tokens, more = int(counts.sum()), ratio_of(sums - base, counts)
            cells.append(
                {
                    "name": name,
                    "tokens": tokens,
                    "nats_per_token": float(sums.sum() / tokens) if tokens else None,
                    "difference": more["nats_per_token"],
                    "interval": more["interval"],
                }
            )
        rows.append({"before": before, "classes": cells})
    return rows


def format_tables(rows: list[dict[str, Any]]) -> str:
    """One line for each class of tokens, a column for each context."""
    names = [f"{row['before']:,} before" for row in rows]
    lines = [f"| tokens | how many | {' | '.join(names)} |", f"|{'---|' * (len(names) + 2)}"]
    for index, cell in enumerate(rows[0]["classes"]):
        if not cell["tokens"]:
            continue
        told = [f"{cell['nats_per_token']:.3f}"]
        for row in rows[1:]:
            other = row["classes"][index]
            interval = other["interval"]
            spread = "" if interval is None else f" ({interval[0]:+.3f} to {interval[1]:+.3f})"
            told.append(f"{other['difference']:+.3f}{spread}")
        lines.append(f"| {cell['name']} | {cell['tokens']:,} | {' | '.join(told)} |")
    perplexities = [f"{math.exp(row['classes'][0]['nats_per_token']):.3f}" for row in rows]
    lines.insert(2, f"| *perplexity* | {rows[0]['classes'][0]['tokens']:,} | {' | '.join(perplexities)} |")
    lines += ["", "Nats per token with the first context, then differences from it, with 95 % over documents."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command.run(main)
