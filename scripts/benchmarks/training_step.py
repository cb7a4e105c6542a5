"""A whole training step: with memory, without, and with a longer window of attention; and what its parts take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks import arithmetic
from benchmarks.arithmetic import NO_WORK, Sizes, Work
from benchmarks.machine import Setting
from benchmarks.measuring import peak_extra_bytes, profile_table, summarize, take_turns
from benchmarks.models import (
    BACKBONES,
    WindowReader,
    add_sizes,
    check_windows,
    compile_layers,
    model_sizes,
    new_model,
    new_window_model,
    random_tokens,
    without_graph,
)
from benchmarks.report import Comparison, Ratio, Result, paired
from infformer.memory.long_term import LongTermMemory, LongTermState
from infformer.models.chunked_loss import chunked_token_losses, cross_entropy
from infformer.models.pretrained import InfformerForCausalLM


class TrainingStep:
    """Forward, backward, clipping and AdamW, on a stream of random tokens; what is remembered goes on.

    Args:
        model: reads a segment, `model(tokens, targets=…, state=…, noise=…, return_logits=False)`.
        graphs: replay the passes, as `training.compile=graphs` does; on CUDA alone.
    """

    def __init__(self, model: Any, sizes: Sizes, setting: Setting, graphs: bool = False) -> None:
        self.model = model.to(setting.device).train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=setting.device.type == "cuda")
        self._sizes = sizes
        self._setting = setting
        self._memory: Any = None
        self._recorder = self._new_recorder() if graphs and setting.device.type == "cuda" else None

    def __call__(self) -> None:
        device = self._setting.device
        tokens = random_tokens(self._sizes, device)
        samples = self.model.noise_size
        offsets = torch.rand(self._sizes.batch, samples, device=device) if samples else None
        if self._recorder is not None:
            self._memory = self._recorder(tokens, self._memory, offsets)
            self.update()
            return
        with self._setting.autocast():
            output = self.model(
                tokens[:, :-1],
                targets=tokens[:, 1:],
                state=self._memory,
                noise=offsets,
                return_logits=False,
            )
        output.loss.backward()
        self.update()
        self._memory = without_graph(output.state)

    def _new_recorder(self) -> Callable[..., Any]:
        """Makes passes, from tokens, what is remembered and offsets to what is remembered then."""
        from infformer.data.segments import Segment
        from infformer.training.recording import Recorder
        from infformer.training.step import Microbatch, make_pass

        def forward(*arguments: Any, **options: Any) -> Any:
            with self._setting.autocast():
                return self.model(*arguments, **options)

        one: Any = SimpleNamespace(
            device=self._setting.device, num_processes=1, gradient_accumulation_steps=1, backward=Tensor.backward
        )
        recorder = Recorder(self.model, make_pass(one, cast(Any, forward)))
        rows, length = self._sizes.batch, self._sizes.segment
        numbers = torch.arange(rows, device=self._setting.device)
        lengths = torch.full_like(numbers, length)

        def make(tokens: Tensor, memory: Any, offsets: Tensor | None) -> Any:
            memory = self.model.initial_state(rows) if memory is None else memory
            segment = Segment(
                tokens[:, :-1], tokens[:, 1:], lengths, numbers < 0, numbers, numbers, numbers, numbers, rows * length
            )
            return recorder(Microbatch([segment], memory, [offsets], [None], 0), rows * length, True).memory

        return make

    def update(self) -> None:
        """Clip, step, and forget the gradients."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def add_model_options(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """The sizes of a model; `model_sizes` reads them."""
    add_sizes(parser, **defaults, batch=1)
    parser.add_argument("--key-value-heads", type=int, help="of the rotary backbone; as many as heads without")


GPT2_SMALL = {
    "layers": 12, "hidden": 768, "heads": 12, "vocabulary": 50257, "segment": 512, "functions": 512, "samples": 512,
}  # fmt: skip


def add_command(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """`step`."""
    text = "a training step with memory, against the same without"
    parser = commands.add_parser("step", help=text, parents=parents)
    parser.add_argument("--backbone", choices=BACKBONES, default="gpt2")
    add_model_options(parser, **GPT2_SMALL)
    parser.add_argument(
        "--windows", type=int, nargs="*", default=[], help="also with attention to so many segments (rotary backbone)"
    )
    parser.add_argument("--graphs", action="store_true", help="also replay CUDA graphs, where there is a GPU")
    parser.add_argument("--parts", action="store_true", help="also what the parts of the step with memory take")
    parser.add_argument("--rounds", type=int, default=10)
    parser.set_defaults(compare=compare)


def compare(options: argparse.Namespace, setting: Setting) -> Comparison:
    """Whole steps, and the parts of the one with memory where asked for, in turns.

    Raises:
        SystemExit: windows for a backbone that has no positions for them.
    """
    check_windows(options)
    torch.manual_seed(0)
    sizes = model_sizes(options, options.backbone)
    steps = {
        name: TrainingStep(new_model(sizes, options.backbone, memory=memory), sizes, setting, options.graphs)
        for name, memory in (("with memory", True), ("without", False))
    }
    for window in options.windows:
        evaluator = WindowReader(new_window_model(sizes, window * sizes.segment))
        steps[f"window of {window} segments"] = TrainingStep(evaluator, sizes, setting)
    ours = steps["with memory"]
    parts = new_parts(ours, sizes, setting, options.compile) if options.parts else {}
    if options.compile:
        for step in steps.values():
            compile_layers(step.model)
    # The windows have to be full, and what is recorded is so after some steps.
    warmup = max(options.warmup, *(window + 1 for window in options.windows), 5 if options.graphs else 2)
    first = {name: take_turns({name: step}, 1, 0, setting.clock)[name][0] for name, step in steps.items()}
    seconds = take_turns({**steps, **parts}, options.rounds, warmup, setting.clock)

    work = work_of_steps(sizes, options.windows, ours.model)
    part_work = work_of_parts(sizes, ours.model)
    tokens = {name: sizes.tokens / summarize(seconds[name]).median for name in steps}
    peaks = {name: peak_extra_bytes(step, setting.device) for name, step in steps.items()}
    results = [
        Result(
            name,
            seconds[name],
            work[name],
            figures={
                "tokens_per_second": tokens[name],
                "first_call_seconds": first[name],
                "peak_extra_bytes": peaks[name],
            },
        )
        for name in steps
    ]
    results[1:1] = [Result(name, seconds[name], part_work[name], part=True) for name in parts]
    ratios = [
        paired(f"with memory / {name}", seconds["with memory"], seconds[name])
        for name in steps
        if name != "with memory"
    ]
    if parts:
        together = [sum(values) for values in zip(*(seconds[name] for name in parts), strict=True)]
        ratios.append(paired("the parts together / with memory", together, seconds["with memory"]))
    ratios.append(
        Ratio("with memory / without, by the operations", [work["with memory"].flops / work["without"].flops])
    )
    profiles = {}
    if options.profile:
        profiles = {name: profile_table(steps[name], setting.device) for name in ("with memory", "without")}
    chosen = {
        name: getattr(options, name) for name in ("backbone", "batch", *GPT2_SMALL, "windows", "compile", "graphs")
    }
    return Comparison("step", chosen, results, ratios, profiles)


def work_of_steps(sizes: Sizes, windows: list[int], model: InfformerForCausalLM) -> dict[str, Work]:
    """Of each contestant, forward and backward and update."""
    parts = work_of_parts(sizes, model)
    memory = sum(parameter.numel() for parameter in model.memory_parameters())
    parameters = sum(parameter.numel() for parameter in model.parameters()) - memory
    common = arithmetic.head(sizes, backward=True) + arithmetic.optimizer(parameters)
    work = {
        "with memory": sum(parts.values(), NO_WORK),
        "without": common + arithmetic.backbone(sizes, backward=True),
    }
    for window in windows:
        attention = arithmetic.backbone(sizes, backward=True, window=window * sizes.segment)
        work[f"window of {window} segments"] = common + attention
    return work


def work_of_parts(sizes: Sizes, model: InfformerForCausalLM) -> dict[str, Work]:
    """Of the parts of a step with memory. What is written is read by the next step, through which no gradient flows."""
    return {
        "backbone": arithmetic.backbone(sizes, backward=True),
        "head and loss": arithmetic.head(sizes, backward=True),
        "memory, read": arithmetic.read(sizes, backward=True) * sizes.layers,
        "memory, write": arithmetic.write(sizes, backward=False) * sizes.layers,
        "clipping and AdamW": arithmetic.optimizer(sum(parameter.numel() for parameter in model.parameters())),
    }


def new_parts(step: TrainingStep, sizes: Sizes, setting: Setting, compiled: bool) -> dict[str, Callable[[], None]]:
    """The parts of a step with memory, one by one; in their order they leave the gradients that the last one takes."""
    transform: Callable[[Any], Any] = torch.compile if compiled else lambda function: function
    model, device = step.model, setting.device
    head, signal = model.backbone.get_output_embeddings(), model.memories[0].signal
    shape = (sizes.batch, sizes.segment, sizes.hidden)
    upstream = torch.randn(shape, device=device) / sizes.tokens
    tokens = random_tokens(sizes, device)
    with torch.no_grad():
        state: Any = None
        for _ in range(2):
            state = model(tokens[:, :-1], state=state, return_logits=False).state
    states = state.layers
    last, *hidden = (torch.randn(shape, device=device, requires_grad=True) for _ in range(1 + len(states)))
    with torch.no_grad():
        readings = map(LongTermMemory.read, model.memories, hidden, states)
        attentions = [reading.attention for reading in readings]
    offsets = torch.rand(sizes.batch, model.noise_size, device=device)

    @transform
    def hidden_states() -> Tensor:
        return model.backbone.base_model(tokens[:, :-1]).last_hidden_state

    @transform
    def loss() -> Tensor:
        return chunked_token_losses(last, cross_entropy(head), tokens[:, 1:]).mean()

    @transform
    def contexts() -> list[Tensor]:
        return [
            layer.read(segment, state).context
            for layer, segment, state in zip(model.memories, hidden, states, strict=True)
        ]

    @transform
    def written() -> list[LongTermState]:
        operators = signal.operators(states[0].segments)
        return [
            layer.write(segment, state, operators, attention, offsets)
            for layer, segment, state, attention in zip(model.memories, hidden, states, attentions, strict=True)
        ]

    def there_and_back(forward: Callable[[], Tensor | list[Tensor]]) -> None:
        with setting.autocast():
            outputs = forward()
        outputs = outputs if isinstance(outputs, list) else [outputs]
        torch.autograd.backward(outputs, [upstream.to(output.dtype) if output.dim() else None for output in outputs])
        for leaf in (last, *hidden):
            leaf.grad = None

    def write() -> None:
        with setting.autocast():
            written()

    return {
        "backbone": partial(there_and_back, hidden_states),
        "head and loss": partial(there_and_back, loss),
        "memory, read": partial(there_and_back, contexts),
        "memory, write": write,
        "clipping and AdamW": step.update,
    }
