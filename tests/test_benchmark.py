"""What scripts/benchmark.py says is so: the arithmetic, the ratios, the memory; that both sides compute the same; that
every command runs, on models of a few thousand weights. How fast anything is, is no test.
"""

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial, partialmethod
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from matplotlib.image import imread
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import infformer.training

ROWS = (
    "step_graphs", "step_graphs_32", "loop_32", "loop_llama", "density", "step_compiled", "step_compiled_32", "step",
    "step_32", "loop", "step_llama", "density_wide", "step_parts", "read", "layer", "step_windows", "stream",
    "generate", "attention",
)  # fmt: skip
SCRIPTS = Path(__file__).parents[1] / "scripts"
LAYER = "--batch 2 --segment 12 --functions 8 --samples 10 --hidden 16 --heads 4 --rounds 3 --warmup 0"
MODEL = "--layers 2 --hidden 16 --heads 2 --vocabulary 50 --segment 8 --functions 8 --samples 12 --warmup 0"


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """The folder of the scripts can be imported from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield


@pytest.fixture
def script() -> ModuleType:
    return import_module("benchmark")


def module(name: str) -> ModuleType:
    return import_module(f"benchmarks.{name}")


def new_machine(**changes):
    """One that multiplies a thousand times a second and moves a hundred bytes."""
    clock = module("measuring").Clock(torch.device("cpu"))
    machine = {"name": "abacus", "threads": 1, "matmul_flops": 1000.0, "bandwidth": 100.0, **changes}
    return module("machine").Machine(module("machine").Setting(clock), **machine)


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    """What a command printed, and the lines that it wrote, by name; the machine is not measured."""
    monkeypatch.setattr(script, "measure_machine", lambda setting: new_machine())

    def start(capsys, command: str) -> tuple[str, dict[str, dict]]:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *command.split(), "--folder", str(tmp_path)])
        script.main()
        lines = (tmp_path / f"{command.split()[0]}.jsonl").read_text().splitlines()
        return capsys.readouterr().out, {line["name"]: line for line in map(json.loads, lines)}

    return start


def count(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


class TestArithmetic:
    """The formulas against the products of matrices that the modules make."""

    @pytest.fixture
    def sizes(self):
        return module("arithmetic").Sizes(
            batch=3, segment=10, hidden=24, heads=4, layers=2, vocabulary=70, basis_functions=16, past_samples=14,
            feed_forward=96,
        )  # fmt: skip

    @pytest.fixture
    def layer(self, sizes):
        """Ours, the literal one, a state and a segment."""
        models, memory_layer = module("models"), module("memory_layer")
        config = models.memory_config(sizes)
        signal = memory_layer.ContinuousSignal(config, sizes.segment)
        kinds = (memory_layer.LongTermMemory, memory_layer.LiteralMemory)
        ours, literal = (kind(config, sizes.hidden, sizes.heads, signal) for kind in kinds)
        state = memory_layer.LongTermState(torch.randn(3, 16, 24), torch.full((3,), 2))
        return ours, literal, state, torch.randn(3, 10, 24)

    def test_a_read_takes_the_products_that_the_formula_says(self, sizes, layer):
        """r·V may be an operator of its own, which the counter does not look into."""
        ours, _, state, hidden = layer
        expected = module("arithmetic").read(sizes, backward=False).flops
        weighted_values = 2 * sizes.batch * sizes.segment * sizes.basis_functions * sizes.hidden
        assert count(lambda: ours.read(hidden, state)) in (expected, expected - weighted_values)

    def test_read_backward_is_twice_the_forward_pass(self, sizes, layer):
        """Counted where autograd differentiates product by product: in the literal form."""
        _, literal, state, hidden = layer
        hidden.requires_grad_()
        state.coefficients.requires_grad_()
        forward = count(lambda: literal.read(hidden, state))
        both = count(lambda: literal.read(hidden, state).context.sum().backward())
        assert both == 3 * forward
        read = module("arithmetic").read
        assert read(sizes, backward=True).flops == 3 * read(sizes, backward=False).flops

    @pytest.mark.parametrize("backward", [False, True])
    def test_a_write_takes_the_products_that_the_formula_says(self, sizes, layer, backward):
        ours, literal, state, hidden = layer
        attention = ours.read(hidden, state).attention
        operators = ours.signal.operators(state.segments)
        if backward:
            hidden.requires_grad_()
            state.coefficients.requires_grad_()

        def call(memory) -> None:
            written = memory.write(hidden, state, operators, attention).coefficients
            if backward:
                written.sum().backward()

        expected = module("arithmetic").write(sizes, backward=backward).flops
        assert count(lambda: call(literal)) == expected
        assert count(lambda: call(ours)) <= expected

    @pytest.mark.parametrize(("kind", "shared"), [("gpt2", None), ("rotary", None), ("rotary", 2)])
    @pytest.mark.parametrize("backward", [False, True])
    def test_the_backbone_takes_the_products_that_the_formula_says(self, sizes, kind, shared, backward):
        """This attention computes what it then masks: every token sees the whole segment."""
        sizes = module("models").model_sizes(Namespace(**options_of(sizes), key_value_heads=shared), kind)
        model = module("models").new_model(sizes, kind, memory=False)
        model.set_attn_implementation("eager")
        tokens = torch.randint(70, (3, 10))

        def call() -> None:
            hidden = model.backbone.base_model(tokens).last_hidden_state
            if backward:
                hidden.sum().backward()

        expected = module("arithmetic").backbone(sizes, backward=backward, window=sizes.segment).flops
        if kind == "rotary":  # a table of angles, which some versions of transformers make by a product
            places = torch.arange(tokens.shape[1]).unsqueeze(0)
            expected += count(lambda: model.backbone.base_model.rotary_emb(torch.zeros(1), places))
        assert count(call) == expected

    def test_attention_counts_what_a_token_may_see(self, sizes):
        backbone = module("arithmetic").backbone
        causal = backbone(sizes, backward=False).flops
        pairs = sum(range(1, sizes.segment + 1))
        everything = backbone(sizes, backward=False, window=sizes.segment).flops
        assert everything - causal == 4 * sizes.hidden * sizes.batch * sizes.layers * (sizes.segment**2 - pairs)

    def test_the_head_takes_the_products_that_the_formula_says(self, sizes):
        hidden, head = torch.randn(30, 24, requires_grad=True), nn.Linear(24, 70, bias=False)
        for backward in (False, True):
            counted = count(lambda backward=backward: head(hidden).sum().backward() if backward else head(hidden))
            assert counted == module("arithmetic").head(sizes, backward=backward).flops

    def test_a_step_with_memory_is_one_without_and_the_memory(self, sizes):
        arithmetic, steps = module("arithmetic"), module("training_step")
        model = module("models").new_model(sizes, "gpt2", memory=True)
        work = steps.work_of_steps(sizes, [2], model)
        layer = arithmetic.read(sizes, backward=True) + arithmetic.write(sizes, backward=False)
        parameters = sum(parameter.numel() for parameter in model.memory_parameters())
        added = layer * sizes.layers + arithmetic.optimizer(parameters)
        assert work["with memory"].flops == work["without"].flops + added.flops
        assert work["with memory"].bytes == work["without"].bytes + added.bytes
        assert work["window of 2 segments"].flops > work["without"].flops

    def test_the_floor_is_what_is_slower(self):
        work = module("arithmetic").Work(flops=5000, bytes=300)
        assert work.floor(new_machine()) == 5
        assert work.floor(new_machine(bandwidth=10.0)) == 30


def options_of(sizes) -> dict[str, int]:
    """The sizes as the command line gives them."""
    names = {"functions": "basis_functions", "samples": "past_samples"}
    options = ("batch", "segment", "hidden", "heads", "layers", "vocabulary", "functions", "samples")
    return {option: getattr(sizes, names.get(option, option)) for option in options}


class TestMeasuring:
    def test_contestants_take_turns(self):
        measuring = module("measuring")
        ticks = iter(range(1000))
        clock = Namespace(now=lambda: float(next(ticks)))
        calls = []
        contestants = {
            "quick": lambda: calls.append("quick"),
            # What is done to prepare takes time, and is not counted; what is done when called is.
            "slow": lambda: next(ticks),
        }
        seconds = measuring.take_turns(
            contestants, 3, 2, clock, {"slow": lambda: (next(ticks), calls.append("prepare"))}
        )
        assert seconds == {"quick": [1.0] * 3, "slow": [2.0] * 3}
        assert calls == ["quick", "prepare"] * 5

    def test_the_clock_of_the_process_stands_still_while_it_sleeps(self):
        import time

        clock = module("measuring").Clock(torch.device("cpu"), "process")
        before = clock.now()
        time.sleep(0.2)
        assert clock.now() - before < 0.1

    @pytest.mark.parametrize(
        ("values", "summary"), [([3.0], (3, 3, 3)), ([4.0, 1, 3, 2, 5], (3, 2, 4)), ([1.0, 2], (1.5, 1.25, 1.75))]
    )
    def test_a_summary_is_the_median_and_the_quartiles(self, values, summary):
        assert module("measuring").summarize(values) == summary

    def test_peak_memory_is_that_of_one_moment(self):
        """Of what a call holds at once, not of all that it ever takes, and not of what was there before."""
        there = torch.randn(1000, 1000)

        def call() -> torch.Tensor:
            first = there * 2  # 4 MB
            second = first + first  # 8 MB
            del first
            third = second[:500] * 3  # 6 MB
            del second
            return third * 1.0

        for _ in range(2):
            assert module("measuring").peak_extra_bytes(call, torch.device("cpu")) == 8_000_000


class TestReport:
    @pytest.fixture
    def comparison(self):
        report, arithmetic = module("report"), module("arithmetic")
        results = [
            report.Result("ours", [2.0, 4.0, 3.0], arithmetic.Work(1500, 10), figures={"peak_extra_bytes": 2**20}),
            report.Result("a part", [1.0, 1.0, 1.0], arithmetic.Work(0, 50), part=True),
            report.Result("theirs", [8.0, 8.0, 9.0]),
        ]
        ratio = report.paired("theirs / ours", results[2].seconds, results[0].seconds)
        return report.Comparison("trial", {"size": 3}, results, [ratio])

    def test_ratios_are_those_of_the_rounds(self, comparison, tmp_path):
        """Not the ratio of the medians: 8/3 here."""
        comparison.write(tmp_path / "new" / "trial.jsonl", new_machine())
        *_, line = map(json.loads, (tmp_path / "new" / "trial.jsonl").read_text().splitlines())
        assert line["kind"] == "ratio"
        assert line["ratio"] == [4.0, 2.0, 3.0]
        assert line["median_ratio"] == 3.0
        assert line["quartiles_ratio"] == [2.5, 3.5]

    def test_lines_say_all_that_it_takes_to_read_them(self, comparison, tmp_path):
        comparison.write(tmp_path / "trial.jsonl", new_machine())
        ours, part, theirs, _ = map(json.loads, (tmp_path / "trial.jsonl").read_text().splitlines())
        assert ours | {"machine": None} == {
            "comparison": "trial",
            "machine": None,
            "options": {"size": 3},
            "kind": "contestant",
            "name": "ours",
            "seconds": [2.0, 4.0, 3.0],
            "median_seconds": 3.0,
            "quartiles_seconds": [2.5, 3.5],
            "peak_extra_bytes": 2**20,
            "flops": 1500,
            "bytes": 10,
            "floor_seconds": 1.5,
        }
        assert ours["machine"].keys() == {
            "device", "name", "torch", "python", "threads", "precision", "clock", "matmul_flops", "bandwidth",
        }  # fmt: skip
        assert (part["kind"], part["floor_seconds"]) == ("part", 0.5)
        assert "floor_seconds" not in theirs

    def test_the_table_says_it_in_units_that_can_be_read(self, comparison):
        lines = comparison.format(new_machine()).splitlines()
        assert lines[0] == "trial: size 3"
        assert "abacus, 1 thread, torch" in lines[1]
        ours, part, theirs = ([cell for cell in line.split("  ") if cell] for line in lines[4:7])
        cells = ["ours", "3 s", "2.5 s – 3.5 s", "1.5 s", "2.00", "0.0", "0.500", "1.0 MiB"]
        assert [cell.strip() for cell in ours] == cells
        assert [cell.strip() for cell in part] == ["a part", "1 s", "1 s – 1 s", "500 ms", "2.00"]
        assert [cell.strip() for cell in theirs] == ["theirs", "8 s", "8 s – 8.5 s"]
        assert lines[-1].split() == ["theirs", "/", "ours", "3.000", "2.500", "–", "3.500"]


class TestLayer:
    @pytest.mark.parametrize("command", ["read", "write", "layer"])
    def test_both_compute_the_same(self, command):
        """Values, and the gradients of everything that goes in."""
        memory_layer = module("memory_layer")
        sizes = module("arithmetic").Sizes(batch=2, segment=12, hidden=16, heads=4, basis_functions=8, past_samples=10)
        setting = new_machine().setting
        passes = memory_layer.new_passes(sizes, command, setting, compiled=False)
        ours, naive = passes["ours"](), passes["naive"]()
        outputs, weights = (2, 5) if command == "layer" else (1, 5 if command == "read" else 0)
        assert len(ours) == len(naive) == outputs + 2 + weights
        for one, other in zip(ours, naive, strict=True):
            assert other.any()
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())

    def test_different_results_are_not_compared(self, monkeypatch, run, capsys):
        memory_layer = module("memory_layer")
        read = memory_layer.LiteralMemory.read

        def wrong(self, hidden, state):
            reading = read(self, hidden, state)
            return reading._replace(context=1.01 * reading.context)

        monkeypatch.setattr(memory_layer.LiteralMemory, "read", wrong)
        with pytest.raises(ArithmeticError, match=r"differ by 9\.9e-03 of the largest entry, and may by 1e-03"):
            run(capsys, f"read {LAYER}")

    @pytest.mark.parametrize(("command", "options"), [("read", " --profile"), ("write", ""), ("layer", "")])
    def test_a_command_measures_ours_beside_the_literal_form(self, run, capsys, command, options):
        printed, lines = run(capsys, f"{command} {LAYER}{options}")
        assert ("aten::bmm" in printed) == bool(options)
        ours, naive = lines["ours"], lines["naive"]
        assert len(ours["seconds"]) == 3
        rounds = [one / other for one, other in zip(naive["seconds"], ours["seconds"], strict=True)]
        assert lines["naive / ours, time"]["ratio"] == rounds
        memory = ours["peak_extra_bytes"] / naive["peak_extra_bytes"]
        assert lines["ours / naive, peak extra memory"]["ratio"] == [memory]
        assert ours["options"]["functions"] == 8

    def test_a_layer_is_measured_in_bfloat16(self, run, capsys):
        """Autocast, in which the memory is float32 all the same."""
        assert run(capsys, f"layer {LAYER} --precision bfloat16")[1]["ours"]["machine"]["name"] == "abacus"

    @pytest.mark.slow
    def test_a_layer_is_measured_compiled(self, run, capsys):
        assert run(capsys, f"layer {LAYER} --compile")[1]["ours"]["options"]["compile"] is True


class TestDensity:
    def test_both_read_the_same(self):
        sizes = module("arithmetic").Sizes(batch=2, segment=9, hidden=16, heads=4, basis_functions=8, past_samples=9)
        for deviation in (0.01, 1.0):
            passes = module("density_read").new_passes(sizes, deviation, new_machine().setting)
            for one, other in zip(passes["ours"](), passes["eager"](), strict=True):
                assert other.any()
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())

    def test_a_density_takes_the_products_that_the_formula_says(self):
        """Counted where autograd differentiates product by product."""
        arithmetic = module("arithmetic")
        sizes = arithmetic.Sizes(batch=2, segment=9, hidden=16, heads=4, basis_functions=8, past_samples=9)
        passes = module("density_read").new_passes(sizes, 0.1, new_machine().setting)
        assert count(passes["eager"]) == arithmetic.density_read(sizes, backward=True).flops
        parts = arithmetic.read(sizes, backward=False).flops
        assert parts > arithmetic.density_read(sizes, backward=False).flops > 0

    def test_a_density_is_measured_beside_eager_pytorch(self, run, capsys):
        _, lines = run(capsys, "density --segment 9 --functions 8 --hidden 16 --heads 4 --rounds 2")
        ours, eager = lines["ours"]["seconds"], lines["eager"]["seconds"]
        assert lines["eager / ours, time"]["ratio"] == [one / other for one, other in zip(eager, ours, strict=True)]


class TestAttentions:
    def test_the_exponent_is_the_power_by_which_time_grows(self):
        seconds = {length: 3e-6 * length**1.5 for length in (100, 200, 700)}
        assert module("attentions").growth_exponent(seconds) == pytest.approx(1.5)

    def test_every_mechanism_is_measured_beside_softmax_and_drawn(self, run, capsys):
        options = "--attentions linear bigbird --lengths 24 48 --alone 96 --hidden 16 --heads 2 --rounds 2 --warmup 0"
        printed, lines = run(capsys, f"attention {options}")
        for baseline in ("softmax", "softmax written out"):
            above, below = lines[f"{baseline} 48"], lines["linear 48"]
            rounds = [one / other for one, other in zip(above["seconds"], below["seconds"], strict=True)]
            assert lines[f"{baseline} / linear, time at 48"]["ratio"] == rounds
            memory = below["peak_extra_bytes"] / above["peak_extra_bytes"]
            assert lines[f"linear / {baseline}, memory at 48"]["ratio"] == [memory]
        assert lines["bigbird 96"]["text_tokens"] == 96
        assert "softmax 96" not in lines
        assert lines.keys() >= {"softmax, exponent of time", "linear, exponent of time"}
        assert imread(printed.split("drawn: ")[1].strip()).std() > 0

    def test_weights_that_are_written_out_take_the_square_of_the_length(self, run, capsys):
        sizes = "--hidden 16 --heads 2 --feed-forward 16 --rounds 1 --warmup 0"
        _, lines = run(capsys, f"attention --attentions local --lengths 1024 2048 {sizes}")

        def growth(name: str) -> float:
            return lines[f"{name} 2048"]["peak_extra_bytes"] / lines[f"{name} 1024"]["peak_extra_bytes"]

        # Twice the length: 4 times the square of it, and twice what is linear. PyTorch's softmax takes larger blocks
        # from 768 tokens on.
        assert growth("softmax written out") > 3.5
        assert growth("softmax") < 3
        assert growth("local") < 3


class TestModels:
    def test_the_window_moves_with_the_tokens(self):
        """A token sees as many tokens as the window has, whatever their segment, and none before."""
        models = module("models")
        sizes = module("arithmetic").Sizes(
            batch=1, segment=4, hidden=16, heads=2, vocabulary=50, feed_forward=32, feed_forward_matrices=3
        )
        torch.manual_seed(0)
        evaluator = models.WindowReader(models.new_window_model(sizes, window=6)).eval()
        document = torch.randint(50, (1, 21))
        other = document.clone()
        other[0, 10] = (other[0, 10] + 1) % 50

        @torch.no_grad()
        def losses(tokens: torch.Tensor) -> torch.Tensor:
            memory, each = None, []
            for start in range(0, 20, 4):
                stop = start + 4
                output = evaluator(tokens[:, start:stop], targets=document[:, start + 1 : stop + 1], state=memory)
                memory = output.state
                each.append(output.token_losses)
            return torch.cat(each, dim=1)[0]

        changed = (losses(document) - losses(other)).abs() > 1e-6
        assert changed.nonzero().flatten().tolist() == list(range(10, 16))

    def test_a_training_step_goes_on_in_its_document(self):
        """With every kind of memory, and no gradient reaches back into the step before."""
        models, training_step = module("models"), module("training_step")
        sizes = module("arithmetic").Sizes(
            batch=2, segment=8, hidden=16, heads=2, vocabulary=50, basis_functions=8, past_samples=12, feed_forward=32,
            feed_forward_matrices=3,
        )  # fmt: skip
        contestants = {
            "memory": models.new_model(sizes, "rotary", memory=True),
            "window": models.WindowReader(models.new_window_model(sizes, 16)),
        }
        for model in contestants.values():
            step = training_step.TrainingStep(model, sizes, new_machine().setting)
            before = [parameter.detach().clone() for parameter in model.parameters()]
            remembered = []
            for _ in range(4):
                step()
                remembered.append(models.tensor_bytes(step._memory))
            assert all(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
            assert remembered[-1] == remembered[-2] > 0


class TestCommands:
    def test_a_step_is_measured_with_its_parts(self, run, capsys, tmp_path):
        printed, lines = run(capsys, f"step {MODEL} --backbone rotary --windows 2 --parts --rounds 2 --profile")
        assert [name for name, line in lines.items() if line["kind"] == "contestant"] == [
            "with memory", "without", "window of 2 segments",
        ]  # fmt: skip
        parts = [line for line in lines.values() if line["kind"] == "part"]
        assert [part["name"] for part in parts] == [
            "backbone", "head and loss", "memory, read", "memory, write", "clipping and AdamW",
        ]  # fmt: skip
        assert sum(part["flops"] for part in parts) == lines["with memory"]["flops"]
        for ratio, value in enumerate(lines["the parts together / with memory"]["ratio"]):
            together = sum(part["seconds"][ratio] for part in parts)
            assert value == pytest.approx(together / lines["with memory"]["seconds"][ratio])
        assert "aten::addmm" in printed or "aten::mm" in printed
        assert imread(tmp_path / "step.png").std() > 0.05

    @pytest.mark.slow
    def test_a_stream_is_measured_early_and_late(self, run, capsys, tmp_path):
        _, lines = run(capsys, f"stream {MODEL} --windows 2 3 --segments 70 --rounds 10")
        early, late = lines["with memory, early"], lines["with memory, late"]
        assert (early["reach_tokens"], late["reach_tokens"]) == (8 * 8, 70 * 8)
        assert late["memory_bytes"] == early["memory_bytes"] == 2 * (8 * 16 * 4 + 8)
        assert late["peak_extra_bytes"] == early["peak_extra_bytes"] > 0
        assert late["peak_process_bytes"] >= early["peak_process_bytes"] > 2**24
        assert [segment for segment, _ in late["times_early_by_segment"]] == [61]
        # What a full window leaves for the next segment: keys and values of both layers.
        assert lines["window of 3 segments"]["memory_bytes"] == 2 * 2 * (3 * 8 - 1) * 16 * 4
        assert lines["without"]["memory_bytes"] == 0
        assert imread(tmp_path / "stream.png").std() > 0.05

    def test_early_segments_stay_early(self):
        """Each document is left after its eleventh segment, and only segments 5 to 11 are timed."""
        streaming, models = module("streaming"), module("models")
        sizes = module("arithmetic").Sizes(
            batch=1, segment=4, hidden=8, heads=2, vocabulary=20, basis_functions=8, past_samples=4, feed_forward=32
        )
        stream = streaming.Stream(models.new_model(sizes, "gpt2", memory=True), sizes, new_machine().setting)
        timed = []
        for _ in range(16):
            stream.stay_early()
            stream.read()
            timed.append(stream.segments)
            assert stream._memory.layers[0].segments.tolist() == [stream.segments]
        assert timed == [5, 6, 7, 8, 9, 10, 11] * 2 + [5, 6]

    @pytest.mark.slow
    def test_generation_is_measured_in_tokens_per_second(self, run, capsys):
        _, lines = run(capsys, f"generate {MODEL} --windows 2 --prompt 3 --late 20 --rounds 2")
        for name in ("with memory", "without", "with memory, late", "window of 2 segments"):
            median = lines[name]["median_seconds"]
            assert lines[name]["tokens_per_second"] == pytest.approx(8 / median)
        assert len(lines["window of 2 segments / with memory, tokens per second"]["ratio"]) == 2
        assert lines["late / soon, peak extra memory"]["ratio"] == [pytest.approx(1, abs=0.01)]

    @pytest.mark.slow
    def test_generation_can_be_measured_token_by_token(self, run, capsys):
        _, lines = run(capsys, f"generate {MODEL} --backbone gpt2 --turn 1 --windows --prompt 3 --late 3 --rounds 5")
        assert len(lines["with memory"]["seconds"]) == 5
        for name in ("with memory", "without"):
            assert lines[name]["tokens_per_second"] == pytest.approx(1 / lines[name]["median_seconds"])

    def test_a_decoder_is_measured_by_its_multiplications(self, run, capsys):
        _, lines = run(capsys, "decoder --layers 1 --hidden 16 --vocabulary 50 --segment 8 --memory 8 --rounds 2")
        # d = 16, M + T = 16: layer 12·d² + 2·d²·(M + T)/T − 2·d² … and the vocabulary.
        with_memory = 10 * 16**2 + 2 * 16**2 * 2 + 3 * 16 * 16 + 50 * 16
        without = 10 * 16**2 + 2 * 16**2 + 3 * 8 * 16 + 50 * 16
        assert lines["with"]["multiplications_per_token"] == with_memory
        assert lines["by the multiplications"]["ratio"] == [without / with_memory]
        assert lines["by the attention lengths alone"]["ratio"] == [0.5]

    @pytest.mark.slow
    def test_an_evaluation_is_measured_in_tokens_per_second(self, run, capsys):
        options = "--layers 1 --hidden 16 --heads 2 --vocabulary 4096 --segment 16 --documents 1 --segments 2"
        _, lines = run(capsys, f"evaluation {options} --rounds 1 --warmup 0")
        assert lines["evaluation"]["tokens_per_second"] == pytest.approx(32 / lines["evaluation"]["median_seconds"])

    @pytest.mark.slow
    def test_answers_are_measured_beside_reading(self, run, capsys):
        options = "--layers 1 --hidden 16 --heads 2 --vocabulary 4096 --segment 16 --texts 2 --length 200"
        _, lines = run(capsys, f"answers {options} --rounds 2 --warmup 0")
        assert lines["answers / reading"]["ratio"] == [
            one / other for one, other in zip(lines["answers"]["seconds"], lines["reading"]["seconds"], strict=True)
        ]

    @pytest.mark.slow
    def test_the_loop_is_measured_beside_a_bare_step(self, run, capsys):
        options = "--layers 1 --hidden 16 --heads 2 --vocabulary 4096 --segment 16 --functions 8 --samples 8"
        _, lines = run(capsys, f"loop {options} --rounds 3")
        assert lines["train.py / bare step"]["ratio"] == [
            one / other for one, other in zip(lines["train.py"]["seconds"], lines["bare step"]["seconds"], strict=True)
        ]
        assert len(lines["bare step"]["seconds"]) == 3
        assert lines["train.py"]["flops"] == lines["bare step"]["flops"] > 0


class TestOptions:
    @pytest.mark.parametrize(
        ("command", "message"),
        [
            ("read --rounds 0", "--rounds 0: must be at least 1"),
            ("read --hidden 33", "--hidden 33 --heads 12: the heads must divide the width"),
            ("write --device tpu", "--device tpu: "),
            ("step --windows 2 0", "--windows 2 0: must be at least 1"),
            ("all --rows layer nothing --device cpu", "--rows nothing: choose from read, "),
            ("generate --backbone gpt2 --windows 2", "--windows 2 with --backbone gpt2: it has no positions beyond"),
            ("generate --batch 2", "--batch 2: text is generated one row at a time; leave it at 1"),
            ("step --windows 2 4", "--windows 2 4 with --backbone gpt2: it has no positions beyond its segment;"),
            ("stream --backbone gpt2", "--windows 2 4 8 with --backbone gpt2: it has no positions beyond its segment;"),
            ("stream --segments 60", "--segments 60 with --rounds 100: the late segments would begin at the 10th,"),
        ],
    )
    def test_options_that_cannot_be_are_refused(self, run, capsys, command, message):
        with pytest.raises(SystemExit) as stopped:
            run(capsys, command)
        assert message in capsys.readouterr().err + str(stopped.value)

    def test_the_loop_is_refused_without_the_libraries_of_train(self, run, capsys, monkeypatch):
        monkeypatch.delattr(infformer.training, "trainer", raising=False)
        monkeypatch.setitem(sys.modules, "infformer.training.trainer", None)
        with pytest.raises(SystemExit, match=r"train.py cannot be measured here: infformer.training.trainer is not"):
            run(capsys, "loop --layers 1")

    @pytest.mark.slow
    def test_other_rows_need_neither_hydra_nor_datasets(self):
        missing = "hydra", "omegaconf", "datasets"
        program = f"import sys; sys.modules |= dict.fromkeys({missing}); sys.path.insert(0, {str(SCRIPTS)!r})"
        program += "; import benchmark; benchmark.parse_options(['step'])"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


class TestAllRows:
    def test_they_are_those_that_are_tried(self, script):
        assert tuple(script.ROWS_ON_GPU) == ROWS

    def test_their_options_are_known(self, script):
        for rows in (script.ROWS_ON_CPU, script.ROWS_ON_GPU):
            for row in rows.values():
                options = script.parse_options([*row.split(), "--device", "cpu"])
                assert options.command == row.split()[0]

    def test_each_in_a_process_of_its_own_and_a_failure_stops_none(self, script, monkeypatch, capfd, tmp_path):
        rows = {"one": f"read {LAYER}", "two": f"write {LAYER}", "three": "layer"}
        monkeypatch.setattr(script, "ROWS_ON_CPU", rows)
        commands = []

        def start(command, check):
            commands.append(command)
            return Namespace(returncode=int("write" in command))

        monkeypatch.setattr(script.subprocess, "run", start)
        assert script.run_all(torch.device("cpu"), tmp_path, None, []) == 1
        assert [command[2] for command in commands] == ["read", "write", "layer"]
        assert all(command[:2] == [sys.executable, str(SCRIPTS / "benchmark.py")] for command in commands)
        assert [command[-1] for command in commands] == [str(tmp_path / f"{name}.jsonl") for name in rows]
        assert "not measured: two" in capfd.readouterr().err
        commands.clear()
        assert script.run_all(torch.device("cpu"), tmp_path, ["one", "three"], ["--threads", "1"]) == 0
        assert [command[2] for command in commands] == ["read", "layer"]
        assert all(command[-2:] == ["--threads", "1"] for command in commands)
        commands.clear()
        (tmp_path / "one.jsonl").write_text("{}\n")
        (tmp_path / "one.command").write_text(f"read {LAYER} --device cpu --json {tmp_path / 'one.jsonl'}")
        assert script.run_all(torch.device("cpu"), tmp_path, ["one", "three"], []) == 0
        assert [command[2] for command in commands] == ["layer"]  # what was stopped goes on
        assert script.run_all(torch.device("cpu"), tmp_path, ["one", "three"], [], again=True) == 0
        assert [command[2] for command in commands] == ["layer", "read", "layer"]
        assert script.run_all(torch.device("cpu"), tmp_path, ["one"], ["--threads", "1"]) == 0
        assert [command[2] for command in commands] == ["layer", "read", "layer", "read"]  # by other options

    def test_a_comparison_notes_by_which_command_it_was_made(self, run, capsys, tmp_path):
        run(capsys, f"read {LAYER}")
        (noted,) = tmp_path.rglob("*.command")
        assert noted.with_suffix(".jsonl").exists()
        assert noted.read_text().startswith(f"read {LAYER}")

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ROWS)
    def test_a_row_of_a_gpu_runs_on_the_processor_too(self, script, run, capsys, monkeypatch, name):
        """In small; compiled, but by a compiler that needs no other."""
        monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        row = script.ROWS_ON_GPU[name]
        command = row.split()[0]
        small = "--hidden 18 --heads 9 --rounds 2 --warmup 0"
        small += " --lengths 40 80 --alone 160" if command == "attention" else " --segment 16 --functions 8"
        small += "" if command in ("attention", "density") else " --samples 8"
        small += "" if command in ("attention", "density", "read", "layer") else " --layers 2 --vocabulary 4096"
        small += {"stream": " --segments 70", "generate": "", "loop": " --every 2"}.get(command, "")
        small += "" if command in ("stream", "generate") else " --batch 2"
        _, lines = run(capsys, f"{row} {small}")
        found = {name: line["median_ratio"] for name, line in lines.items() if line["kind"] == "ratio"}
        ratios = [ratio for name, ratio in found.items() if "exponent" not in name]
        assert ratios
        assert min(ratios) > 0
