"""A memory beside a pretrained model, trained on a text in plain PyTorch: own_loop.py MODEL TEXT FOLDER."""

import sys
from pathlib import Path

import torch

from infformer import InfformerForCausalLM, LongTermMemoryConfig, load_tokenizer

name, text, folder = sys.argv[1:]
memory = LongTermMemoryConfig(basis_functions=64, past_samples=64, sticky=True)
model = InfformerForCausalLM.from_backbone(name, memory, segment_length=64).train()
rates = {"lr": 1e-3, "params": model.memory_parameters()}, {"lr": 5e-5, "params": model.backbone.parameters()}
optimizer = torch.optim.AdamW(rates)
tokenizer = load_tokenizer(name)
tokens = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
lanes = tokens[: len(tokens) // 4 * 4].view(4, -1)  # four stretches of the text, read side by side
state = None  # what the model remembers of each lane: a value
for inputs, targets in zip(lanes[:, :-1].split(64, dim=1), lanes[:, 1:].split(64, dim=1), strict=True):
    output = model(inputs, targets=targets, state=state)
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    state = output.state.detach()  # without the graph that this backward pass has freed
    print(f"loss {output.loss.item():.3f}")
model.save_pretrained(folder)  # with a card; `infformer-generate checkpoint=FOLDER` writes with it
tokenizer.save_pretrained(folder)
