"""The numbers of results files, read back from what is drawn of them: no line has another sign, scale, place or name.

Files hold few numbers, all different, so that none can stand for another.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from infformer.plots import memory
from infformer.plots.benchmark import plot_context, plot_parts
from infformer.plots.capacity import plot_capacity
from infformer.plots.comparison import plot_comparison
from infformer.plots.evaluation import plot_results
from infformer.plots.memory import plot_inspection
from infformer.plots.norms import plot_norms
from infformer.plots.run import plot_run
from infformer.plots.sorting import plot_accuracy, plot_accuracy_by_length
from infformer.plots.style import BLUE, GREEN, GREY, ORANGE
from infformer.plots.sweep import plot_sweep

Points = dict[str, list[list[float]]]


def lines_of(axes: Axes) -> Points:
    """The points of each line that has a name, [[x, …], [y, …]]."""
    named = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    return {
        str(line.get_label()): [np.asarray(each, dtype=float).tolist() for each in line.get_data()] for line in named
    }


def assert_lines(axes: Axes, expected: Points) -> None:
    """They are drawn, in this order, and no others."""
    found = lines_of(axes)
    assert list(found) == list(expected)
    for name, points in expected.items():
        assert np.array(found[name]) == pytest.approx(np.array(points), nan_ok=True), name


def words(axes: Axes) -> tuple[str, str, str]:
    """Title and what the axes are, with their units."""
    return axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()


def ticks(axes: Axes, which: str) -> list[str]:
    return [text.get_text() for text in getattr(axes, f"get_{which}ticklabels")()]


def plot_run_of(metrics: Path) -> list[Path]:
    return plot_run(metrics.parent)


def as_lines(lines: Iterable[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(line)}\n" for line in lines)


INSPECTED = {
    "reconstruction",
    "losses",
    "contribution",
    "density_centres",
    "density_tokens_back",
    "density_widths",
    "sticky_samples",
}
RUN = (
    {
        "step": 1,
        "tokens": 100,
        "train/loss": 4.5,
        "train/learning_rate": 0.01,
        "train/memory_learning_rate": 0.05,
        "train/gradient_norm": 2.0,
        "train/divergence": 0.125,
        "train/tokens_per_second": 700.0,
    },
    {"step": 1, "tokens": 100, "validation/loss": 4.25, "validation/perplexity": 70.0, "validation/accuracy": 0.3},
    {
        "step": 2,
        "tokens": 300,
        "train/loss": None,
        "train/learning_rate": 0.02,
        "train/memory_learning_rate": 0.06,
        "train/gradient_norm": 3.0,
        "train/divergence": 0.25,
        "train/tokens_per_second": 800.0,
    },
    {"step": 2, "tokens": 300, "validation/loss": 3.75, "validation/perplexity": 42.0, "validation/accuracy": 0.4},
)
"""Of which one loss was not finite."""


def situation(nats: list[float], recency: list[float], positions: list[float]) -> dict[str, Any]:
    """Figures of three documents, of which one has no tokens: nats of the documents, by recency and by position."""
    return {
        "per_document": [
            {"id": name, "tokens": tokens, "nll": nll}
            for name, tokens, nll in zip(("one", "two", "none"), (10, 20, 0), nats, strict=True)
        ],
        "by_recency": [
            {"previous_occurrence": name, "tokens": tokens, "nll": nll}
            for name, tokens, nll in zip(
                ("within_window", "beyond_window", "never"), (5, 1500, 0), recency, strict=True
            )
        ],
        "by_position": [
            {"from": first, "to": last, "tokens": tokens, "nll": nll}
            for (first, last), tokens, nll in zip(
                ((0, 64), (64, 128), (128, 256)), (128, 32, 0), positions, strict=True
            )
        ],
    }


def control(
    nats: list[float], recency: list[float], positions: list[float], differs: tuple[float, float, float]
) -> dict[str, Any]:
    value, low, high = differs
    return {**situation(nats, recency, positions), "difference": {"nats_per_token": value, "interval": [low, high]}}


EVALUATION: dict[str, Any] = {
    **situation([30.0, 50.0, 0.0], [10.0, 3000.0, 0.0], [256.0, 96.0, 0.0]),
    "controls": {
        "memory_off": control([31, 48, 0], [11, 3600, 0], [320, 128, 0], (0.125, 0.0625, 0.25)),
        "memory_of_another_document": control([33, 54, 0], [12, 4200, 0], [384, 160, 0], (0.5, -0.25, 0.75)),
        "memory_shuffled_in_time": control([30.5, 51, 0], [9, 3150, 0], [288, 112, 0], (0.25, -0.125, 0.375)),
    },
}


def evaluation_of(count: int) -> dict[str, Any]:
    """The same of so many documents."""

    def of(figures: dict[str, Any]) -> dict[str, Any]:
        documents = [{**figures["per_document"][n % 2], "id": f"document {n}"} for n in range(count)]
        return {**figures, "per_document": documents}

    return {**of(EVALUATION), "controls": {name: of(control) for name, control in EVALUATION["controls"].items()}}


def row(value: float | None, low: float = 0.0, high: float = 0.0) -> dict[str, Any]:
    return {"tokens": 10, "nats_per_token": value, "interval": None if value is None else [low, high]}


COMPARISON: dict[str, Any] = {
    "a": {"checkpoint": "control"},
    "b": {"checkpoint": "sticky"},
    "protocol": "disjoint segments of 64, float32",
    "difference": row(-0.5, -0.75, -0.25),
    "parts": {
        "specific": row(-0.625, -0.65, -0.6),
        "presence": row(0.03125, -0.01, 0.04),
        "without_memory": row(0.09375, 0.08, 0.1),
    },
    "by_position": [
        {"from": 0, "to": 64, **row(0.25, -0.125, 0.5)},
        {"from": 64, "to": 2048, **row(None)},
        {"from": 2048, "to": 4096, **row(-1.5, -2.0, -1.0)},
    ],
    "by_recency": [
        {"previous_occurrence": "within_window", **row(0.375, 0.3, 0.4)},
        {"previous_occurrence": "beyond_window", **row(-0.875, -0.9, -0.8)},
        {"previous_occurrence": "never", **row(0.0625, 0.0, 0.1)},
    ],
    "per_document": [
        {"id": name, "nats_per_token": value} for name, value in zip("abc", (0.25, -0.75, -0.5), strict=True)
    ],
}


def heads(start: float, step: float) -> list[list[list[float]]]:
    """[segments][layers][heads], all different."""
    return [[[start + step * (4 * s + 2 * layer + h) for h in range(2)] for layer in range(2)] for s in range(2)]


INSPECTION: dict[str, Any] = {
    "memory": {
        "kind": "long_term",
        "segment_length": 8,
        "basis_functions": 16,
        "layers": [1, 4],
        "sticky": True,
        "read": "affine",
        "contraction": "constant",
        "contraction_rate": 0.5,
    },
    "reading": {
        "segment": [1, 2],
        "tokens": [8, 2],
        "centre": heads(0.1, 0.1),
        "centre_spread": heads(0.01, 0.01),
        "width": heads(0.3, 0.05),
        "width_spread": heads(0.02, 0.5),
        "tokens_back": heads(3, 1),
        "contribution": [[0.25, 0.5], [0.75, 1.0]],
        "nats": [3.0, 2.0],
        "nats_without_layer": [[3.5, None], [None, 3.0]],
        "nats_without_memory": [4.0, 2.5],
    },
    "costs": {
        "without_memory": {"nats_per_token": 0.9, "interval": [0.5, 1.25]},
        "without_layer": [
            {"nats_per_token": 0.45, "interval": [0.25, 0.75]},
            {"nats_per_token": -0.125, "interval": None},
        ],
    },
    "document": {"tokens": 18, "segments": 3, "nats": 2.5},
    "stretches": [],
    "writing": {
        "segment": [1, 2],
        "sampled_places": [
            [[0.5, 0.25, 0.25, 0.0], [0.125, 0.125, 0.5, 0.25]],
            [[0.0, 0.0, 0.25, 0.75], [1, 0, 0, 0]],
        ],
    },
    "reconstruction": [
        {"segments": 1, "tokens_back": [4.5], "best": [0.95, 0.99], "total": [0.5, 0.75], "by_age": [[0.4], [0.6]]},
        {
            "segments": 3,
            "tokens_back": [4.5, 12.5, 20.5],
            "best": [0.625, None],
            "total": [0.25, None],
            "by_age": [[0.9, 0.7, None], [0.8, 0.3, -0.2]],
        },
    ],
}


def curves(start: float) -> dict[str, list[float]]:
    return {
        "accuracy_by_position": [start, start + 0.01],
        "accuracy_free_running_by_position": [start + 0.02, start + 0.03],
    }


COUNTERS = ("last_2048", "last_half", "noise_3_percent", "noise_1_percent", "chance")
SORTING = {
    "lengths": [
        {
            "length": length,
            **curves(base),
            "ideal_counters": {name: curves(base + 0.04 * n) for n, name in enumerate(COUNTERS, start=1)},
        }
        for length, base in ((1000, 0.1), (20000, 0.5))
    ]
}


def of_layers(count: int, heads: int = 9, segments: int = 7) -> dict[str, Any]:
    """An inspection of so many layers, made of random numbers; widths that hardly differ."""
    random = np.random.default_rng(0)

    def numbers(*shape: int, low: float = 0.0, high: float = 1.0) -> list[Any]:
        return random.uniform(low, high, shape).tolist()

    shape = (segments, count, heads)
    reading = {
        **INSPECTION["reading"],
        "segment": list(range(1, segments + 1)),
        "tokens": [256] * segments,
        "centre": numbers(*shape),
        "centre_spread": numbers(*shape, high=0.1),
        "width": numbers(*shape, low=0.831, high=0.834),
        "width_spread": numbers(*shape, high=0.01),
        "tokens_back": numbers(*shape, low=300, high=1500),
        "contribution": numbers(segments, count),
        "nats": [3.0] * segments,
        "nats_without_memory": numbers(segments, low=2.999, high=3.001),
    }
    costs = {
        "without_memory": {"nats_per_token": 0.0001, "interval": [-0.0002, 0.0003]},
        "without_layer": [
            {"nats_per_token": value, "interval": [value - 0.002, value + 0.001]}
            for value in numbers(count, low=-0.001, high=0.002)
        ],
    }
    ages = [128 + 256.0 * age for age in range(segments)]
    measured = {"segments": segments, "tokens_back": ages, "best": numbers(count, low=0.9), "total": numbers(count)}
    return {
        **INSPECTION,
        "memory": {**INSPECTION["memory"], "segment_length": 256, "layers": list(range(count))},
        "reading": reading,
        "costs": costs,
        "writing": {"segment": [1, 2], "sampled_places": random.dirichlet([1] * 8, (2, count)).tolist()},
        "reconstruction": [
            {**INSPECTION["reconstruction"][0], "best": numbers(count), "total": numbers(count)},
            {**measured, "by_age": numbers(count, segments, low=-0.3)},
        ],
    }


PICTURES = {
    "a run that was cut off": (
        plot_run_of,
        "metrics.jsonl",
        as_lines(RUN) + '{"step": 3, "tok',
        ["plots/training.png"],
    ),
    "an evaluation of many documents": (
        plot_results,
        "results.json",
        evaluation_of(50),
        [f"plots/{name}.png" for name in ("loss_by_position", "gain_by_recency", "gain_by_document")],
    ),
    "a comparison": (plot_comparison, "comparison.json", COMPARISON, ["comparison.png"]),
    "an inspection": (plot_inspection, "inspection.json", of_layers(1, heads=1), [f"{name}.png" for name in INSPECTED]),
    "sorting": (plot_accuracy, "results.json", SORTING, ["plots/accuracy_by_position.png"]),
}


@pytest.mark.parametrize(("plot", "name", "content", "expected"), PICTURES.values(), ids=PICTURES)
def test_every_figure_becomes_a_picture_beside_its_file(tmp_path, plot, name, content, expected):
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    figures = plot(tmp_path / name)
    assert sorted(figure.relative_to(tmp_path).as_posix() for figure in figures) == sorted(expected)
    for figure in figures:
        picture = imread(figure)[..., :3]
        assert picture.std() > 0.05
        assert min(picture.shape[:2]) > 300


def test_no_global_state_of_matplotlib_is_touched():
    program = "import sys, infformer.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


class TestARun:
    def test_a_run_without_metrics_has_no_figure(self, drawn):
        assert drawn(plot_run_of, "", "metrics.jsonl") == {}

    @pytest.mark.parametrize(
        ("metric", "title"), [("perplexity", "Validation perplexity"), ("accuracy", "Validation accuracy")]
    )
    def test_what_a_task_validates_by_has_a_panel_and_what_is_not_there_has_none(self, drawn, metric, title):
        lines = [
            {"step": 1, "tokens": 512, "train/loss": 3.0},
            *({"step": step, "tokens": 512 * step, f"validation/{metric}": 0.2 * step} for step in (2, 4)),
        ]
        figure = drawn(plot_run_of, as_lines(lines), "metrics.jsonl")["training"]
        panels = {words(axes)[0]: axes for axes in figure.axes}
        assert panels.keys() == {"Loss", title}
        (curve,) = panels[title].lines
        assert curve.get_xydata() == pytest.approx(np.array([[1024, 0.4], [2048, 0.8]]))

    def test_a_line_stands_where_the_model_has_grown(self, drawn):
        """In the panel of the loss, dotted, and named once."""
        growths = [{"step": step, "tokens": 100 * step, "growth/parameters": step} for step in (1, 2)]
        figure = drawn(plot_run_of, as_lines([*RUN, *growths]), "metrics.jsonl")["training"]
        loss, *others = figure.axes
        upright = [line for line in loss.lines if line.get_linestyle() == ":"]
        assert [list(line.get_xdata()) for line in upright] == [[100, 100], [200, 200]]
        assert [text.get_text() for text in loss.get_legend().get_texts()] == [
            "training",
            "validation",
            "the model grows",
        ]
        assert not any(line.get_linestyle() == ":" for axes in others for line in axes.lines)

    def test_every_metric_is_against_the_tokens_read(self, drawn):
        figure = drawn(plot_run_of, as_lines(RUN), "metrics.jsonl")["training"]
        panels = {words(axes)[0]: axes for axes in figure.axes}
        expected: dict[str, tuple[str, Points]] = {
            "Loss": (
                "nats per token",
                {"training": [[100, 300], [4.5, math.nan]], "validation": [[100, 300], [4.25, 3.75]]},
            ),
            "Validation perplexity": ("per token", {"validation": [[100, 300], [70, 42]]}),
            "Validation accuracy": ("share of the answers", {"validation": [[100, 300], [0.3, 0.4]]}),
            "Learning rate": (
                "step size",
                {"backbone": [[100, 300], [0.01, 0.02]], "memory": [[100, 300], [0.05, 0.06]]},
            ),
            "Gradient norm": ("before clipping", {"all parameters": [[100, 300], [2, 3]]}),
            "Divergence of the densities": ("nats, times its weight", {"all layers": [[100, 300], [0.125, 0.25]]}),
            "Speed": ("tokens per second", {"all processes": [[100, 300], [700, 800]]}),
        }
        assert list(panels) == list(expected)
        for title, (unit, lines) in expected.items():
            assert words(panels[title]) == (title, "tokens read", unit)
            assert panels[title].get_yscale() == ("log" if title == "Gradient norm" else "linear")
            assert_lines(panels[title], lines)
        names = [text.get_text() for text in panels["Loss"].get_legend().get_texts()]
        assert names == ["training", "validation"]
        colours = {line.get_label(): line.get_color() for line in panels["Learning rate"].lines}
        assert colours == {"backbone": BLUE, "memory": GREEN}


class TestAnEvaluation:
    NAMES = ("memory off", "memory of another document", "memory shuffled in time")
    COLOURS = (GREY, ORANGE, GREEN)

    @pytest.fixture(scope="class")
    @classmethod
    def figures(cls, drawn) -> dict[str, Figure]:
        figures = drawn(plot_results, EVALUATION)
        assert list(figures) == ["loss_by_position", "gain_by_recency", "gain_by_document"]
        return figures

    def test_an_evaluation_without_controls_has_the_positions_alone(self, drawn):
        assert list(drawn(plot_results, {**EVALUATION, "controls": {}})) == ["loss_by_position"]

    def test_an_evaluation_of_one_document_has_all_figures(self, drawn):
        assert list(drawn(plot_results, evaluation_of(1))) == [
            "loss_by_position",
            "gain_by_recency",
            "gain_by_document",
        ]

    def test_loss_is_per_token_in_the_middle_of_each_stretch(self, figures):
        (axes,) = figures["loss_by_position"].axes
        middles = [math.sqrt(1 * 64), math.sqrt(65 * 128)]
        losses = ([2, 3], [2.5, 4], [3, 5], [2.25, 3.5])
        names = ("memory", *self.NAMES)
        assert_lines(axes, {name: [middles, loss] for name, loss in zip(names, losses, strict=True)})
        assert [line.get_color() for line in axes.lines] == [BLUE, *self.COLOURS]
        assert axes.get_xscale() == "log"
        assert axes.get_yscale() == "linear"
        assert words(axes) == ("Loss by position", "distance from the document's start (tokens)", "nats per token")
        (legend,) = figures["loss_by_position"].legends
        assert [text.get_text() for text in legend.get_texts()] == list(names)

    def test_gain_by_recency_is_what_a_token_costs_more_under_the_control(self, figures):
        (axes,) = figures["gain_by_recency"].axes
        heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
        assert heights == {
            "memory off": pytest.approx([0.2, 0.4, 0.125]),
            "memory of another document": pytest.approx([0.4, 0.8, 0.5]),
            "memory shuffled in time": pytest.approx([-0.2, 0.1, 0.25]),
        }
        assert list(heights) == list(self.NAMES)
        places = [[bar.get_center()[0] for bar in bars] for bars in axes.containers]
        side = 0.8 / 3
        assert places == pytest.approx(np.array([[-side, 1 - side, 2 - side], [0, 1, 2], [side, 1 + side, 2 + side]]))
        intervals = [line.get_segments()[0] for line in axes.collections if isinstance(line, LineCollection)]
        expected = [[[2 - side, 0.0625], [2 - side, 0.25]], [[2, -0.25], [2, 0.75]]]
        expected.append([[2 + side, -0.125], [2 + side, 0.375]])
        assert np.array(intervals) == pytest.approx(np.array(expected))
        assert [to_hex(bars[0].get_facecolor()).upper() for bars in axes.containers] == list(self.COLOURS)
        assert len({bars[0].get_hatch() for bars in axes.containers}) == 3  # to be told apart in grey
        assert ticks(axes, "x") == [
            "within the window\n5 tokens\n2.00 nats each",
            "before the window\n1,500 tokens\n2.00 nats each",
            "all, with 95 % over documents\n1,505 tokens\n2.00 nats each",
        ]
        assert words(axes)[1:] == ("", "rise under the control (nats per token)")

    def test_gain_by_document_is_how_much_its_perplexity_rises(self, figures):
        """In the order of the first control, under which the second document reads better."""
        (axes,) = figures["gain_by_document"].axes

        def rise(*nats: float) -> list[float]:
            return [100 * math.expm1(each) for each in nats]

        assert_lines(
            axes,
            {
                "memory off": [rise(-2 / 20, 1 / 10), [1, 2]],
                "memory of another document": [rise(4 / 20, 3 / 10), [1, 2]],
                "memory shuffled in time": [rise(1 / 20, 0.5 / 10), [1, 2]],
            },
        )
        assert ticks(axes, "y") == ["all, with 95 %", "two", "one"]
        intervals = [line.get_segments()[0] for line in axes.collections if isinstance(line, LineCollection)]
        bounds = [rise(0.0625, 0.25), rise(-0.25, 0.75), rise(-0.125, 0.375)]
        assert [line[:, 0].tolist() for line in intervals] == [pytest.approx(bound) for bound in bounds]
        assert not axes.yaxis_inverted()
        assert words(axes)[1:] == ("rise of perplexity under the control (%)", "")


class TestAComparison:
    @pytest.fixture(scope="class")
    @classmethod
    def panels(cls, drawn) -> list[Axes]:
        figure = drawn(plot_comparison, COMPARISON)["comparison"]
        assert figure.get_suptitle() == "A: control\nB: sticky\ndisjoint segments of 64, float32"
        return figure.axes

    def test_each_class_has_its_difference_and_its_interval(self, panels):
        axes = panels[0]
        intervals, values = {}, {}
        for line in axes.lines:
            x, y = (np.asarray(each).tolist() for each in line.get_data())
            if line.get_marker() == "o":
                values[y[0]] = x[0]
            elif y != [0, 1]:  # the vertical at no difference
                intervals[y[0]] = x
        assert ticks(axes, "y") == [
            "all tokens",
            "specific to the document",
            "presence of a memory",
            "with memories off",
            "tokens 0 – 64",
            "tokens 2,048 – 4,096",
            "occurred within the window",
            "occurred before the window",
            "did not occur before",
        ]
        assert values == dict(enumerate([-0.5, -0.625, 0.03125, 0.09375, 0.25, -1.5, 0.375, -0.875, 0.0625]))
        bounds = [(-0.75, -0.25), (-0.65, -0.6), (-0.01, 0.04), (0.08, 0.1), (-0.125, 0.5), (-2.0, -1.0)]
        bounds += [(0.3, 0.4), (-0.9, -0.8), (0.0, 0.1)]
        assert intervals == dict(enumerate(map(list, bounds)))
        assert axes.yaxis_inverted()
        assert axes.get_xlabel() == "nats per token, B less A (below 0: B is better)"

    def test_documents_stand_in_the_order_of_their_differences(self, panels):
        axes = panels[1]
        points = next(each for each in axes.collections if isinstance(each, PathCollection))
        assert points.get_offsets().tolist() == [[1, -0.75], [2, -0.5], [3, 0.25]]
        assert [to_hex(colour).upper() for colour in points.get_facecolors()] == [BLUE, BLUE, ORANGE]
        stems = next(each for each in axes.collections if isinstance(each, LineCollection))
        ends = [segment.tolist() for segment in stems.get_segments()]
        assert ends == [[[1, 0], [1, -0.75]], [[2, 0], [2, -0.5]], [[3, 0], [3, 0.25]]]
        assert words(axes) == (
            "By document: B is better on 2 of 3",
            "documents, in the order of the difference",
            "nats per token, B less A",
        )


class TestAnInspection:
    """Two layers, numbered 1 and 4, two heads, three segments of which two found something in memory."""

    def test_a_memory_that_is_not_sticky_has_no_samples_and_layers_fill_rows(self, drawn, monkeypatch):
        monkeypatch.setattr(memory, "COLUMNS", 1)  # two layers are two rows
        figures = drawn(plot_inspection, {**INSPECTION, "writing": {}}, "inspection.json")
        assert figures.keys() == INSPECTED - {"sticky_samples"}
        rows = [axes.get_subplotspec().rowspan.start for axes in figures["density_widths"].axes]
        assert rows == [0, 1]

    @pytest.fixture(scope="class")
    @classmethod
    def figures(cls, drawn) -> dict[str, Figure]:
        return drawn(plot_inspection, INSPECTION, "inspection.json")

    def test_reconstruction_by_age_is_that_after_the_last_write(self, figures):
        axes, _ = figures["reconstruction"].axes
        ages = [4.5, 12.5, 20.5]
        assert_lines(axes, {"layer 1": [ages, [0.9, 0.7, math.nan]], "layer 4": [ages, [0.8, 0.3, -0.2]]})
        assert [line for line in axes.lines if line.get_linestyle() == "--"] == []
        assert axes.get_xscale() == "log"
        assert axes.get_xlim() == pytest.approx((4.5 / 1.3, 20.5 * 1.3))
        assert axes.get_ylim()[1] == 1.02
        assert words(axes) == ("What is left after 24 tokens", "age (tokens back)", "R² of a segment's hidden states")

    def test_reconstruction_of_all_is_against_what_was_written(self, figures):
        _, axes = figures["reconstruction"].axes
        assert_lines(axes, {"layer 1": [[8, 24], [0.5, 0.25]], "layer 4": [[8, 24], [0.75, math.nan]]})
        best = [line.get_ydata() for line in axes.lines if line.get_linestyle() == "--"]
        assert np.array(best) == pytest.approx(np.array([[0.95, 0.625], [0.99, math.nan]]), nan_ok=True)
        (legend,) = figures["reconstruction"].legends
        assert legend.get_texts()[-1].get_text() == "best fit of as many coefficients"
        assert axes.get_xscale() == "log"
        assert axes.get_xlim() == pytest.approx((8 / 1.3, 24 * 1.3))
        assert words(axes)[1:] == ("tokens written", "R² of all hidden states")

    def test_a_layer_costs_what_is_lost_without_it_over_all_tokens(self, figures):
        axes, _ = figures["losses"].axes
        (bars,) = axes.containers
        costs = [0.45, -0.125, 0.9]
        assert [bar.get_height() for bar in bars] == costs
        (intervals,) = [line for line in axes.collections if isinstance(line, LineCollection)]
        assert np.array(intervals.get_segments()).tolist() == [[[0, 0.25], [0, 0.75]], [[2, 0.5], [2, 1.25]]]
        assert ticks(axes, "x") == ["1", "4", "all"]
        assert [text.get_text() for text in axes.texts] == [f"{cost:+.4f}" for cost in costs]
        assert [to_hex(bar.get_facecolor()).upper() for bar in bars] == [BLUE, BLUE, ORANGE]
        assert words(axes) == ("Loss without a memory", "layer whose memory is empty", "more nats per token")

    def test_along_the_document_it_is_what_each_segment_costs_more_without_any(self, figures):
        _, axes = figures["losses"].axes
        (gains,) = [line for line in axes.lines if line.get_marker() == "o"]
        assert [each.tolist() for each in map(np.asarray, gains.get_data())] == [[8, 16], [1.0, 0.5]]
        (mean,) = [line for line in axes.lines if line.get_label() == "mean"]
        assert mean.get_ydata()[0] == pytest.approx(0.9)
        (span,) = axes.patches
        assert (span.get_y(), span.get_y() + span.get_height()) == (0.5, 1.25)
        assert words(axes) == ("Without any, along the document", "tokens read", "more nats per token")

    def test_each_layer_has_its_contribution(self, figures):
        (axes,) = figures["contribution"].axes
        assert_lines(axes, {"layer 1": [[8, 16], [0.25, 0.75]], "layer 4": [[8, 16], [0.5, 1.0]]})
        assert axes.get_ylim()[0] == 0
        assert words(axes) == (
            "What the memory adds to self-attention",
            "tokens read",
            "‖memory‖ / ‖self-attention‖",
        )
        (legend,) = figures["contribution"].legends
        assert [text.get_text() for text in legend.get_texts()] == ["layer 1", "layer 4"]

    @pytest.mark.parametrize(
        ("figure", "start", "step", "spread", "unit"),
        [
            ("density_centres", 0.1, 0.1, (0.01, 0.01), "place in the memory (1: newest)"),
            ("density_widths", 0.3, 0.05, (0.02, 0.5), "standard deviation (memory: 1)"),
            ("density_tokens_back", 3, 1, None, "tokens before the segment"),
        ],
    )
    def test_each_layer_has_a_panel_and_each_head_a_line(self, figures, figure, start, step, spread, unit):
        panels = figures[figure].axes
        assert [words(axes) for axes in panels] == [("layer 1", "tokens read", unit), ("layer 4", "tokens read", "")]
        for layer, axes in enumerate(panels):
            values = {
                f"head {head}": [start + step * (2 * layer + head), start + step * (4 + 2 * layer + head)]
                for head in range(2)
            }
            assert_lines(axes, {head: [[8, 16], along] for head, along in values.items()})
            assert axes.get_yscale() == ("linear" if figure == "density_centres" else "log")
            assert len(axes.collections) == (0 if spread is None else 2)
            for head, area in enumerate(axes.collections):
                around = [spread[0] + spread[1] * (4 * segment + 2 * layer + head) for segment in range(2)]
                for (x, middle), each in zip(zip((8, 16), values[f"head {head}"], strict=True), around, strict=True):
                    found = [y for place, y in area.get_paths()[0].vertices if place == x]
                    lowest = middle - each if figure == "density_centres" else max(middle - each, middle / 10)
                    assert (min(found), max(found)) == pytest.approx((lowest, middle + each))
        if figure == "density_centres":
            assert panels[0].get_ylim() == (-0.02, 1.02)

    def test_samples_are_beside_those_of_an_even_spread(self, figures):
        one, four, bar = figures["sticky_samples"].axes
        expected = {
            "layer 1": (one, [[2.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 3.0]]),
            "layer 4": (four, [[0.5, 4.0], [0.5, 0.0], [2.0, 0.0], [1.0, 0.0]]),
        }
        for title, (axes, density) in expected.items():
            assert words(axes)[:2] == (title, "tokens read")
            (mesh,) = [each for each in axes.collections if isinstance(each, QuadMesh)]
            assert np.array_equal(mesh.get_array(), density)
            corners = mesh.get_coordinates()
            assert corners[0, :, 0].tolist() == [8, 16, 24]
            assert corners[:, 0, 1].tolist() == [0, 0.25, 0.5, 0.75, 1]
            assert (mesh.norm.vmin, mesh.norm.vmax) == (0.25, 4)
        assert one.get_ylabel() == "place in the memory (1: newest)"
        assert ticks(bar, "y") == ["¼", "½", "1", "2", "4"]
        assert bar.get_ylabel() == "samples, 1: as many as evenly"


class TestAnyDepth:
    """Of more than eight layers all are rows of a heat map, and four of them are lines or panels."""

    @pytest.fixture(scope="class")
    @classmethod
    def figures(cls, drawn) -> dict[str, Figure]:
        return drawn(plot_inspection, of_layers(30), "inspection.json")

    def heat(self, axes: Axes) -> QuadMesh:
        (mesh,) = [each for each in axes.collections if isinstance(each, QuadMesh)]
        return mesh

    def test_all_layers_are_in_a_heat_map_of_ages(self, figures):
        heat, by_age, total, _ = figures["reconstruction"].axes
        expected = of_layers(30)["reconstruction"][-1]["by_age"]
        assert np.array(self.heat(heat).get_array()) == pytest.approx(np.array(expected))
        assert self.heat(heat).get_coordinates()[0, :, 0].tolist() == [256 * edge for edge in range(8)]
        for axes in (by_age, total):
            assert list(lines_of(axes)) == ["layer 0", "layer 10", "layer 19", "layer 29"]

    @pytest.mark.parametrize("name", ["density_centres", "density_widths", "density_tokens_back"])
    def test_all_layers_are_in_a_heat_map_along_the_document(self, figures, name):
        key = {"density_centres": "centre", "density_widths": "width"}.get(name, "tokens_back")
        *panels, heat, _ = figures[name].axes
        assert [words(axes)[0] for axes in panels] == ["layer 0", "layer 10", "layer 19", "layer 29"]
        expected = np.array(of_layers(30)["reading"][key]).mean(-1).T
        assert np.array(self.heat(heat).get_array()) == pytest.approx(expected)

    def test_a_width_that_hardly_varies_is_drawn_as_none(self, figures):
        low, high = figures["density_widths"].axes[0].get_ylim()
        assert high / low == pytest.approx(2)
        assert low < 0.831 < 0.834 < high
        norm = self.heat(figures["density_widths"].axes[-2]).norm
        assert norm.vmax / norm.vmin == pytest.approx(2)

    def test_a_loss_that_hardly_varies_is_drawn_as_none(self, figures):
        for axes in figures["losses"].axes:
            assert axes.get_ylim()[1] - axes.get_ylim()[0] == pytest.approx(0.01)

    def test_layers_without_a_turn_are_counted(self, drawn):
        content = of_layers(30)
        content["costs"]["without_layer"][7:] = [{"nats_per_token": None, "interval": None}] * 23
        axes = drawn(plot_inspection, content, "inspection.json")["losses"].axes[0]
        assert "(23 without a bar: too few segments to have a turn)" in axes.get_xlabel()

    def test_a_memory_that_is_no_signal_has_its_losses(self, drawn):
        empty = {name: [] for name in ("centre", "width", "tokens_back", "contribution")}
        content = {**INSPECTION, "reading": {**INSPECTION["reading"], **empty}, "writing": {}, "reconstruction": []}
        assert list(drawn(plot_inspection, content, "inspection.json")) == ["losses"]


LONG = "a-checkpoint-with-a-long-name/" * 6


def named_at_length(count: int) -> dict[str, Any]:
    """An evaluation of so many documents with long names."""
    content = evaluation_of(count)
    for figures in (content, *content["controls"].values()):
        figures["per_document"] = [
            {**document, "id": f"The Life and Strange Surprising Adventures of Number {number}, Mariner"}
            for number, document in enumerate(figures["per_document"])
        ]
    return content


def swept(count: int) -> dict[str, Any]:
    """So many rows with long names."""
    rows = [
        {
            "name": f"model.memory.contraction_rate={0.1 * number:.1f} training.segments_per_visit=32 optimizer=adamw",
            "value": 20.0 + number,
            "interval": [15.0 + number, 28.0 + number],
            "by_seed": [19.5 + number, 20.25 + number],
            "behind": {"nats_per_token": 0.25 * number, "interval": [0.125 * number, 0.5 * number]} if number else None,
        }
        for number in range(count)
    ]
    return {"measure": "perplexity", "rows": rows}


def test_a_sweep_has_its_rows_and_how_far_they_are_behind(drawn):
    axes, behind = drawn(plot_sweep, swept(3), "summary.json")["summary"].axes

    def points(panel: Axes, marker: str) -> list[tuple[list[float], list[float]]]:
        found = [line for line in panel.lines if line.get_marker() == marker]
        return [tuple(np.asarray(each, dtype=float).tolist() for each in line.get_data()) for line in found]

    assert points(axes, "o") == [([20], [0]), ([21], [1]), ([22], [2])]
    assert points(axes, "|") == [([19.5, 20.25], [0, 0]), ([20.5, 21.25], [1, 1]), ([21.5, 22.25], [2, 2])]
    assert points(axes, "None") == [([15, 28], [0, 0]), ([16, 29], [1, 1]), ([17, 30], [2, 2])]
    assert points(behind, "o") == [([0.25], [1]), ([0.5], [2])]
    assert axes.yaxis_inverted()
    assert len(drawn(plot_sweep, swept(1), "summary.json")["summary"].axes) == 1  # nothing is behind


KINDS = [(placement, norm) for norm in ("layer", "rms") for placement in ("post", "pre", "dual")]
NORMS_MEASURED = {
    "initialisation": [
        {"placement": placement, "normalization": norm, "depth": depth, "gradients": [0.1 * (number + 1)] * depth}
        for number, (placement, norm) in enumerate(KINDS)
        for depth in (6, 12, 24, 48)
    ],
    "training": [
        {"placement": placement, "normalization": norm, "depth": depth, "warmup": warmup, "seed": 0}
        | {"losses": [5.0 - number - 0.125 * (warmup > 0)] * 8 + [2.0] * 8 + [None]}
        for depth in (24, 6)
        for number, (placement, norm) in enumerate(KINDS)
        for warmup in (0, 80)
    ],
    "byte_frequencies": 3.125,
}
HELD = {
    "rows": [
        {"keys": keys, "mechanism": mechanism, "associations": length, "seed": seed}
        | {"loss": number / 10 + length / 1000 + seed / 100 + (keys == "repeated") / 1000}
        for seed in (0, 1)
        for keys in ("different", "repeated")
        for length in (20, 600)
        for number, mechanism in enumerate(["softmax", "sum_elu", "sum_dpfp1", "delta_elu", "delta_dpfp1"])
    ]
}

EIGHT_MEMORIES = [
    {"memory": f"fast_weight_{number}", "seed": 0, "length": 512, "accuracy": 0.1 * number}
    | {"accuracy_free_running": 0.1 * number}
    | {"ideal_counters": {name: {"accuracy": 0.5, "accuracy_free_running": 0.5} for name in COUNTERS}}
    for number in range(8)
]

LEGIBLE = {
    "norms": (plot_norms, {**NORMS_MEASURED, "training": NORMS_MEASURED["training"][:12]}, "norms.json"),
    "capacity": (plot_capacity, HELD, "capacity.json"),
    "eight memories": (plot_accuracy_by_length, EIGHT_MEMORIES, "accuracy.json"),
    "a sweep": (plot_sweep, swept(24), "summary.json"),
    "4 layers": (plot_inspection, of_layers(4), "inspection.json"),
    "30 layers": (plot_inspection, of_layers(30, heads=3), "inspection.json"),
    "40 documents": (plot_results, named_at_length(40), "results.json"),
    "long names": (
        plot_comparison,
        {**COMPARISON, "a": {"checkpoint": LONG + "a"}, "b": {"checkpoint": LONG + "b"}},
        "comparison.json",
    ),
}


def texts_of(figure: Figure) -> list[Text]:
    """All that is drawn: of the ticks only those between the ends of their axis."""
    outside = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    outside |= {tick.label1, tick.label2}
    return [
        text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and text not in outside
    ]


@pytest.mark.parametrize(
    ("plot", "content", "name"),
    [pytest.param(*case, marks=[pytest.mark.slow] if name == "4 layers" else []) for name, case in LEGIBLE.items()],
    ids=LEGIBLE,
)
def test_no_text_is_cut_or_printed_over_another(drawn, plot, content, name):
    for title, figure in drawn(plot, content, name).items():
        figure.draw_without_rendering()
        texts = [(text.get_text(), text.get_window_extent()) for text in texts_of(figure)]
        width, height = figure.canvas.get_width_height()
        for text, box in texts:
            assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= -1, f"{title}: {text!r} is cut"
        corners = np.array([box.padded(-1).get_points() for _, box in texts])  # [texts][low, high][x, y]
        low, high = corners.min(axis=1), corners.max(axis=1)
        overlaps = np.triu((low[:, None] <= high).all(axis=-1) & (low <= high[:, None]).all(axis=-1), k=1)
        over = [f"{texts[one][0]!r} and {texts[other][0]!r}" for one, other in np.argwhere(overlaps)]
        assert not over, f"{title}: {over}"


def test_a_name_with_dollars_is_no_formula(drawn):
    content = evaluation_of(1)
    for figures in (content, *content["controls"].values()):
        figures["per_document"][0]["id"] = "from $_ to _$ a day"
    figures = [
        *drawn(plot_results, content).values(),
        *drawn(plot_comparison, {**COMPARISON, "a": {"checkpoint": "$_ to _$"}}, "comparison.json").values(),
    ]
    for figure in figures:
        figure.draw_without_rendering()


def test_every_mechanism_and_every_depth_has_a_line_however_many_there_are(drawn):
    names = [f"{rule}_{features}" for rule in ("sum", "delta") for features in ("elu", "dpfp1", "dpfp2", "dpfp3")]
    rows = [{**row, "mechanism": name} for row in HELD["rows"] if row["mechanism"] == "softmax" for name in names]
    panels = drawn(plot_capacity, {"rows": rows}, "capacity.json")["capacity"].axes
    assert [len(axes.get_legend_handles_labels()[0]) for axes in panels] == [8, 8]
    starts = [
        {"placement": placement, "normalization": norm, "depth": depth, "gradients": [0.1] * depth}
        for placement, norm in KINDS
        for depth in range(2, 10)
    ]
    panels = drawn(plot_norms, {**NORMS_MEASURED, "initialisation": starts}, "norms.json")["norms"].axes
    assert [len(axes.get_legend_handles_labels()[0]) for axes in panels[:6]] == [8] * 6


def test_gradients_have_a_line_for_each_depth_and_losses_one_for_each_way_of_training(drawn):
    panels = drawn(plot_norms, NORMS_MEASURED, "norms.json")["norms"].axes
    assert len(panels) == 12
    assert_lines(panels[1], {f"{depth} layers": [range(1, depth + 1), [0.2] * depth] for depth in (6, 12, 24, 48)})
    assert words(panels[3]) == ("Norms after the sum, RMSNorm", "layer", "norm of the gradient")
    assert panels[0].get_ylim()[0] == 0
    shallow, deep = panels[6], panels[11]
    assert words(shallow) == ("Norms after the sum, 6 layers", "step", "nats per byte")
    assert words(deep)[0] == "Both (ResiDual), 24 layers"
    steps = [4, 12]
    assert_lines(
        deep,
        {
            "LayerNorm, no warm-up": [steps, [3, 2]],
            "LayerNorm, 80 steps of warm-up": [steps, [2.875, 2]],
            "RMSNorm, no warm-up": [steps, [0, 2]],
            "RMSNorm, 80 steps of warm-up": [steps, [-0.125, 2]],
        },
    )
    assert all(3.125 in line.get_ydata() for line in (panels[6].lines[-1], panels[11].lines[-1]))


def test_capacity_has_a_line_for_each_mechanism_of_the_mean_over_seeds(drawn):
    different, repeated = drawn(plot_capacity, HELD, "capacity.json")["capacity"].axes
    assert_lines(
        repeated,
        {
            name: [[20, 600], [number / 10 + 0.026, number / 10 + 0.606]]
            for number, name in enumerate(["softmax", "sum, elu", "sum, dpfp1", "delta, elu", "delta, dpfp1"])
        },
    )
    assert words(different) == ("Every key once", "associations", "½‖answer − value‖²")


class TestSorting:
    def test_every_length_has_a_row_and_every_measure_a_column(self, drawn):
        axes = drawn(plot_accuracy, SORTING)["accuracy_by_position"].axes
        for panel, (length, name, start) in zip(
            axes,
            [
                ("1,000", "teacher forced", 0.1),
                ("1,000", "free running", 0.12),
                ("20,000", "teacher forced", 0.5),
                ("20,000", "free running", 0.52),
            ],
            strict=True,
        ):
            assert words(panel) == (f"{length} symbols, {name}", "place in the answer", "accuracy")
            expected = {
                counter.replace("_", " "): [[1, 2], [start + 0.04 * n, start + 0.04 * n + 0.01]]
                for n, counter in enumerate(COUNTERS, start=1)
            }
            assert_lines(panel, {**expected, "this model": [[1, 2], [start, start + 0.01]]})
            assert panel.get_ylim() == (-0.02, 1.02)


MACHINE = {"name": "a card", "device": "cpu", "threads": 2, "torch": "2", "precision": "float32"}
MEBIBYTE = 2**20


class TestABenchmark:
    def test_time_and_memory_are_against_what_is_in_reach(self, drawn):
        """Milliseconds and MiB against what is in reach: along the stream with memory, at each longer window."""

        def contestant(name: str, reach: int, seconds: float, remembered: int, extra: int, **others: Any) -> str:
            line = {
                "kind": "contestant",
                "name": name,
                "reach_tokens": reach,
                "median_seconds": seconds,
                "memory_bytes": remembered * MEBIBYTE,
                "peak_extra_bytes": extra * MEBIBYTE,
                "machine": MACHINE,
                "options": {"segment": 512},
            }
            return json.dumps({**line, **others})

        content = "\n".join(
            [
                contestant("with memory, early", 1024, 0.25, 3, 4),
                contestant("with memory, late", 65536, 0.5, 3, 5, times_early_by_segment=[[10, 1.5], [20, 1.75]]),
                contestant("window of 2 segments", 2048, 0.75, 16, 32),
                contestant("window of 4 segments", 4096, 1.25, 64, 128),
                json.dumps({"kind": "ratio"}),
            ]
        )
        time, memory = drawn(plot_context, content, "stream.jsonl")["stream"].axes
        assert_lines(
            time,
            {
                "with memory": [[1024, 5120, 10240, 65536], [250, 375, 437.5, 500]],
                "window alone": [[2048, 4096], [750, 1250]],
            },
        )
        assert_lines(memory, {"with memory": [[1024, 65536], [7, 8]], "window alone": [[2048, 4096], [48, 192]]})
        reach = "tokens of the document in reach"
        assert words(time) == ("Time", reach, "milliseconds for a segment of 512 tokens")
        assert words(memory) == (
            "Memory beside the weights",
            reach,
            "MiB: remembered, and held at the peak",
        )
        for axes in (time, memory):
            assert axes.get_xscale() == "log"
            assert axes.get_ylim()[0] == 0
        assert time.figure.get_suptitle() == "a card, 2 threads, torch 2, float32"

    def test_parts_have_their_medians_quartiles_and_floors(self, drawn):
        rows = [("part", "read", 0.25, 0.2, 0.4, 0.1), ("part", "write", 0.5, 0.45, 0.6, 0.3)]
        rows.append(("contestant", "with", 1.0, 0.9, 1.3, 0.7))
        content = "\n".join(
            json.dumps(
                {
                    "kind": kind,
                    "name": name,
                    "median_seconds": median,
                    "quartiles_seconds": [low, high],
                    "floor_seconds": floor,
                    "machine": MACHINE,
                }
            )
            for kind, name, median, low, high, floor in rows
        )
        (axes,) = drawn(plot_parts, content, "step.jsonl")["step"].axes
        bars = {bars.get_label(): bars for bars in axes.containers if bars.get_label() in ("measured", "floor")}
        assert [bar.get_width() for bar in bars["measured"]] == [0.25, 0.5, 1.0]
        assert [bar.get_width() for bar in bars["floor"]] == [0.1, 0.3, 0.7]
        (spread,) = [each for each in axes.collections if isinstance(each, LineCollection)]
        assert np.array([segment[:, 0] for segment in spread.get_segments()]) == pytest.approx(
            np.array([[0.2, 0.4], [0.45, 0.6], [0.9, 1.3]])
        )
        assert ticks(axes, "y") == ["read", "write", "whole step"]
        assert axes.yaxis_inverted()
        assert words(axes)[1] == "seconds; bars between the quartiles"
