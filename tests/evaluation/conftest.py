import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import nn

from infformer.data.options import DataConfig
from infformer.data.tokenization import TokenizedDocuments, tokenize_documents
from infformer.evaluation.streaming import Evaluator, Processes, ReadingProtocol
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models.pretrained import InfformerForCausalLM

SEGMENT = 16
TEXTS = {
    "ship": "the ship went over the deep sea " * 4 + "away",
    "short": "a whale",
    "naïve": "Über dem Wasser, naïve – “night” … " * 2,
    "exact": "x" * 3 * SEGMENT,
    "wind": "wind in the harpoon\n\nof a   captain " * 2,
}
"""Among them a document of less than a segment, and one that ends where a segment does."""


@pytest.fixture(scope="session")
def originals() -> dict[str, str]:
    """The texts, by name."""
    return TEXTS


@pytest.fixture(scope="session")
def documents_of(tokenizer, tmp_path_factory) -> Callable[..., TokenizedDocuments]:
    """Some of the texts as documents, in a given order."""

    def tokenize(*names: str) -> TokenizedDocuments:
        folder = tmp_path_factory.mktemp("texts")
        lines = [json.dumps({"id": name, "text": TEXTS[name]}) + "\n" for name in names]
        (folder / "test.jsonl").write_text("".join(lines))
        config = DataConfig(source="files", test=str(folder / "test.jsonl"), cache_dir=str(folder))
        return tokenize_documents(config, "test", tokenizer)

    return tokenize


@pytest.fixture(scope="session")
def documents(documents_of) -> TokenizedDocuments:
    return documents_of(*TEXTS)


@pytest.fixture(scope="session")
def with_memory(backbone) -> Callable[..., InfformerForCausalLM]:
    """A model whose memory does something."""

    def build(**options) -> InfformerForCausalLM:
        sizes = {"basis_functions": 8, "widths": [0.05, 0.1], "past_samples": 16}
        config = LongTermMemoryConfig(**{**sizes, **options})
        model = InfformerForCausalLM.from_backbone(copy.deepcopy(backbone), config, segment_length=SEGMENT)
        torch.manual_seed(2)
        for parameter in model.memories.parameters():
            nn.init.normal_(parameter)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def model(with_memory) -> InfformerForCausalLM:
    return with_memory(sticky=True, sticky_bins=16)


@pytest.fixture(scope="session")
def without_memory(backbone) -> InfformerForCausalLM:
    return InfformerForCausalLM.from_backbone(copy.deepcopy(backbone)).eval()


@pytest.fixture(scope="session")
def evaluator() -> Callable[..., Evaluator]:
    def make(model: InfformerForCausalLM, batch_size: int = 3, **options) -> Evaluator:
        how = {name: options.pop(name) for name in ("stride", "precision", "warmup_documents") if name in options}
        protocol = ReadingProtocol(SEGMENT, **how)
        return Evaluator(model=model, protocol=protocol, batch_size=batch_size, processes=Processes(**options))

    return make
