"""A run, step by step, against a loop written down from the documentation, in plain PyTorch.

Nothing of the project takes part in that loop but the model itself, and how its weights begin: which text a lane reads,
what a step sums up, how it is clipped, who decays, how fast, and what is drawn at random, is said here again.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from infformer.config import RunConfig
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.state import MemoryState
from infformer.models.loading import load_pretrained
from infformer.tasks import language_modelling
from infformer.training import trainer
from infformer.training.checkpoint import CheckpointWriter, TrainingState
from infformer.training.metrics import read_metrics

SEGMENT, LANES, PARTS, BPTT, VISIT, SEED = 16, 4, 2, 2, 3, 5
STEPS, WARMUP, FINAL = 4, 2, 0.1
CLIPPING, DECAY, BETAS, EPSILON = 0.5, 0.1, (0.8, 0.95), 1e-3
RATE, MEMORY_RATE = 3e-3, 2e-2
pytestmark = pytest.mark.processor
MEMORY = {
    "basis_functions": 8,
    "widths": [0.05, 0.1],
    "past_samples": 16,
    "sticky": True,
    "sticky_bins": 16,
    "input_gate": True,
    "divergence_weight": 0.05,
}
CHANGES = {
    "seed": SEED,
    "model.memory": LongTermMemoryConfig(**MEMORY),
    "data.shuffle": False,
    "data.segments_per_visit": VISIT,
    "training.max_steps": STEPS,
    "training.batch_size": LANES,
    "training.segment_length": SEGMENT,
    "training.bptt_segments": BPTT,
    "training.gradient_accumulation": PARTS,
    "training.gradient_clipping": CLIPPING,
    "training.evaluate_every": 1,
    "training.checkpoint_every": 1,
    "training.keep_checkpoints": STEPS,
    "optimizer.learning_rate": RATE,
    "optimizer.memory_learning_rate": MEMORY_RATE,
    "optimizer.weight_decay": DECAY,
    "optimizer.betas": list(BETAS),
    "optimizer.epsilon": EPSILON,
    "schedule.warmup_steps": WARMUP,
    "schedule.final_ratio": FINAL,
    "data.test": None,
}
"""Everything is another value than by default, so that what is not passed on is seen."""


@dataclass
class Row:
    """What one lane reads in one segment."""

    inputs: list[int]
    targets: list[int]
    """The token after each input."""
    reset: bool
    """Here a visit begins, with an empty memory."""
    draws: Tensor
    """Stickiness' random numbers."""


@dataclass
class Made:
    """What one step of the literal loop did."""

    metrics: dict[str, float]
    """As they are recorded."""
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    memory: dict[str, Tensor]


def visits(texts: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """Each document in its turn, cut from its start into stretches of three segments; one token more as last target."""
    while True:
        for line in (texts / "train.jsonl").read_text().splitlines():
            tokens = [tokenizer.bos_token_id, *tokenizer.encode(json.loads(line)["text"], add_special_tokens=False)]
            for start in range(0, len(tokens) - 1, VISIT * SEGMENT):
                yield tokens[start : start + VISIT * SEGMENT + 1]


def read_lanes(texts: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[Row]]:
    """Segment after segment of all lanes. Who has come to the end of its visit takes the next one of the queue."""
    queue, left, segment = visits(texts, tokenizer), [list[int]() for _ in range(LANES)], 0
    while True:
        rows = []
        for lane in range(LANES):
            reset = len(left[lane]) < 2
            if reset:
                left[lane] = next(queue)
            inputs, targets = left[lane][:-1][:SEGMENT], left[lane][1:][:SEGMENT]
            left[lane] = left[lane][len(inputs) :]
            random = np.random.Generator(np.random.Philox(key=[SEED, lane], counter=[0, 0, 0, segment]))
            rows.append(Row(inputs, targets, reset, torch.from_numpy(random.random(16, np.float32))))
        segment += 1
        yield rows


def factor(step: int) -> float:
    """By which the rates are multiplied: up from zero, then down half a cosine to a tenth."""
    if step < WARMUP:
        return step / WARMUP
    part = (step - WARMUP) / (STEPS - WARMUP)
    return FINAL + (1 - FINAL) * (1 + math.cos(math.pi * part)) / 2


def train_literally(folder: Path, texts: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[Made]:
    """The steps of the loop."""
    torch.manual_seed(SEED)
    model = load_pretrained(str(folder), LongTermMemoryConfig(**MEMORY), segment_length=SEGMENT).train()
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        in_memory, decays = name.startswith("memories."), parameter.dim() > 1 and ".gate." not in name
        groups.setdefault((in_memory, decays), []).append(parameter)
    assert len(groups) == 4
    optimizer = torch.optim.AdamW(
        [
            {"params": own, "lr": MEMORY_RATE if in_memory else RATE, "weight_decay": DECAY if decays else 0.0}
            for (in_memory, decays), own in groups.items()
        ],
        betas=BETAS,
        eps=EPSILON,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    lanes, tokens = read_lanes(texts, tokenizer), 0
    memories = [model.initial_state(LANES // PARTS) for _ in range(PARTS)]
    for step in range(STEPS):
        segments = [next(lanes) for _ in range(BPTT)]
        total = sum(len(row.targets) for rows in segments for row in rows)
        loss = divergence = 0.0
        for part in range(PARTS):
            first = part * LANES // PARTS
            seed = np.random.SeedSequence([SEED, step, first]).generate_state(1, np.uint64)[0]
            torch.manual_seed(int(seed))
            memory, objective = memories[part], torch.zeros(())
            for rows in segments:
                own = rows[first : first + LANES // PARTS]
                output = model(
                    torch.tensor([row.inputs + [0] * (SEGMENT - len(row.inputs)) for row in own]),
                    targets=torch.tensor([row.targets + [-100] * (SEGMENT - len(row.targets)) for row in own]),
                    state=memory,
                    reset=torch.tensor([row.reset for row in own]),
                    lengths=torch.tensor([len(row.inputs) for row in own]),
                    noise=torch.stack([row.draws for row in own]),
                    return_logits=True,
                )
                memory = output.state
                nats = torch.zeros(())
                for row, logits in zip(own, output.logits, strict=True):
                    length = len(row.targets)
                    nats = nats + F.cross_entropy(logits[:length], torch.tensor(row.targets), reduction="sum")
                share = sum(len(row.targets) for row in own) / total
                auxiliary = share * output.auxiliary_losses["divergence"]
                objective = objective + nats / total + auxiliary
                loss += nats.item() / total
                divergence += auxiliary.item()
            objective.backward()
            memories[part] = memory.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING).item()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        tokens += total
        state = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
        metrics = {
            "step": step + 1,
            "tokens": tokens,
            "train/loss": loss,
            "train/perplexity": math.exp(loss),
            "train/divergence": divergence,
            "train/gradient_norm": norm,
            "train/learning_rate": RATE * factor(step),
            "train/memory_learning_rate": MEMORY_RATE * factor(step),
        }
        yield Made(
            metrics,
            {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
            {f"{name}.{kind}": value.clone() for name, kept in state.items() for kind, value in kept.items()},
            MemoryState.concatenate(memories).named_tensors(),
        )


@pytest.fixture(scope="module")
def literal(model_folder, texts, tokenizer) -> list[Made]:
    return list(train_literally(model_folder, texts, tokenizer))


@pytest.fixture(scope="module")
def folder(configure, train, model_folder, tmp_path_factory) -> Path:
    """Of the run."""
    folder = tmp_path_factory.mktemp("literal") / "run"
    train(configure(folder, {**CHANGES, "model.pretrained": str(model_folder)}))
    return folder


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to rounding, beside the largest number of each tensor."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error, scale = (found[name] - tensor).abs().max().item(), tensor.abs().max().item()
        assert error <= 2e-6 * scale + 1e-9, (name, error, scale)


class TestEveryStepIsThatOfTheLiteralLoop:
    def test_every_step_measures_what_the_literal_loop_does(self, literal, folder):
        lines = [line for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line]
        assert len(lines) == STEPS
        for line, made in zip(lines, literal, strict=True):
            line.pop("train/tokens_per_second")
            assert line == pytest.approx(made.metrics, rel=1e-6), made.metrics["step"]

    @pytest.mark.parametrize("step", range(1, STEPS + 1))
    def test_every_step_leaves_what_the_literal_loop_does(self, literal, folder, step):
        checkpoint, made = folder / "checkpoints" / f"step-{step:08d}", literal[step - 1]
        assert_close(load_file(checkpoint / "model" / "model.safetensors"), made.weights)
        assert_close(load_file(checkpoint / "optimizer.safetensors"), made.moments)
        own = load_file(checkpoint / "process-00000.safetensors")
        assert own.pop("lanes").tolist() == list(range(LANES))
        assert_close({name.removeprefix("memory."): tensor for name, tensor in own.items()}, made.memory)


class TestWhatItTells:
    """The same run, which reports every third step, writes seven tokens every second, and shows all to a tracker."""

    @pytest.fixture(scope="class")
    @classmethod
    def told(cls, configure, train, model_folder, tmp_path_factory) -> tuple[RunConfig, list[tuple]]:
        calls: list[tuple] = []

        class Tracker:
            def log(self, metrics: dict[str, float], step: int) -> None:
                calls.append(("log", {"step": step, **metrics}))

            def log_text(self, name: str, text: str, step: int) -> None:
                calls.append(("text", {"step": step, name: text}))

            def log_figure(self, name: str, path: Path, step: int) -> None:
                calls.append(("figure", name, path, step))

            def finish(self) -> None:
                calls.append(("finish",))

        def opened(*arguments: object) -> Tracker:
            calls.append(("open", *arguments))
            return Tracker()

        def continued(model: object, prompt: Tensor, tokens: int, length: int, **options: object) -> Tensor:
            calls.append(("continue", tokens, length))
            return prompt[:tokens]

        begin = CheckpointWriter.begin

        def begun(writer: CheckpointWriter, state: TrainingState, rank_rows: range) -> None:
            calls.append(("save", state.progress.step))
            begin(writer, state, rank_rows)

        config = configure(
            tmp_path_factory.mktemp("told") / "run",
            {
                **CHANGES,
                "name": "a name",
                "model.pretrained": str(model_folder),
                "training.log_every": 3,
                "training.evaluate_every": 3,
                "training.checkpoint_every": 1,
                "training.keep_checkpoints": 1,
                "training.sample_every": 2,
                "training.sample_tokens": 7,
            },
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "open_tracker", opened)
            patch.setattr(trainer, "plot_run", lambda folder: [folder / "plots" / "training.png"])
            patch.setattr(language_modelling, "continue_text", continued)
            patch.setattr(CheckpointWriter, "begin", begun)
            train(config, plots=True)
        return config, calls

    def test_means_are_over_the_tokens_since_the_last_line(self, literal, told):
        lines = [line for line in read_metrics(Path(told[0].output_dir) / "metrics.jsonl") if "train/loss" in line]
        assert [line["step"] for line in lines] == [3, 4]
        tokens = np.diff([0, *(int(made.metrics["tokens"]) for made in literal)])
        for line, steps in zip(lines, (slice(0, 3), slice(3, 4)), strict=True):
            for name in ("train/loss", "train/divergence"):
                values = [made.metrics[name] for made in literal[steps]]
                assert line[name] == pytest.approx(np.average(values, weights=tokens[steps]), rel=1e-6)
            last = literal[steps][-1].metrics
            for name in ("tokens", "train/gradient_norm", "train/learning_rate", "train/memory_learning_rate"):
                assert line[name] == pytest.approx(last[name], rel=1e-6)

    def test_what_is_due_is_done_at_its_steps(self, told):
        config, calls = told
        folder = Path(config.output_dir)
        lines = read_metrics(folder / "metrics.jsonl")
        assert [line["step"] for line in lines if "validation/loss" in line] == [3, 4]
        assert [call for call in calls if call[0] == "continue"] == [("continue", 7, SEGMENT)] * 2
        assert [json.loads(line)["step"] for line in (folder / "samples.jsonl").read_text().splitlines()] == [2, 4]
        assert [call[1] for call in calls if call[0] == "save"] == [1, 2, 3, 4]
        kept = {f"step-{STEPS:08d}", (folder / "checkpoints" / "best").resolve().name}
        assert {path.name for path in (folder / "checkpoints").glob("step-*")} == kept

    def test_the_tracker_is_told_what_is_written(self, told):
        config, calls = told
        folder = Path(config.output_dir)

        def written(name: str) -> list[dict]:
            return [json.loads(line) for line in (folder / name).read_text().splitlines()]

        assert calls[0] == ("open", config.tracker, "a name", folder, asdict(config), 0)
        assert [call[1] for call in calls if call[0] == "log"] == written("metrics.jsonl")
        texts = [{"step": sample["step"], "sample": sample["text"]} for sample in written("samples.jsonl")]
        assert [call[1] for call in calls if call[0] == "text"] == texts
        assert calls[-2:] == [("figure", "training", folder / "plots" / "training.png", STEPS), ("finish",)]
