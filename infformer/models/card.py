"""A model card: the README.md of a model's folder, which says what it is and how it is read with.

What only a run knows, its data and its figures, is added by `training/card.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

if TYPE_CHECKING:
    from infformer.models.base import MemoryModel

CARD = "README.md"
_TOKENS = """tokenizer = AutoTokenizer.from_pretrained(place)
tokens = tokenizer("Call me Ishmael.", return_tensors="pt").input_ids"""
_USE = """## Use

```python
import infformer  # which makes transformers know the model
import torch
from transformers import AutoModelForCausalLM{tokenizer}

place = "."  # this folder, or the model's name on the hub
model = AutoModelForCausalLM.from_pretrained(place)
{tokens}
state = None  # what the model remembers{remembers}
with torch.no_grad():
    for segment in tokens.split({segment}, dim=1):
        output = model(segment, state=state)
        state = output.state
{said}```"""
_USE_OF_A_CLASSIFIER = """## Use

```python
import infformer  # which makes transformers know the model
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".")  # this folder, or the model's name on the hub
texts = torch.randint(1, {vocabulary}, (2, {length}))  # token {padding} is padding, behind a text
with torch.no_grad():
    classes = model(texts).logits.squeeze(1).argmax(dim=-1)
```"""
_COMMAND = (
    "`infformer-generate checkpoint=. document=book.txt prompt='And so'` reads a text of any length and goes on from "
    "it."
)


def model_card(
    model: MemoryModel,
    name: str | None = None,
    sections: Mapping[str, Sequence[str]] | None = None,
    reads_text: bool = True,
    **data: Any,
) -> str:
    """A card of what is known of a model without having seen it trained, and of what else is given.

    Args:
        name: its title.
        sections: more of them, by their headings: paragraphs.
        reads_text: it has a tokenizer.
        data: for `ModelCardData`, what the hub is told beside the text.
    """
    config, sections = model.config, sections or {}
    tags = ["infformer"] if config.model_type == "classifier" else ["infformer", "long-context"]
    task = "text-classification" if config.model_type in ("classifier", "document_classifier") else "text-generation"
    if config.model_type == "classifier":
        use = _USE_OF_A_CLASSIFIER.format(
            vocabulary=config.vocab_size, length=model.positions, padding=config.pad_token_id
        )
        title = "A classifier"
        kind = f"A classifier of {config.classes} classes, by infformer. Its attention: {config.attention}."
    else:
        tokens = (
            _TOKENS if reads_text else f"tokens = torch.zeros(1, 8, dtype=torch.long)  # of {model.vocabulary_size}"
        )
        shared = {"tokens": tokens, "tokenizer": ", AutoTokenizer" if reads_text else ""}
        if config.model_type == "document_classifier":
            use = _USE.format(
                **shared,
                segment=config.reader.segment_length,
                remembers=" of the document, and what it has pooled",
                said="print(model.config.labels[output.logits.argmax()])\n",
            )
            title = "A classifier"
            labels = ", ".join(config.labels)
            kind = f"A classifier of documents of any length ({labels}), on top of a language model, by infformer."
            sections = {**_memory(config.reader), **sections}
        else:
            use = _USE.format(
                **shared, segment=config.segment_length, remembers=": a value, that goes in and comes out", said=""
            )
            use = f"{use}\n\n{_COMMAND}" if reads_text else use
            stock = getattr(config, "backbone", None)
            what = "A decoder" if stock is None else f"A `{stock.model_type}`"
            with_memory = "with a memory of fixed size beside each attention" if config.memory else "without a memory"
            title = "A language model"
            kind = f"{what} {with_memory}, by infformer. It reads a text segment by segment, in constant memory."
            sections = {**_memory(config), **sections}
            if stock is not None and stock.name_or_path and is_hub_name(stock.name_or_path):
                data["base_model"] = stock.name_or_path
    told = ModelCardData(library_name="infformer", pipeline_tag=task, tags=tags, **data)
    parts = [f"---\n{told.to_yaml()}\n---", f"# {name or title}", kind, use]
    for heading, paragraphs in sections.items():
        parts += [f"## {heading}", *paragraphs]
    return "\n\n".join(parts) + "\n"


def is_hub_name(name: str) -> bool:
    """Whether this is how something is named on the hub, and no folder here."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is not None and not Path(name).exists()


def _memory(config: Any) -> dict[str, list[str]]:
    if config.memory is None:
        return {}
    layers = getattr(config, "memory_layers", None)
    rows = {"segment_length": config.segment_length, **config.memory}
    if layers is not None:
        rows["layers"] = ", ".join(map(str, layers))
    table = "\n".join(f"| `{option}` | {value} |" for option, value in rows.items() if value is not None)
    return {"Memory": [f"| | |\n|---|---|\n{table}"]}
