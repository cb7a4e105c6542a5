import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from infformer.evaluation.streaming import Evaluator, ReadingProtocol
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models.base import MemoryModel
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.pretrained import InfformerForCausalLM

SEGMENT = 8
LONG_TERM = LongTermMemoryConfig(basis_functions=8, widths=[0.05, 0.1], past_samples=16)


def build(kind: str, stock: nn.Module) -> MemoryModel:
    if kind == "decoder":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "feed_forward_size": 32}
        memory = replace(LONG_TERM, short_term_length=SEGMENT)
        return DecoderForCausalLM(
            DecoderConfig(
                vocab_size=257, **sizes, bos_token_id=0, eos_token_id=0, memory=memory, segment_length=SEGMENT
            )
        )
    return InfformerForCausalLM.from_backbone(
        copy.deepcopy(stock), LONG_TERM if kind == "memory" else None, segment_length=SEGMENT
    )


@pytest.fixture(scope="session")
def models(backbone) -> dict[str, MemoryModel]:
    """Models whose every choice depends on all that they see: weights this large are sure of themselves."""
    found = {}
    for kind in ("memory", "decoder", "none"):
        torch.manual_seed(3)
        found[kind] = build(kind, backbone).eval()
        for parameter in found[kind].parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.6)
        for parameter in found[kind].memory_parameters():
            nn.init.normal_(parameter)
    return found


@pytest.fixture
def evaluator(models) -> Callable[..., Evaluator]:
    def make(kind: str = "memory", batch_size: int = 3) -> Evaluator:
        return Evaluator(model=models[kind], protocol=ReadingProtocol(SEGMENT), batch_size=batch_size)

    return make


@pytest.fixture(scope="session")
def checkpoints(models, tokenizer, tmp_path_factory) -> dict[str, Path]:
    """The folders of the models, with their tokenizer."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in models}
    for kind, folder in folders.items():
        models[kind].save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders
