"""The heat map of the retrieval tasks: every cell in its place, the window's border between the right ones."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from infformer.plots.retrieval import plot_retrieval

LENGTHS, DEPTHS = [4096, 1024, 256], [1.0, 0.0, 0.5]


def value(length: int, depth: float) -> float:
    return (LENGTHS.index(length) + 3 * DEPTHS.index(depth)) / 10


def results(controls: bool = True) -> dict:
    cells = [
        {"length": length, "depth": depth, "exact_match": value(length, depth), "accuracy": 1 - value(length, depth)}
        for length in LENGTHS
        for depth in DEPTHS
    ]
    return {
        "cells": cells,
        "controls": {"memory_off": [{**cell, "exact_match": 0.0} for cell in cells]} if controls else {},
        "chance": 1e-5,
        "protocol": {"task": "passkey", "window": 600},
    }


@pytest.fixture(scope="module")
def figure(drawn) -> Figure:
    figure = drawn(plot_retrieval, results())["accuracy_by_length_and_depth"]
    figure.draw_without_rendering()
    return figure


def test_it_is_drawn_beside_the_results(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results()))
    (path,) = plot_retrieval(tmp_path / "results.json")
    assert path == tmp_path / "plots" / "accuracy_by_length_and_depth.png"
    assert imread(path).std() > 0.05


def test_a_control_is_a_column(figure, drawn):
    alone = drawn(plot_retrieval, results(controls=False))["accuracy_by_length_and_depth"]
    assert [len([axes for axes in each.axes if axes.images]) for each in (figure, alone)] == [4, 2]
    assert figure.get_figwidth() > 1.5 * alone.get_figwidth()


def test_every_cell_is_in_its_place(figure):
    model, off, tokens, _, _ = figure.axes
    ascending = [[value(length, depth) for length in (256, 1024, 4096)] for depth in (0.0, 0.5, 1.0)]
    assert np.array_equal(model.images[0].get_array(), ascending)
    assert np.array_equal(tokens.images[0].get_array(), 1 - np.array(ascending))
    assert (off.images[0].get_array() == 0).all()
    assert [text.get_text() for text in model.texts] == [f"{cell:.2f}" for row in ascending for cell in row]
    assert [label.get_text() for label in model.get_xticklabels()] == ["256", "1,024", "4,096"]
    assert [label.get_text() for label in model.get_yticklabels()] == ["0", "0.5", "1"]
    assert model.get_title(loc="left") == "this model: whole answers, free running"


def test_the_border_is_between_what_is_in_the_window_and_what_is_not(figure):
    """Of 256 tokens all, of 1,024 those of the last half, of 4,096 the last alone."""
    (line,) = figure.axes[0].lines
    assert line.get_xdata().tolist() == [-0.5, 0.5, 0.5, 1.5, 1.5, 2.5]
    assert line.get_ydata().tolist() == [-0.5, -0.5, 0.5, 0.5, 1.5, 1.5]
    assert "600 tokens" in figure.legends[0].texts[0].get_text()


def test_nothing_measured_is_no_figure(drawn):
    assert drawn(plot_retrieval, {**results(), "cells": []}) == {}
