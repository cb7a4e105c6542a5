"""What `examples/` shows runs as it stands."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_loop_of_ones_own_trains_a_memory_and_saves_what_can_be_opened(tokenizer, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "stock")
    tokenizer.save_pretrained(tmp_path / "stock")
    (tmp_path / "book.txt").write_text("The white whale rose, and nobody had seen it before. " * 60)
    monkeypatch.setattr(sys, "argv", ["own_loop.py", *(str(tmp_path / name) for name in ("stock", "book.txt", "out"))])
    runpy.run_path(str(EXAMPLES / "own_loop.py"))
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 13  # of 4 × 795 tokens, in segments of 64
    assert losses[-1] < losses[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    new, *others = (memory.state_dict() for memory in model.memories)
    assert not others
    assert any(tensor.any() for name, tensor in new.items() if "output" in name)  # which begins at zero
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tokenizer)
