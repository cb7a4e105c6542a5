"""The scripts that make many runs: each run once, whatever happens in between, and tables of what they found."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import geometric_mean
from types import ModuleType

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from infformer.config import CONF, RunConfig
from infformer.errors import UserError
from infformer.models.loading import new_decoder
from infformer.training.command_line import compose

ROOT = Path(__file__).parents[1]
# In place of train.py: notes that it was started, does what the option `then` says, and has results.
TRAIN = """
import json, signal, sys, time
from pathlib import Path

options = dict(option.split("=", 1) for option in sys.argv[1:])
folder = Path(json.loads(options["output_dir"]))
folder.mkdir(parents=True, exist_ok=True)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: sys.exit(99))
with (folder.parent / "started").open("a") as file:
    file.write(options["name"] + chr(10))
if options.get("then") == "fail" and not (folder.parent / "mended").exists():
    sys.exit(3)
while options.get("then") == "wait" and not (folder.parent / "signalled").exists():
    time.sleep(0.01)
if options.get("data.test") != "null":
    (folder / "results.json").write_text(json.dumps(options))
"""


@pytest.fixture
def grid(monkeypatch, tmp_path) -> ModuleType:
    """The module of that name, with a train.py that takes no time."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    module = import_module("grid")
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(module, "TRAIN", tmp_path / "train.py")
    return module


@pytest.fixture
def sorting(grid) -> ModuleType:
    return import_module("reproduce_sorting")


@pytest.fixture
def arena(grid) -> ModuleType:
    return import_module("reproduce_long_range_arena")


@pytest.fixture
def from_scratch(grid) -> ModuleType:
    return import_module("reproduce_from_scratch")


@pytest.fixture
def started(tmp_path) -> Callable[[], list[str]]:
    """The names of the runs that were started, in this order."""
    return lambda: (tmp_path / "started").read_text().split() if (tmp_path / "started").exists() else []


class TestGrid:
    def test_every_run_is_made_and_its_results_returned(self, grid, tmp_path, started):
        results = grid.run_all({"one": ["seed=1"], "two": ["seed=2", "model/memory=sticky"]}, tmp_path)
        assert started() == ["one", "two"]
        assert results["two"] == {
            "seed": "2",
            "model/memory": "sticky",
            "name": "two",
            "output_dir": json.dumps(str(tmp_path / "two")),
            "resume": "auto",
        }
        assert results["one"]["seed"] == "1"

    def test_what_is_done_is_not_made_again(self, grid, tmp_path, started):
        grid.run_all({"one": ["seed=1"]}, tmp_path)
        results = grid.run_all({"two": ["seed=2"], "one": ["seed=1"]}, tmp_path)
        assert started() == ["one", "two"]
        assert [result["seed"] for result in results.values()] == ["2", "1"]

    def test_a_run_without_a_test_is_whole_and_has_no_results(self, grid, tmp_path, started):
        runs = {"one": ["data.test=null"], "two": []}
        assert grid.run_all(runs, tmp_path)["one"] == {}
        assert grid.run_all(runs, tmp_path).keys() == runs.keys()
        assert started() == ["one", "two"]

    def test_results_by_other_options_are_not_taken_for_these(self, grid, tmp_path, started):
        grid.run_all({"one": ["seed=1"]}, tmp_path)
        assert grid.run_all({"one": ["seed=1", "steps=9"]}, tmp_path)["one"]["steps"] == "9"
        assert started() == ["one", "one"]

    def test_a_run_that_failed_is_gone_on_with(self, grid, tmp_path, started):
        runs = {"one": [], "two": ["then=fail"], "three": []}
        with pytest.raises(SystemExit, match="the run two ended with exit status 3; the same command goes on"):
            grid.run_all(runs, tmp_path)
        assert started() == ["one", "two"]
        (tmp_path / "mended").touch()
        assert grid.run_all(runs, tmp_path).keys() == runs.keys()
        assert started() == ["one", "two", "two", "three"]

    @pytest.fixture
    def send(self, tmp_path, started) -> Callable[[int], None]:
        """Sends this process a signal as soon as the run has started, and someone listens."""

        def wait_and_send(number: int) -> None:
            before = signal.getsignal(number)
            while not started() or signal.getsignal(number) is before:
                time.sleep(0.01)
            os.kill(os.getpid(), number)
            if number == signal.SIGINT:
                (tmp_path / "signalled").touch()

        return lambda number: threading.Thread(target=wait_and_send, args=[number], daemon=True).start()

    @pytest.mark.usefixtures("signals_heard")
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_who_ends_the_script_ends_the_run(self, grid, tmp_path, send, number):
        send(number)
        with pytest.raises(SystemExit, match="exit status 99; the same command goes on"):
            grid.run_all({"one": ["then=wait"]}, tmp_path)
        assert not (tmp_path / "one" / "results.json").exists()

    def test_an_interrupt_is_left_to_the_run(self, grid, tmp_path, send):
        """A terminal sends it to both; the script waits for the checkpoint."""
        handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        send(signal.SIGINT)
        assert grid.run_all({"one": ["then=wait"]}, tmp_path).keys() == {"one"}
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers

    @pytest.mark.usefixtures("signals_heard")
    def test_when_time_is_over_the_run_is_ended_and_no_other_begins(self, grid, tmp_path, started):
        grid.run_all({"whole": []}, tmp_path)
        runs = {"whole": [], "cut": ["then=wait"], "later": []}
        assert grid.run_all(runs, tmp_path, time.monotonic() + 3).keys() == {"whole"}
        assert started() in (["whole", "cut"], ["whole"])  # a machine may take three seconds to start a process
        (tmp_path / "signalled").touch()
        assert grid.run_all(runs, tmp_path).keys() == runs.keys()

    def test_when_time_is_over_nothing_begins(self, grid, tmp_path, started):
        assert grid.run_all({"one": []}, tmp_path, time.monotonic() - 1) == {}
        assert started() == []

    def test_a_row_is_made_once(self, grid, tmp_path):
        made = []

        def make(seed: int, steps: int) -> dict[str, float]:
            made.append((seed, steps))
            return {"loss": float("inf") if seed else 0.5}

        runs = [{"seed": seed, "steps": 1} for seed in (0, 1)]
        first = grid.make_rows(runs, make, tmp_path / "runs.json", "making")
        assert [row["loss"] for row in first] == [0.5, float("inf")]
        again = grid.make_rows([{"seed": 0, "steps": 2}, *runs[::-1]], make, tmp_path / "runs.json", "making")
        assert made == [(0, 1), (1, 1), (0, 2)]
        assert [(row["seed"], row["steps"], row["loss"]) for row in again] == [(0, 2, 0.5), (1, 1, None), (0, 1, 0.5)]

    @pytest.mark.parametrize(
        ("values", "text"),
        [
            ([], "–"),
            ([0.756], "0.76"),
            ([0.5, 0.7], "0.60 ± 0.10"),
            ([0.4, 0.41, 0.8], "0.54 ± 0.20"),
            ([1, 1], "1.00"),
        ],
    )
    def test_a_mean_is_with_its_deviation(self, grid, values, text):
        assert grid.format_mean(values) == text


def accuracies(level: float) -> dict[str, float]:
    return {"accuracy": level, "accuracy_free_running": level / 2}


def test_the_table_of_accuracies_has_a_line_for_each_memory(sorting):
    counters = {"last_half": accuracies(0.2), "chance": accuracies(0.1)}
    rows = [
        {"memory": memory, "seed": seed, "length": length, "sequences": 9, "ideal_counters": counters}
        | accuracies(level)
        for memory, seed, length, level in [
            ("sticky", 0, 2000, 0.6),
            ("sticky", 1, 2000, 0.8),
            ("sticky", 0, 500, 0.9),
            ("none", 0, 500, 0.4),
        ]
    ]
    lines = sorting.format_table(rows).splitlines()
    assert lines[:6] == [
        "| memory | 500 | 2,000 |",
        "|---|---|---|",
        "| sticky | 0.90 / 0.45 | 0.70 ± 0.10 / 0.35 ± 0.05 |",
        "| none | 0.40 / 0.20 | – / – |",
        "| *last half* | 0.20 / 0.10 | 0.20 / 0.10 |",
        "| *chance* | 0.10 / 0.05 | 0.10 / 0.05 |",
    ]
    assert "9 sequences" in lines[-1]
    assert "seeds 0, 1" in lines[-1]


def arena_rows() -> list[dict]:
    """Two seeds of softmax on two tasks, and one of a mechanism that was not published."""
    return [
        {"task": task, "attention": attention, "seed": seed, "accuracy": accuracy, "examples": 50}
        | {"baselines": {"majority": 0.2} | ({"root_operator": 0.37} if task == "listops" else {})}
        for task, attention, seed, accuracy in [
            ("listops", "softmax", 0, 0.36),
            ("listops", "softmax", 1, 0.38),
            ("listops", "continuous", 0, 0.3),
            ("image", "softmax", 0, 0.4),
            ("image", "continuous", 0, 0.5),
        ]
    ]


def test_the_table_of_long_range_arena_has_published_accuracies_and_what_is_right_without_reading(arena):
    assert arena.format_table(arena_rows()).splitlines()[:6] == [
        "| attention | listops | image | mean |",
        "|---|---|---|---|",
        "| softmax | 37.0 ± 1.0 (36.4) | 40.0 (42.4) | 38.5 |",
        "| continuous | 30.0 | 50.0 | 40.0 |",
        "| *majority* | 20.0 | 20.0 | |",
        "| *root operator* | 37.0 | – | |",
    ]


def test_speeds_of_long_range_arena_that_are_not_there_are_told_before_any_run(arena, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(arena, "run_all", None)
    monkeypatch.setattr(sys, "argv", ["reproduce_long_range_arena.py", "--speed", str(tmp_path / "none.jsonl")])
    with pytest.raises(SystemExit):
        arena.main()
    assert "there is no such file; make it by scripts/benchmark.py attention" in capsys.readouterr().err


def test_each_task_mechanism_and_seed_of_long_range_arena_is_a_run(arena, monkeypatch, capsys, tmp_path):
    runs = {}

    def run_all(asked, folder):
        runs.update(asked)
        folder.mkdir(parents=True)
        figures = {"accuracy": 0.25, "examples": 4, "baselines": {"majority": 0.2}}
        span = {"attention_span": {"layers": [20.2, 11.0], "even": 341.3, "examples": 4}}
        return {name: figures | (span if "softmax" in name else {}) for name in asked}

    monkeypatch.setattr(arena, "run_all", run_all)
    speeds = tmp_path / "attention.jsonl"
    lines = [
        {
            "kind": "contestant",
            "name": f"{name} 64",
            "text_tokens": 64,
            "median_seconds": taken,
            "peak_extra_bytes": held,
        }
        for name, taken, held in (("softmax", 3.0, 100), ("softmax written out", 4.0, 400), ("linear", 1.0, 80))
    ]
    speeds.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["--tasks", "image", "--attentions", "softmax", "linear", "--seeds", "0", "2", "--set", "lra_paper"]
    command += ["--folder", str(tmp_path / "arena"), "--speed", str(speeds), "--", "training.max_steps=3"]
    monkeypatch.setattr(sys, "argv", ["reproduce_long_range_arena.py", *command])
    arena.main()
    assert list(runs) == ["image_softmax_seed0", "image_linear_seed0", "image_softmax_seed2", "image_linear_seed2"]
    assert runs["image_linear_seed2"] == [
        "experiment=lra_image",
        "model=lra_paper",
        "seed=2",
        "model.architecture.attention=linear",
        "training.max_steps=3",
    ]
    printed = capsys.readouterr().out
    assert "| linear | 25.0 (42.3) | 25.0 |" in printed
    assert "| image, seed 2 | 20, 11 | 341 |" in printed
    assert imread(tmp_path / "arena" / "trade_off.png").std() > 0.02


def test_the_table_of_perplexities_has_a_line_for_each_experiment(from_scratch):
    rows = [
        {
            "experiment": "with",
            "seed": seed,
            "parameters": 12345,
            "vectors": 128,
            "per_token": 50 + seed,
            "per_word": 60,
        }
        | {"memory_off": 70 + seed, "memory_of_another_document": 80}
        for seed in (0, 2)
    ]
    rows.append({"experiment": "without", "seed": 0, "parameters": 99, "vectors": 0, "per_token": 55, "per_word": 65})
    lines = from_scratch.format_table(rows).splitlines()
    assert lines[2:4] == [
        "| with | 12,345 | 128 | 50.99 ± 1.00 | 60.00 | 70.99 ± 1.00 | 80.00 |",
        "| without | 99 | 0 | 55.00 | 65.00 | – | – |",
    ]
    assert "seeds 0, 2" in lines[-1]


def study_results(nats: float, floats: int, memory: bool = True) -> dict:
    """Of two documents of 10 and 20 tokens, half of them in each class; `nats` a token, half of that in the second."""

    def documents(level: float) -> list[dict]:
        return [
            {"id": str(tokens), "tokens": tokens, "words": tokens, "bytes": tokens, "nll": tokens * level * part}
            | {name: [[tokens / 2, tokens * level * part / 2]] * 2 for name in ("by_position", "by_place")}
            | {"by_recency": [[tokens / 2, tokens * level * part / 2]] * 2 + [[0, 0.0]]}
            for tokens, part in ((10, 1.0), (20, 0.5))
        ]

    edges = [{"from": 0, "to": 4}, {"from": 4, "to": 16}]
    control = {"difference": {"nats_per_token": 0.125}, "per_document": documents(nats + 0.25)}
    names = ("memory_off", "memory_of_another_document", "memory_shuffled_in_time")
    return {
        "per_document": documents(nats),
        "documents": 2, "tokens": 30, "words": 30, "bytes": 30,
        "perplexity": {"token": 10 * nats, "word": 1.0},
        "by_position": edges, "by_place": edges,
        "by_recency": [{"previous_occurrence": name} for name in ("within_window", "beyond_window", "never")],
        "controls": dict.fromkeys(names, control) if memory else {},
        "protocol": {
            "segment": 16, "stride": 16, "warmup_documents": 0, "dtype": "float32", "documents": "these",
            "memory": {"kind": "long_term"} if memory else None, "checkpoint": "somewhere",
        },
        "cost": {"seconds_per_token": 0.002},
        "sizes": {"state_floats": [floats] if floats else [], "memory_parameters": 7},
    }  # fmt: skip


@pytest.mark.slow
def test_growing_and_training_from_scratch_cost_the_same(grid, monkeypatch, capsys, tmp_path):
    """To a step of the largest model; the runs can be begun, and are drawn against what they cost."""
    growing = import_module("reproduce_growing")
    made = {}

    def run_all(runs: dict[str, list[str]], folder: Path) -> dict:
        for name, options in runs.items():
            made[name] = compose("train", RunConfig, CONF, options)
            last = made[name].training.max_steps
            lines = [{"step": step, "tokens": step, "validation/loss": 9.0 - step / last} for step in (last // 2, last)]
            lines += [{"step": each.step, "tokens": 1, "growth/parameters": 2} for each in made[name].growth]
            (folder / name).mkdir(parents=True)
            (folder / name / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return {name: {"perplexity": {"token": 100 + config.seed}} for name, config in made.items()}

    monkeypatch.setattr(growing, "run_all", run_all)
    monkeypatch.setattr(sys, "argv", ["reproduce_growing.py", "--steps", "40", "--folder", str(tmp_path / "study")])
    growing.main()
    assert list(made) == ["grown_seed0", "from_scratch_seed0", "grown_seed1", "from_scratch_seed1"]
    assert [list(growth.sizes.values()) for growth in made["grown_seed0"].growth] == [[4], [1024, 8, 256, 8]]
    rows = json.loads((tmp_path / "study" / "growing.json").read_text())["rows"]
    grown, scratch = (row["validation"][-1][0] for row in rows[:2])
    assert grown == pytest.approx(scratch, abs=rows[1]["flops_of_a_step"][0])
    assert [spent / scratch for spent, _ in rows[0]["growths"]] == pytest.approx([0.25, 0.5], abs=0.01)
    assert "| 100.50 ± 0.50 | 100.00, 101.00 |" in capsys.readouterr().out
    assert imread(tmp_path / "study" / "growing.png").std() > 0.02


class TestStudy:
    @pytest.fixture
    def study(self, grid) -> ModuleType:
        return import_module("study")

    @pytest.fixture
    def found(self) -> dict:
        levels = {"none": 3.0, "short_term": 2.5, "gibbs": 2.75, "cache_64": 2.5, "gibbs_behind_short_term": 2.25}
        rows = {
            name: {
                seed: study_results(level + seed, 0 if name == "none" else 64, name not in ("none", "short_term"))
                for seed in (0, 1)
            }
            for name, level in levels.items()
        }
        del rows["gibbs_behind_short_term"][1]
        return rows

    def test_a_row_may_not_be_called_as_an_opponent_is(self, study, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["study.py", "--model", "m", "--row", "short_term", "model/memory=none"])
        with pytest.raises(SystemExit):
            study.main()
        assert "--row short_term: an opponent of all rows is called so; choose another name" in capsys.readouterr().err

    def test_a_cache_holds_as_many_floats_as_the_memory_before_it(self, study):
        handed: dict[str, dict] = {}
        runs = []
        for name, options in study._plan({"gibbs": ["a"], "affine": ["b"], "fast_weight": ["c"]}, 32, handed):
            runs.append((name, options))
            handed[name] = study_results(1.0, 99 if name == "fast_weight" else 64)
        assert [name for name, _ in runs] == [
            "none", "short_term", "gibbs", "cache_64", "affine", "fast_weight", "cache_99",
            "gibbs_behind_short_term", "affine_behind_short_term", "fast_weight_behind_short_term",
        ]  # fmt: skip
        assert dict(runs)["cache_99"] == ["model/memory=cache", "model.memory.match_floats=99"]
        assert dict(runs)["affine_behind_short_term"] == ["b", "model.memory.short_term_length=32"]

    def test_three_differences_are_those_of_the_seeds_that_both_have(self, study, found):
        row = study.describe("gibbs", found)
        a_token = 20 / 30  # the second document's tokens cost half
        for against, difference in (("none", -0.25), ("cache", 0.25)):
            assert row[f"against_{against}"]["difference"]["nats_per_token"] == pytest.approx(difference * a_token)
        assert row["on_short_term"]["difference"]["nats_per_token"] == pytest.approx(-0.25 * a_token)
        assert row["perplexity"] == [27.5, 37.5]
        assert row["floats"] == 64
        none = study.describe("none", found)
        assert none["against_none"] is none["against_cache"] is none["on_short_term"] is None

    def test_the_table_has_a_line_for_each_row(self, study, found):
        first, second = study.format_table([study.describe(name, found) for name in found]).split("\n\n")[:2]
        assert [line.split(" | ")[0].strip("| ") for line in first.splitlines()[2:]] == list(found)
        gibbs = first.splitlines()[4]
        assert gibbs.startswith(f"| gibbs | 2 | {geometric_mean([27.5, 37.5]):.2f} ± 5.00 | -0.1667 (")
        assert gibbs.count("|") == first.splitlines()[0].count("|")
        assert gibbs.endswith("| 0.1250 |")
        assert "places 0 to 4 | places 4 to 16" in second
        assert {line.count("|") for line in second.splitlines()} == {second.splitlines()[0].count("|")}

    def test_baselines_are_rows_beside_the_model_without_memory(self, study, found):
        none = found["none"][0]
        better = study_results(2.0, 0, memory=False)
        settings = {"size": 8, "sharpness": 1.0, "weight": 0.5, "floats": 80}
        none["baselines"] = {"continuous_cache": {**better, "settings": settings}}
        ((name, row),) = study._baselines({"none": none})
        described = study.describe(name, {**found, name: {0: row}})
        assert described["against_none"]["difference"]["nats_per_token"] == pytest.approx(-20 / 30)
        assert described["floats"] == 80
        assert described["seconds_per_token"] is None

    def test_what_is_gained_is_drawn_beside_what_it_costs(self, study, found, tmp_path):
        rows = [study.describe(name, found) for name in found]
        (tmp_path / "study.json").write_text(json.dumps({"rows": rows}))
        (path,) = study.plot_study(tmp_path / "study.json")
        assert imread(path).std() > 0.05
        (tmp_path / "study.json").write_text(json.dumps({"rows": rows[:1]}))
        assert study.plot_study(tmp_path / "study.json") == []


class TestContext:
    @pytest.fixture
    def context(self, grid) -> ModuleType:
        return import_module("context")

    def test_each_segment_is_read_with_the_tokens_before_it(self, context, tmp_path):
        model = new_decoder(
            {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "feed_forward_size": 16}, None,
        )  # fmt: skip
        document = torch.randint(50, (40,), generator=torch.Generator().manual_seed(0))
        found = context.losses(model, document, 16, [0, 5])[5]
        assert len(found) == 39
        for start in (0, 16, 32):
            window = document[max(0, start - 5) : start + 17]
            with torch.no_grad():
                scores = model(window[None, :-1]).logits[0].log_softmax(-1)
            expected = -scores.gather(1, window[1:, None])[-len(window[1:]) + min(start, 5) :, 0]
            assert found[start : start + 16] == pytest.approx(expected.numpy(), rel=1e-4)

    def test_classes_are_by_place_and_by_the_last_occurrence(self, context):
        documents = [np.array([1, 2, 1, 3, 2, 1]), np.array([4, 4, 5, 6, 7, 7])]
        nats = {0: [np.arange(5.0), np.ones(5)], 8: [np.arange(5.0) - 1, np.ones(5) / 2]}
        first, second = context.describe(documents, nats, 4)
        told = {cell["name"]: (cell["tokens"], cell["nats_per_token"]) for cell in first["classes"]}
        assert told["all"] == (10, 1.5)
        assert told["places 0 to 4"] == (10, 1.5)
        assert told["nowhere before"] == (5, pytest.approx((0 + 2 + 3) / 5))
        assert told["last 1 to 64 tokens back"] == (5, pytest.approx((1 + 3 + 4 + 2) / 5))
        assert second["classes"][0]["difference"] == pytest.approx((-5 - 2.5) / 10)
        assert "| nowhere before | 5 |" in context.format_tables([first, second])


class TestNorms:
    @pytest.fixture
    def norms(self, grid) -> ModuleType:
        return import_module("reproduce_norms")

    @pytest.mark.parametrize("normalization", ["layer", "rms"])
    def test_dual_norms_are_held_to_their_two_identities(self, norms, normalization):
        found = norms.at_initialisation("dual", normalization, 3, 8, 1, None)
        assert found["identities"]["without_norm"] == 0
        assert 0 <= found["identities"]["sum"] < 1e-12
        after = norms.at_initialisation("post", normalization, 3, 8, 1, None)
        assert found["squares"] == pytest.approx(after["squares"])
        assert all(one != other for one, other in zip(found["gradients"], after["gradients"], strict=True))

    @pytest.mark.slow
    def test_norms_are_reproduced_from_the_command_line(self, norms, monkeypatch, capsys, tmp_path):
        command = [
            "--depths",
            "1",
            "2",
            "--width",
            "8",
            "--seeds",
            "2",
            "--trained-depths",
            "1",
            "--trained-width",
            "8",
        ]
        command += ["--steps", "8", "--warmups", "0", "4", "--folder", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["reproduce_norms.py", *command])
        norms.main()
        gradients, _, losses, *_ = capsys.readouterr().out.split("\n\n")
        assert [line.split(" | ")[0] for line in gradients.splitlines()[2::2]] == ["| post", "| pre", "| dual"]
        assert losses.splitlines()[0] == "| placement | norm | depth 1, no warm-up | depth 1, 4 steps of warm-up |"
        assert losses.count("(1 of 1 stuck)") == 6
        rows = json.loads((tmp_path / "norms.json").read_text())
        assert [len(row["gradients"]) for row in rows["initialisation"]] == [1, 2] * 6
        assert all(len(row["losses"]) == 8 for row in rows["training"])
        assert imread(tmp_path / "norms.png").std() > 0.05

        monkeypatch.setattr(norms, "plot_norms", lambda path: [path])
        for made in ("at_initialisation", "train"):
            monkeypatch.setattr(norms, made, None)
        norms.main()
        assert gradients in capsys.readouterr().out


class TestCapacity:
    @pytest.fixture
    def capacity(self, grid) -> ModuleType:
        return import_module("reproduce_capacity")

    @pytest.mark.parametrize("mechanism", ["softmax", "sum_elu", "sum_dpfp2", "delta_elu", "delta_dpfp1"])
    def test_what_is_found_is_what_writing_one_after_the_other_leaves(self, capacity, mechanism):
        keys, values, queries = (torch.randn(5, 64) for _ in range(3))
        strength = torch.randn(5)
        found = capacity.read(mechanism, keys, values, strength, queries)
        if mechanism == "softmax":
            expected = (queries @ keys.T / 8).exp()
            expected = expected / expected.sum(-1, keepdim=True) @ values
        else:
            config = capacity.config_of(mechanism)
            keys, queries = (capacity.features_of(each, config) for each in (keys, queries))
            weights, total = torch.zeros(64, keys.shape[1]), torch.zeros(keys.shape[1])
            for key, value, beta in zip(keys, values, strength.sigmoid(), strict=True):
                new = value if config.rule == "sum" else beta * (value - weights @ key)
                weights, total = weights + torch.outer(new, key), total + key
            expected = queries @ weights.T / ((queries @ total).unsqueeze(-1) if config.rule == "sum" else 1)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    def test_every_key_that_was_written_is_asked_for_its_last_value(self, capacity, monkeypatch):
        asked = []

        def read(mechanism, keys, values, strength, queries):
            asked.append((keys[:, 0].tolist(), values.argmax(-1).tolist(), queries[:, 0].tolist()))
            return torch.zeros(len(queries), 4)

        monkeypatch.setattr(capacity, "read", read)
        keys = torch.arange(4.0).unsqueeze(-1)
        chosen, values = torch.tensor([3, 1, 3, 3]), torch.tensor([0, 2, 1, 2])
        assert capacity.loss_of("softmax", keys, keys + 10, torch.zeros(4), chosen, values) == 0.5
        assert asked == [([3.0, 1.0, 3.0, 3.0], [0, 2, 1, 2], [11.0, 13.0])]
        answers = torch.nn.functional.one_hot(torch.tensor([2, 2]), 4).float()
        monkeypatch.setattr(capacity, "read", lambda *_: answers)
        assert capacity.loss_of("softmax", keys, keys, torch.zeros(4), chosen, values) == 0

    def test_capacity_is_reproduced_from_the_command_line(self, capacity, monkeypatch, capsys, tmp_path):
        command = ["--associations", "100", "4", "--mechanisms", "softmax", "sum_dpfp2", "delta_elu", "--steps", "2"]
        monkeypatch.setattr(sys, "argv", ["reproduce_capacity.py", *command, "--folder", str(tmp_path)])
        capacity.main()
        table = (tmp_path / "capacity.md").read_text()
        assert table in capsys.readouterr().out
        lines = table.splitlines()
        assert lines[0] == "| keys | mechanism | 4 | 100 |"
        assert [line.split(" | ")[1] for line in lines[2:10]] == [
            "softmax", "sum, dpfp2", "delta, elu", "softmax", "sum, dpfp2", "delta, elu", "*64 features at best*",
            "*256 features at best*",
        ]  # fmt: skip
        assert lines[3].endswith("(0.001) |")
        assert lines[8].endswith("| 0.000 | 0.180 |")
        assert imread(tmp_path / "capacity.png").std() > 0.05

        monkeypatch.setattr(capacity, "plot_capacity", lambda path: [path])
        monkeypatch.setattr(capacity, "train", None)
        capacity.main()
        assert table in capsys.readouterr().out

    @pytest.mark.parametrize("mechanism", ["mean_elu", "sum", "delta_dpfp0", "sum_dpfpx"])
    def test_a_mechanism_that_there_is_not_is_refused(self, capacity, monkeypatch, mechanism):
        monkeypatch.setattr(sys, "argv", ["reproduce_capacity.py", "--mechanisms", mechanism])
        with pytest.raises(UserError, match=f"--mechanisms {mechanism}: name a rule and features"):
            capacity.main()


def test_a_model_without_memory_remembers_no_vectors(from_scratch, tmp_path):
    (tmp_path / "config.yaml").write_text("model: {memory: null}")
    sizes = {"backbone_parameters": 5, "memory_parameters": 2}
    results = {"sizes": sizes, "perplexity": {"token": 2.0, "word": 3.0}, "controls": {}}
    described = from_scratch.describe(tmp_path, results)
    assert described == {"parameters": 7, "vectors": 0, "per_token": 2.0, "per_word": 3.0}


def call(script: str, *arguments: str) -> str:
    """What a script prints, as a user starts it."""
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_sorting_is_reproduced_from_the_command_line(tmp_path):
    """Two memories; called again, it draws the same table and figure, and makes no run."""
    options = ["--folder", str(tmp_path), "--memories", "short_term", "long_term", "--seeds", "3", "--"]
    options += ["task.length=20", "task.training_lengths=[]", "task.evaluation_lengths=[40]", "task.test_sequences=3"]
    options += ["task.validation_sequences=2", "training.segment_length=16", "training.batch_size=2"]
    options += ["training.max_steps=2", "model.architecture.hidden_size=16"]
    printed = call("reproduce_sorting.py", *options)
    assert [line.split(":")[0] for line in printed.splitlines() if line.startswith("==")] == [
        "== short_term_seed3",
        "== long_term_seed3",
    ]
    table = (tmp_path / "accuracy.md").read_text()
    assert table in printed
    assert [line.split("|")[1].strip() for line in table.splitlines()[:4]] == [
        "memory",
        "---",
        "short_term",
        "long_term",
    ]
    rows = json.loads((tmp_path / "accuracy.json").read_text())
    assert [(row["memory"], row["seed"], row["length"]) for row in rows] == [
        (memory, 3, length) for memory in ("short_term", "long_term") for length in (20, 40)
    ]
    assert imread(tmp_path / "accuracy_by_length.png").std() > 0.05

    results = tmp_path / "short_term_seed3" / "results.json"
    before = results.stat().st_mtime_ns
    again = call("reproduce_sorting.py", *options)
    assert "==" not in again
    assert table in again
    assert results.stat().st_mtime_ns == before


@pytest.mark.slow
def test_language_models_are_reproduced_from_the_command_line(tmp_path, texts, token_cache):
    experiments = ["wt103_compressive_small", "wt103_infformer_sticky_small"]
    options = ["--folder", str(tmp_path), "--experiments", *experiments, "--seeds", "0", "--", "data.source=files"]
    options += [f"data.{split}={texts}/{split}.jsonl" for split in ("train", "validation", "test")]
    options += [f"data.cache_dir={token_cache}", "data.articles=false", "model.architecture.adaptive_cutoffs=[5,10]"]
    options += ["training.max_steps=2", "training.batch_size=2"]
    printed = call("reproduce_from_scratch.py", *options)
    table = (tmp_path / "perplexity.md").read_text()
    assert table in printed
    rows = json.loads((tmp_path / "perplexity.json").read_text())
    assert [row["experiment"] for row in rows] == experiments
    for row in rows:
        results = json.loads((tmp_path / f"{row['experiment']}_seed0" / "results.json").read_text())
        assert row["vectors"] == 128
        assert row["per_token"] == results["perplexity"]["token"]
        assert row["per_word"] == results["perplexity"]["word"]
        for control, figures in results["controls"].items():
            assert row[control] == figures["perplexity"]["token"]
        assert f"| {row['experiment']} | {row['parameters']:,} | 128 | {row['per_token']:.2f} |" in table
    assert "==" not in call("reproduce_from_scratch.py", *options)


def test_classifiers_are_made_anew_upon_another_second_stage(grid, monkeypatch, tmp_path, capsys):
    script = import_module("reproduce_fine_tuning")
    monkeypatch.setattr(script, "format_table", lambda found: "")
    monkeypatch.setattr(script, "ROWS", {name: script.ROWS[name] for name in ("three stages", script.SCRATCH)})
    texts = [f"--{split}={split}.jsonl" for split in ("train", "validation", "test")]

    def started(*options: str) -> list[str]:
        (tmp_path / "started").unlink(missing_ok=True)
        monkeypatch.setattr(sys, "argv", ["", *texts, f"--folder={tmp_path}", "--seeds=0", *options])
        script.main()
        return (tmp_path / "started").read_text().split()

    assert started() == ["task_none_60", "three_stages_seed0", "from_scratch_as_many_tokens_seed0"]
    assert started("--task-steps=90") == ["task_none_90", "three_stages_seed0", "from_scratch_as_many_tokens_seed0"]


@pytest.mark.parametrize("name", ["study", "reproduce_from_scratch", "reproduce_growing", "reproduce_long_range_arena"])
def test_runs_that_would_measure_nothing_are_refused_before_the_first(grid, monkeypatch, tmp_path, name):
    script = import_module(name)
    model = ["--model", "none"] if name == "study" else []
    monkeypatch.setattr(sys, "argv", ["", *model, "--folder", str(tmp_path / "runs"), "--", "data.test=null"])
    with pytest.raises(SystemExit, match=r"error: data\.test=null: the table is of what runs measure at their end"):
        script.main()
    assert not (tmp_path / "runs").exists()
