"""Show what a model's long-term memory holds while it reads one document: a page with figures, `index.html`.

python scripts/inspect_memory.py outputs/tiny/checkpoints/best sample
python scripts/inspect_memory.py outputs/mine/checkpoints/best book.txt --segments 128 --layers 0 5 11

Beside the page lie its figures as PNG, and all its numbers in `inspection.json`.
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import argparse
import base64
import html
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch

from infformer.data.options import DataConfig
from infformer.data.tokenization import tokenize_documents
from infformer.durable import check_place
from infformer.errors import UserError
from infformer.evaluation.memory_instruments import inspect_document
from infformer.evaluation.report import write_results
from infformer.models.loading import check_vocabulary, load_tokenizer, load_trained
from infformer.plots.memory import plot_inspection
from infformer.results import Inspection, Readings

STYLE = """
body { max-width: 66rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 sans-serif; color: #222 }
figure { margin: 3rem 0 } img { max-width: 100% } p, figcaption { max-width: 48rem }
"""


def main() -> None:
    """Read the options, read the document, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint of a run, or a model folder")
    parser.add_argument(
        "document", help="a text file, or `sample`: the first held-out novel that comes with the package"
    )
    parser.add_argument("--tokenizer", help="its folder or name on the hub, where the checkpoint has none")
    parser.add_argument("--segments", type=int, default=64, help="read at most so many segments (default: 64)")
    parser.add_argument("--layers", type=int, nargs="+", help="look at these layers alone, numbered from 0")
    parser.add_argument("--folder", type=Path, default=Path("outputs/inspection"), help="where the page is written")
    arguments = parser.parse_args()
    try:
        inspection = inspect(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")
    write_results(arguments.folder / "inspection.json", inspection)
    figures = plot_inspection(arguments.folder / "inspection.json")
    page = arguments.folder / "index.html"
    page.write_text(format_page(inspection, figures), encoding="utf-8")
    print(f"written to {page}")


def inspect(arguments: argparse.Namespace) -> Inspection:
    """What `inspect_document` finds, with the names of the checkpoint and of the document.

    Raises:
        UserError: the checkpoint, the document or an option cannot be used.
    """
    check_place("--folder", arguments.folder)
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
        model.to("cuda")
    found = inspect_document(model, tokens, arguments.segments, arguments.layers)
    return {"checkpoint": str(arguments.checkpoint), "name": documents.ids[0], **found}


def format_page(inspection: Inspection, figures: list[Path]) -> str:
    """A page that needs no other file: each figure, and beside it what it shows and how to read it."""
    captions = describe_figures(inspection)
    document, memory = inspection["document"], inspection["memory"]
    title = f"The memory of {inspection['checkpoint']} reading {inspection['name']}"
    sticky = "sticky" if memory["sticky"] else "not sticky"
    summary = (
        f"{document['tokens']:,} tokens in {document['segments']} segments of {memory['segment_length']}, "
        f"{document['nats']:.3f} nats per token. Each layer's memory has {memory['basis_functions']} basis functions, "
        f"is {sticky}, reads by {memory['read']}, and its past contracts "
        + (
            "uniformly."
            if memory["contraction"] == "uniform"
            else f"to {memory['contraction_rate']:g} of its length at every write."
        )
    )
    parts = [
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>',
        f"<style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>\n<p>{html.escape(summary)}</p>",
    ]
    for figure in figures:
        image = base64.b64encode(figure.read_bytes()).decode("ascii")
        caption = html.escape(captions[figure.stem])
        parts.append(
            f'<figure>\n<img alt="{figure.stem.replace("_", " ")}" src="data:image/png;base64,{image}">\n'
            f"<figcaption>{caption}</figcaption>\n</figure>"
        )
    return "\n".join(parts) + "\n</html>\n"


def describe_figures(inspection: Inspection) -> dict[str, str]:
    """By a figure's name what it shows, how to read it, and the numbers that matter most."""
    memory, reading = inspection["memory"], inspection["reading"]
    layers = memory["layers"]
    first, last = inspection["reconstruction"][0], inspection["reconstruction"][-1]
    newest, oldest = ([ages[end] for ages in last["by_age"]] for end in (0, -1))
    costs = _costs(reading, reading["nats_without_memory"])
    by_layer = [_costs(reading, nats) for nats in zip(*reading["nats_without_layer"], strict=True)]
    most = max(range(len(layers)), key=by_layer.__getitem__)
    ratios = [mean(ratios) for ratios in zip(*reading["contribution"], strict=True)]
    widths, centres, back = (_by_layer(reading[name]) for name in ("width", "centre", "tokens_back"))
    captions = {
        "reconstruction": (
            "How much of what was written can still be told from the memory: R² of the hidden states of each past "
            f"segment by its age (left), and of all of them (right). 1 is everything, 0 no more than their mean. N = "
            f"{memory['basis_functions']} coefficients hold no more than N independent vectors, hence the dashed "
            f"limit. Here the first segment was kept with an R² of {_range(first['total'])}; at the end the newest is "
            f"kept with {_range(newest)}, the oldest, {last['tokens_back'][-1]:,.0f} tokens back, with "
            f"{_range(oldest)}."
        ),
        "losses": (
            "What the same segments cost if a memory is empty when they are read; above 0 it is needed. Without any "
            f"memory the document costs {costs:+.4f} nats per token; the one needed most is that of layer "
            f"{layers[most]}, {by_layer[most]:+.4f}."
        ),
        "contribution": (
            "The size of what each layer reads from its memory, beside what its self-attention returns; the mean over "
            f"a segment's tokens. On average {_range(ratios, '.3f')}. Loud and yet not needed, a memory is noise."
        ),
        "density_centres": (
            "The mean of each head's density along the document, in parts of the memory, of which 1 is the newest end; "
            "shaded, how much it differs between the tokens of a segment (a standard deviation). Layers look at "
            f"{_range(centres)} on average. A head without shade looks at a place, whatever it reads."
        ),
        "density_tokens_back": (
            "The same centres as ages: how many tokens before the segment stood what now lies there. On average "
            f"{_range(back, ',.0f')} tokens."
        ),
        "density_widths": (
            "The standard deviation of each head's density; shaded, how much it differs between tokens. The whole "
            "memory is 1 long, so a density that sees all of it evenly has 0.29, and a wider one reads little else "
            f"than an average. Layers have {_range(widths)} on average."
        ),
    }
    if inspection["writing"]:
        shares = [share for row in inspection["writing"]["sampled_places"] for layer in row for share in layer]
        places = len(inspection["writing"]["sampled_places"][0][0])
        captions["sticky_samples"] = (
            "Where the past is sampled at each write: bright places get more room than others, and stay longer. An "
            f"even picture says that stickiness does nothing. Here places get from {places * min(shares):.2f} to "
            f"{places * max(shares):.2f} times the samples of an even sampling."
        )
    return captions


def _costs(reading: Readings, nats: Sequence[float]) -> float:
    """By how much nats are above those with all memories, per token."""
    rows = zip(nats, reading["nats"], reading["tokens"], strict=True)
    return sum((off - on) * tokens for off, on, tokens in rows) / sum(reading["tokens"])


def _by_layer(figures: list[list[list[float]]]) -> list[float]:
    """Means over segments and heads."""
    return [mean(mean(heads) for heads in segments) for segments in zip(*figures, strict=True)]


def _range(values: Sequence[float | None], form: str = ".2f") -> str:
    """From the lowest to the highest, in words."""
    known = [format(value, form) for value in sorted(value for value in values if value is not None)]
    if not known:
        return "no value"
    return known[0] if known[0] == known[-1] else f"{known[0]} to {known[-1]}"


if __name__ == "__main__":
    command.run(main)
