"""A memory trained by Hugging Face's Trainer, each text a document: hugging_face_trainer.py MODEL FOLDER TEXT TEXT …"""

import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from infformer import InfformerForCausalLM, LongTermMemoryConfig, load_tokenizer


class MemoryTrainer(Trainer):
    """Hands on what the model remembers: row n of a batch goes on where row n of the batch before it has ended.

    A run that is resumed goes on with empty memories.
    """

    memory = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs, state=self.memory)
        self.memory = output.state.detach()  # without the graph that the backward pass will free
        return (output.loss, output) if return_outputs else output.loss

    def evaluation_loop(self, *arguments, **options):
        carried, self.memory = self.memory, None  # other documents, then on with those of training
        try:
            return super().evaluation_loop(*arguments, **options)
        finally:
            self.memory = carried


def segments_of(documents, rows, length):
    """The segments of documents, one after the other of each row, in the order in which a Trainer takes them."""
    lanes = [[] for _ in range(rows)]
    for tokens in documents:
        lane = min(lanes, key=len)  # the one that has least to read
        for start in range(0, len(tokens) - length, length):
            inputs, targets = tokens[start : start + length], tokens[start + 1 : start + length + 1]
            lane.append({"input_ids": inputs, "targets": targets, "reset": start == 0})  # a new document: empty again
    return [segment for step in zip(*lanes, strict=False) for segment in step]


name, folder, *texts = sys.argv[1:]
arguments = TrainingArguments(
    folder,
    num_train_epochs=1,
    per_device_train_batch_size=2,
    train_sampling_strategy="sequential",  # shuffled, a row would go on with another document
    label_names=["targets"],
    lr_scheduler_type="constant",
    logging_steps=1,
    report_to=[],
)
memory = LongTermMemoryConfig(basis_functions=64, past_samples=64, sticky=True)
model = InfformerForCausalLM.from_backbone(name, memory, segment_length=64)
rates = {"lr": 1e-3, "params": model.memory_parameters()}, {"lr": 5e-5, "params": model.backbone.parameters()}
tokenizer = load_tokenizer(name)
documents = [tokenizer(Path(text).read_text(encoding="utf-8")).input_ids for text in texts]
segments = segments_of(documents, arguments.train_batch_size * arguments.world_size, 64)
trainer = MemoryTrainer(model, arguments, train_dataset=segments, optimizers=(torch.optim.AdamW(rates), None))
trainer.train()
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
