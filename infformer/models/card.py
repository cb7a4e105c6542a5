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
from transformers import AutoModelForCausalLM, AutoTokenizer

place = "."  # this folder, or the model's name on the hub
model = AutoModelForCausalLM.from_pretrained(place)
{tokens}
state = None  # what the model remembers: a value, that goes in and comes out
with torch.no_grad():
    for segment in tokens.split({segment}, dim=1):
        output = model(segment, state=state)
        state = output.state
```

`infformer-generate checkpoint=. document=book.txt prompt='And so'` reads a text of any length and goes on from it.
"""

_USE_OF_A_CLASSIFIER = """## Use

```python
import infformer  # which makes transformers know the model
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".")  # this folder, or the model's name on the hub
texts = torch.randint(1, {vocabulary}, (2, {length}))  # token {padding} is padding, behind a text
with torch.no_grad():
    classes = model(texts).logits.squeeze(1).argmax(dim=-1)
```
"""


_USE_OF_A_DOCUMENT_CLASSIFIER = """## Use

```python
import infformer  # which makes transformers know the model
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

place = "."  # this folder, or the model's name on the hub
model = AutoModelForCausalLM.from_pretrained(place)
{tokens}
state = None  # what the model remembers of the document, and what it has pooled
with torch.no_grad():
    for segment in tokens.split({segment}, dim=1):
        output = model(segment, state=state)
        state = output.state
print(model.config.labels[output.logits.argmax()])
```
"""


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
    config = model.config
    if config.model_type == "classifier":
        told = ModelCardData(library_name="infformer", pipeline_tag="text-classification", tags=["infformer"], **data)
        use = _USE_OF_A_CLASSIFIER.format(
            vocabulary=config.vocab_size, length=model.positions, padding=config.pad_token_id
        )
        kind = f"A classifier of {config.classes} classes, by infformer. Its attention: {config.attention}."
        return _card(told, name or "A classifier", kind, use, sections)
    tokens = _TOKENS if reads_text else f"tokens = torch.zeros(1, 8, dtype=torch.long)  # of {model.vocabulary_size}"
    if config.model_type == "document_classifier":
        told = ModelCardData(
            library_name="infformer", pipeline_tag="text-classification", tags=["infformer", "long-context"], **data
        )
        use = _USE_OF_A_DOCUMENT_CLASSIFIER.format(tokens=tokens, segment=config.reader.segment_length)
        use = use if reads_text else use.replace(", AutoTokenizer", "")
        kind = f"A classifier of documents of any length ({', '.join(config.labels)}), on top of a language model, by "
        sections = {**_memory(config.reader), **(sections or {})}
        return _card(told, name or "A classifier", f"{kind}infformer.", use, sections)
    stock = getattr(config, "backbone", None)
    kind = "A decoder" if stock is None else f"A `{stock.model_type}`"
    what = "with a memory of fixed size beside each attention" if config.memory else "without a memory"
    origin = None if stock is None else stock.name_or_path
    if origin and is_hub_name(origin):
        data["base_model"] = origin
    told = ModelCardData(
        library_name="infformer", pipeline_tag="text-generation", tags=["infformer", "long-context"], **data
    )
    use = _USE.format(tokens=tokens, segment=config.segment_length)
    if not reads_text:
        use = use[: use.index("\n`infformer-generate")].replace(", AutoTokenizer", "")
    kind = f"{kind} {what}, by infformer. It reads a text segment by segment, in constant memory."
    return _card(told, name or "A language model", kind, use, {**_memory(config), **(sections or {})})


def _card(told: ModelCardData, name: str, kind: str, use: str, sections: Mapping[str, Sequence[str]] | None) -> str:
    parts = [f"---\n{told.to_yaml()}\n---", f"# {name}", kind, use.strip()]
    for heading, paragraphs in (sections or {}).items():
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
