"""What memories held and did along one document, as a page that needs no other file: `index.html`."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from infformer.results import Inspection, Ratio, Stretch

STYLE = """
body { max-width: 66rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 sans-serif; color: #222 }
figure { margin: 3rem 0 } img { max-width: 100% } p, figcaption, blockquote { max-width: 48rem }
.text { font: 17px/1.9 serif; white-space: pre-wrap } blockquote { font: 15px/1.5 serif; white-space: pre-wrap }
"""
GAINED, COST = "0, 114, 178", "213, 94, 0"
"""Red, green and blue of what a memory gained and of what it cost, as in the figures."""
FULL = 2.0
"""Nats that have their full colour."""


def write_page(inspection_json: Path, figures: Sequence[Path]) -> Path:
    """Write a page: what the memories gained of which words, and each figure beside what it shows and how to read it.

    Args:
        figures: those that `plot_inspection` drew of the file.

    Returns:
        The page, beside the file.
    """
    inspection: Inspection = json.loads(Path(inspection_json).read_text(encoding="utf-8"))
    captions = describe_figures(inspection)
    title = "What the memory holds"
    if "checkpoint" in inspection and "name" in inspection:
        title = f"The memory of {inspection['checkpoint']} reading {inspection['name']}"
    parts = [
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>',
        f"<style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>\n<p>{html.escape(_summary(inspection))}</p>",
    ]
    for heading, stretch in zip(("gained most", "gained least"), inspection["stretches"], strict=False):
        parts.append(_show_stretch(f"Where the memory {heading}", stretch))
    for figure in figures:
        image = base64.b64encode(figure.read_bytes()).decode("ascii")
        caption = html.escape(captions[figure.stem])
        parts.append(
            f'<figure>\n<img alt="{figure.stem.replace("_", " ")}" src="data:image/png;base64,{image}">\n'
            f"<figcaption>{caption}</figcaption>\n</figure>"
        )
    page = Path(inspection_json).parent / "index.html"
    page.write_text("\n".join(parts) + "\n</html>\n", encoding="utf-8")
    return page


def describe_figures(inspection: Inspection) -> dict[str, str]:
    """By a figure's name what it shows, how to read it, and the numbers that matter most."""
    memory, reading, costs = inspection["memory"], inspection["reading"], inspection["costs"]
    layers = memory["layers"]
    measured = [
        (cost["nats_per_token"], layer, cost)
        for layer, cost in zip(layers, costs["without_layer"], strict=True)
        if cost["nats_per_token"] is not None
    ]
    by_layer = ""
    if measured:
        _, most, its_cost = max(measured, key=lambda each: each[:2])
        by_layer = (
            " Each segment was also read without one of the layers, in turn: the one needed most is that of layer "
            f"{most}, {_told(its_cost)}."
        )
    captions = {
        "losses": (
            "What the same segments cost if a memory is empty when they are read; above 0 it is needed. Thin lines and "
            "the shade are intervals of 95 % over the segments of this document. Without any memory the document costs "
            f"{_told(costs['without_memory'])} nats per token.{by_layer}"
        )
    }
    if reading["contribution"]:
        ratios = [mean(ratios) for ratios in zip(*reading["contribution"], strict=True)]
        captions["contribution"] = (
            "The size of what each layer reads from its memory, beside what its self-attention returns; the mean over "
            f"a segment's tokens. On average {_range(ratios, '.3f')}. Loud and yet not needed, a memory is noise."
        )
    if inspection["reconstruction"]:
        captions["reconstruction"] = _describe_reconstruction(inspection)
    if reading["centre"]:
        widths, centres, back = (_by_layer(reading[name]) for name in ("width", "centre", "tokens_back"))
        captions |= {
            "density_centres": (
                "The mean of each head's density along the document, in parts of the memory, of which 1 is the newest "
                "end; shaded, how much it differs between the tokens of a segment (a standard deviation). Layers look "
                f"at {_range(centres)} on average. A head without shade looks at a place, whatever it reads."
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


def _summary(inspection: Inspection) -> str:
    document, memory = inspection["document"], inspection["memory"]
    read = (
        f"{document['tokens']:,} tokens in {document['segments']} segments of {memory['segment_length']}, "
        f"{document['nats']:.3f} nats per token. "
    )
    if "basis_functions" not in memory:
        return f"{read}The memory is of the kind {memory['kind']}."
    return (
        f"{read}Each layer's memory has {memory['basis_functions']} basis functions, is "
        f"{'sticky' if memory['sticky'] else 'not sticky'}, reads by {memory['read']}, and its past contracts "
        + (
            "uniformly."
            if memory["contraction"] == "uniform"
            else f"to {memory['contraction_rate']:g} of its length at every write."
        )
    )


def _show_stretch(heading: str, stretch: Stretch) -> str:
    """A stretch of the text, each token in the colour of its gain, and the passages that the memories looked at."""
    tokens = []
    for piece, gain in zip(stretch["pieces"], stretch["gains"], strict=True):
        colour, strength = GAINED if gain > 0 else COST, min(abs(gain) / FULL, 1)
        tokens.append(
            f'<span style="background: rgba({colour}, {0.75 * strength:.2f})" title="{gain:+.2f} nats">'
            f"{html.escape(piece)}</span>"
        )
    end = stretch["first"] + len(tokens)
    parts = [
        f"<h2>{heading}</h2>\n<p>Tokens {stretch['first']:,} to {end:,}: {stretch['gain']:+.3f} nats per token. Blue "
        f"tokens cost more without the memories, orange ones less; {FULL:g} nats have the full colour.</p>",
        f'<p class="text">{"".join(tokens)}</p>',
    ]
    if stretch["sources"]:
        parts.append("<p>While they were read, the heads looked most at these passages:</p>")
    for source in stretch["sources"]:
        parts.append(
            f"<p>{source['tokens_back']:,} tokens before, {source['share']:.1%} of all in the memory that was looked "
            f"at (evenly it would be {source['even_share']:.1%}):</p>\n"
            f"<blockquote>{html.escape(source['text'])}</blockquote>"
        )
    return "\n".join(parts)


def _describe_reconstruction(inspection: Inspection) -> str:
    first, last = inspection["reconstruction"][0], inspection["reconstruction"][-1]
    newest, oldest = ([ages[end] for ages in last["by_age"]] for end in (0, -1))
    return (
        "How much of what was written can still be told from the memory: R² of the hidden states of each past segment "
        "by its age, and of all of them. 1 is everything, 0 no more than their mean. Dashed is the best that "
        f"{inspection['memory'].get('basis_functions')} coefficients could tell of all tokens where these lie now, had "
        "they been seen at once: nothing is above it. Here the first segment was kept with an R² of "
        f"{_range(first['total'])} of {_range(first['best'])}, and all of the past at the end with "
        f"{_range(last['total'])} of {_range(last['best'])}; of that the newest segment with {_range(newest)}, the "
        f"oldest, {last['tokens_back'][-1]:,.0f} tokens back, with {_range(oldest)}."
    )


def _told(cost: Ratio) -> str:
    interval = cost["interval"]
    spread = "" if interval is None else f" (95 %: {interval[0]:+.4f} to {interval[1]:+.4f})"
    return f"{cost['nats_per_token']:+.4f}{spread}"


def _by_layer(figures: list[list[list[float]]]) -> list[float]:
    """Means over segments and heads."""
    return [mean(mean(heads) for heads in segments) for segments in zip(*figures, strict=True)]


def _range(values: Sequence[float | None], form: str = ".2f") -> str:
    """From the lowest to the highest, in words."""
    known = [format(value, form) for value in sorted(value for value in values if value is not None)]
    if not known:
        return "no value"
    return known[0] if known[0] == known[-1] else f"{known[0]} to {known[-1]}"
