"""What `examples/` shows runs as it stands."""

from __future__ import annotations

import logging
import re
import runpy
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from infformer.models.pretrained import InfformerForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"


def typed(monkeypatch: pytest.MonkeyPatch, example: str, *arguments: Path) -> dict[str, Any]:
    """The names of an example after it has run."""
    monkeypatch.setattr(sys, "argv", [example, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / example))


@pytest.fixture(scope="module")
def stock(tokenizer, tmp_path_factory) -> Path:
    """A model of one layer without dropout, and its tokenizer."""
    folder = tmp_path_factory.mktemp("stock")
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **dropout)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_loop_of_ones_own_trains_a_memory_and_saves_what_can_be_opened(
    stock, tokenizer, tmp_path, monkeypatch, capsys
):
    (tmp_path / "book.txt").write_text("The white whale rose, and nobody had seen it before. " * 60)
    typed(monkeypatch, "own_loop.py", stock, tmp_path / "book.txt", tmp_path / "out")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 13  # of 4 × 795 tokens, in segments of 64
    assert losses[-1] < losses[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    new, *others = (memory.state_dict() for memory in model.memories)
    assert not others
    assert any(tensor.any() for name, tensor in new.items() if "output" in name)  # which begins at zero
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tokenizer)


class TestTransformersTrainer:
    """By an example that hands the state on, and without it."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def on_the_processor(cls) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "true")
            yield

    @pytest.fixture(scope="class")
    @classmethod
    def names(cls, stock, tmp_path_factory, on_the_processor) -> dict[str, Any]:
        """Of the example after it has trained on four documents in two lanes; no test trains it on."""
        tmp_path = tmp_path_factory.mktemp("trained")
        books = [tmp_path / f"{number}.txt" for number in range(4)]
        for book, whale in zip(books, ("white", "black", "grey", "blue"), strict=True):
            book.write_text(f"The {whale} whale rose, and nobody had seen it before. " * 15)
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            return typed(patch, "hugging_face_trainer.py", stock, tmp_path / "out", *books)

    @staticmethod
    def wrapped(stock: Path, names: dict[str, Any]) -> InfformerForCausalLM:
        """The model as it was when the example began."""
        torch.manual_seed(0)
        return InfformerForCausalLM.from_backbone(str(stock), names["memory"], segment_length=64).train()

    @staticmethod
    def batches(names: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
        segments = names["segments"]
        pairs = zip(segments[::2], segments[1::2], strict=True)
        return [{key: torch.tensor([one[key], other[key]]) for key in one} for one, other in pairs]

    def losses_of_a_loop(self, model: InfformerForCausalLM, names: dict[str, Any], carried: bool) -> list[float]:
        """What a literal loop makes of the same batches."""
        rates = {"lr": 1e-3, "params": model.memory_parameters()}, {"lr": 5e-5, "params": model.backbone.parameters()}
        optimizer, state, losses = torch.optim.AdamW(rates), None, []
        for batch in self.batches(names):
            output = model(**batch, state=state)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            state = output.state.detach() if carried else None
            losses.append(output.loss.item())
        return losses

    def test_a_row_reads_on_in_its_document_and_is_empty_at_the_next(self, names):
        batches = self.batches(names)
        begins = [batch["reset"].tolist() for batch in batches]
        assert begins[0] == [True, True]
        assert sum(map(sum, begins)) == 4
        assert len(batches) > 8
        for before, after in pairwise(batches):
            goes_on = before["targets"][:, -1] == after["input_ids"][:, 0]
            assert torch.equal(goes_on, ~after["reset"])

    def test_the_trainer_trains_as_a_loop_that_carries_the_state_and_not_as_one_that_does_not(self, stock, names):
        logged = [line["loss"] for line in names["trainer"].state.log_history if "loss" in line]
        one, other = self.wrapped(stock, names), self.wrapped(stock, names)
        losses = self.losses_of_a_loop(one, names, carried=True)
        assert logged == pytest.approx(losses, abs=1e-4)  # as many digits as are logged
        assert losses[-1] < losses[0]
        trained = names["model"].state_dict()
        assert all(torch.equal(tensor, trained[name]) for name, tensor in one.state_dict().items())
        assert losses != self.losses_of_a_loop(other, names, carried=False)
        only_decayed = dict(other.memories.named_parameters())
        learned = [not torch.equal(tensor, only_decayed[name]) for name, tensor in one.memories.named_parameters()]
        assert len(learned) == 5
        assert all(learned)

    def test_a_measurement_begins_empty_carries_its_own_state_and_leaves_that_of_training(self, names):
        trainer, model = names["trainer"], names["model"].eval()
        trained = trainer.memory
        trainer.args.per_device_eval_batch_size = 2
        measured = trainer.evaluate(names["segments"])["eval_loss"]
        assert trainer.memory is trained
        state, losses = None, []
        with torch.no_grad():
            for batch in self.batches(names):
                output = model(**batch, state=state)
                state = output.state
                losses.append(output.loss.item())
        assert measured == pytest.approx(sum(losses) / len(losses), abs=1e-5)

    def test_a_trainer_that_hands_no_state_on_is_warned_that_the_memory_learns_nothing(
        self, stock, names, tmp_path, caplog
    ):
        model = self.wrapped(stock, names)
        before = {name: tensor.clone() for name, tensor in model.memories.named_parameters()}
        options = {"per_device_train_batch_size": 2, "max_steps": 8, "report_to": []}
        with caplog.at_level(logging.WARNING, "infformer"):
            Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=names["segments"]).train()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.memories.named_parameters())
        (said,) = (record.getMessage() for record in caplog.records if record.name.startswith("infformer"))
        assert said.startswith("8 segments in a row were trained on without state=, and an empty memory learns nothing")
