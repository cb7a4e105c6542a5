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


def write_results(directory, controls=True, cells=True):
    found = [
        {"length": length, "depth": depth, "exact_match": value(length, depth), "accuracy": 1 - value(length, depth)}
        for length in LENGTHS
        for depth in DEPTHS
        if cells
    ]
    results = {
        "cells": found,
        "controls": {"memory_off": [{**cell, "exact_match": 0.0} for cell in found]} if controls else {},
        "chance": 1e-5,
        "protocol": {"task": "passkey", "window": 600},
    }
    path = directory / "results.json"
    path.write_text(json.dumps(results))
    return path


@pytest.fixture
def drawn(tmp_path, monkeypatch) -> Figure:
    """The figure as it was before it became a file."""
    figures = []
    monkeypatch.setattr(
        "infformer.plots.retrieval.save", lambda figure, path: figures.append(figure) or figure.draw_without_rendering()
    )
    plot_retrieval(write_results(tmp_path))
    return figures[0]


def test_it_is_drawn_beside_the_results(tmp_path):
    (path,) = plot_retrieval(write_results(tmp_path))
    assert path == tmp_path / "plots" / "accuracy_by_length_and_depth.png"
    assert imread(path).std() > 0.05
    widths = [imread(path).shape[1], imread(plot_retrieval(write_results(tmp_path, controls=False))[0]).shape[1]]
    assert widths[0] > 1.5 * widths[1]


def test_every_cell_is_in_its_place(drawn):
    model, off, tokens, _, _ = drawn.axes
    ascending = [[value(length, depth) for length in (256, 1024, 4096)] for depth in (0.0, 0.5, 1.0)]
    assert np.array_equal(model.images[0].get_array(), ascending)
    assert np.array_equal(tokens.images[0].get_array(), 1 - np.array(ascending))
    assert (off.images[0].get_array() == 0).all()
    assert [text.get_text() for text in model.texts] == [f"{cell:.2f}" for row in ascending for cell in row]
    assert [label.get_text() for label in model.get_xticklabels()] == ["256", "1,024", "4,096"]
    assert [label.get_text() for label in model.get_yticklabels()] == ["0", "0.5", "1"]
    assert model.get_title(loc="left") == "this model: whole answers, free running"


def test_the_border_is_between_what_is_in_the_window_and_what_is_not(drawn):
    """Of 256 tokens all, of 1,024 those of the last half, of 4,096 the last alone."""
    (line,) = drawn.axes[0].lines
    assert line.get_xdata().tolist() == [-0.5, 0.5, 0.5, 1.5, 1.5, 2.5]
    assert line.get_ydata().tolist() == [-0.5, -0.5, 0.5, 0.5, 1.5, 1.5]
    assert "600 tokens" in drawn.legends[0].texts[0].get_text()


def test_nothing_measured_is_no_figure(tmp_path):
    assert plot_retrieval(write_results(tmp_path, cells=False)) == []
