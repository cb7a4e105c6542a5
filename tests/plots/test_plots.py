"""Figures from results files: drawn where data is, left out where it is not, on what a run in trouble leaves too."""

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from infformer.plots import plot_results, plot_run


def write_metrics(directory, steps=200):
    """A run's metrics with a step whose loss was not finite, validation lines of their own, and a last line cut off."""
    lines = []
    for step in range(1, steps + 1):
        tokens = 4096 * step
        record = {
            "step": step,
            "tokens": tokens,
            "train/loss": None if step == steps // 2 else 3.2 + math.exp(-step / 40) + 0.05 * math.sin(step),
            "train/learning_rate": 5e-5 * (1 - step / steps),
            "train/memory_learning_rate": 2.5e-4 * (1 - step / steps),
            "train/gradient_norm": 1.5 + math.cos(step),
            "train/tokens_per_second": 5200 + 150 * math.sin(step / 3),
            "train/divergence": 1e-6 * (2 + math.sin(step / 30)),
        }
        lines.append(json.dumps(record))
        if step % 50 == 0:
            loss = 3.3 + math.exp(-step / 50)
            validation = {"validation/loss": loss, "validation/perplexity": math.exp(loss)}
            lines.append(json.dumps({"step": step, "tokens": tokens, **validation}))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 201, "tok')


def results(loss: float, slope: float, documents: int = 12) -> dict:
    edges = [0, *[2**power for power in range(6, 18)]]
    return {
        "tokens": edges[-1],
        "by_position": [
            {"from": start, "to": end, "tokens": end - start, "nll": (end - start) * (loss - slope * math.log2(end))}
            for start, end in itertools.pairwise(edges)
        ],
        "by_recency": [
            {"previous_occurrence": name, "tokens": 1000 * (n + 1), "nll": 1000 * (n + 1) * (loss + n)}
            for n, name in enumerate(("within_window", "beyond_window", "never"))
        ],
        "per_document": [
            {
                "id": f"The Book of {n}",
                "tokens": 9000,
                "words": 7000,
                "bytes": 40000,
                "nll": 9000 * (loss + n % 5 * slope),
            }
            for n in range(documents)
        ],
    }


def write_results(directory, documents):
    directory.mkdir(parents=True, exist_ok=True)
    controls = {
        "memory_off": results(3.9, 0.03, documents),
        "memory_of_another_document": results(3.88, 0.035, documents),
        "memory_shuffled_in_time": results(3.87, 0.04, documents),
    }
    path = directory / "results.json"
    path.write_text(json.dumps({**results(3.86, 0.045, documents), "controls": controls}))
    return path


def test_a_run_is_drawn_beside_its_metrics(tmp_path):
    write_metrics(tmp_path)
    (path,) = plot_run(tmp_path)
    assert path == tmp_path / "plots" / "training.png"
    assert imread(path).std() > 0.05


@pytest.mark.parametrize(
    ("metric", "title"), [("perplexity", "Validation perplexity"), ("accuracy", "Validation accuracy")]
)
def test_what_a_task_validates_by_has_a_panel_and_what_is_not_there_has_none(drawn, metric, title):
    lines = [
        {"step": 1, "tokens": 512, "train/loss": 3.0},
        *({"step": step, "tokens": 512 * step, f"validation/{metric}": 0.2 * step} for step in (2, 4)),
    ]
    content = "".join(f"{json.dumps(line)}\n" for line in lines)
    figure = drawn(lambda path: plot_run(path.parent), content, "metrics.jsonl")["training"]
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert panels.keys() == {"Loss", title}
    (curve,) = panels[title].lines
    assert curve.get_xydata() == pytest.approx(np.array([[1024, 0.4], [2048, 0.8]]))


def test_a_run_without_metrics_has_no_figure(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert plot_run(tmp_path) == []


@pytest.mark.parametrize("documents", [1, 200])
def test_an_evaluation_with_controls_has_all_figures(tmp_path, documents):
    figures = plot_results(write_results(tmp_path, documents))
    assert [path.name for path in figures] == [
        "loss_by_position.png",
        "gain_by_recency.png",
        "gain_by_document.png",
    ]
    assert all(imread(path).std() > 0.05 for path in figures)


def test_an_evaluation_without_controls_has_the_positions_alone(drawn):
    assert list(drawn(plot_results, results(3.9, 0.03))) == ["loss_by_position"]


def test_no_global_state_of_matplotlib_is_touched():
    program = "import sys, infformer.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
