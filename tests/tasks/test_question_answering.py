"""The task as the training sees it: a stream to learn from, and an examination."""

import json
from pathlib import Path
from typing import Any

import torch

from infformer.data import IGNORE_INDEX
from infformer.tasks.question_answering import QuestionAnswering
from infformer.tasks.question_stream import QuestionStream
from infformer.tasks.sorting_sequences import SortingConfig, SortingQuestions
from infformer.tasks.task import Validation

SEGMENT = 8


class Exam:
    """Says what it was asked."""

    def validate(self) -> Validation:
        return Validation(1.5, {}, "so so")

    def measure(self, checkpoint: str) -> dict[str, Any]:
        return {"of": checkpoint}

    def report(self, results: dict[str, Any], folder: Path) -> list[Path]:
        return [folder / f"{name}.png" for name in results]

    def sample(self, step: int, tokens: int) -> str:
        return f"{tokens} tokens at step {step}"


def make(seed: int = 3) -> QuestionAnswering:
    source = SortingQuestions(SortingConfig(length=18, symbols=5))
    return QuestionAnswering(QuestionStream(source, 4, SEGMENT, seed), Exam())


def test_training_goes_on_where_it_was() -> None:
    task = make()
    task.next_step()
    state = json.loads(json.dumps(task.state_dict()))
    expected = task.next_step()
    resumed = make()
    resumed.load_state_dict(state)
    for segment, other in zip(resumed.next_step(), expected, strict=True):
        assert torch.equal(segment.input_ids, other.input_ids)
        assert torch.equal(segment.targets, other.targets)
    scored = [segment.global_tokens for segment in expected]
    assert scored == [0, 0, 4 * 5]
    assert [int((segment.targets != IGNORE_INDEX).sum()) for segment in expected] == scored


def test_every_seed_learns_from_others() -> None:
    one, other = make(seed=3), make(seed=4)
    assert not torch.equal(one.next_step()[0].input_ids, other.next_step()[0].input_ids)


def test_places_and_material_in_words() -> None:
    task = make()
    task.next_step()
    _, second, _ = task.next_step()
    assert task.locate(second) == [f"lane {lane}: sequence {4 + lane} at token 8" for lane in range(4)]
    assert task.describe() == "ever new sequences of length 18 to learn from"
    assert task.tokenizer is None


def test_it_is_measured_by_its_examination(tmp_path: Path) -> None:
    task = make()
    assert task.validate() == Validation(1.5, {}, "so so")
    assert task.measure_before() == {}
    assert task.measure("here") == {"of": "here"}
    assert task.report({"cells": []}, tmp_path) == [tmp_path / "cells.png"]
    assert task.sample(7, 5) == "5 tokens at step 7"
    assert task.inspect() == {}
