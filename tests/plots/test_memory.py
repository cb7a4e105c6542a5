"""Figures of an inspection: one for each measure, from the file alone."""

import json

from matplotlib.image import imread

from infformer.plots import memory
from infformer.plots.memory import plot_inspection

FIGURES = {
    "reconstruction",
    "losses",
    "contribution",
    "density_centres",
    "density_tokens_back",
    "density_widths",
    "sticky_samples",
}


def inspection(layers: int, heads: int, segments: int, sticky: bool) -> dict:
    """As `inspect_document` returns it."""
    read = range(1, segments)
    by_head = [
        [[0.5 + 0.01 * (layer + head + segment) for head in range(heads)] for layer in range(layers)]
        for segment in read
    ]
    places = [[[1 / 64] * 64] * layers] * len(read)
    by_layer = [[0.1 + 0.01 * (layer + segment) for layer in range(layers)] for segment in read]
    return {
        "memory": {"segment_length": 8, "basis_functions": 16, "layers": list(range(layers))},
        "reading": {
            "segment": list(read),
            "tokens": [8] * (segments - 2) + [3],
            **dict.fromkeys(("centre", "centre_spread", "width", "width_spread", "tokens_back"), by_head),
            "contribution": by_layer,
            "nats": [3.0] * (segments - 1),
            "nats_without_layer": [[3 + value for value in row] for row in by_layer],
            "nats_without_memory": [3.2 - 0.1 * segment for segment in read],
        },
        "writing": {"segment": list(read), "sampled_places": places} if sticky else {},
        "reconstruction": [
            {
                "segments": written,
                "tokens_back": [8 * age + 4 for age in range(written)],
                "limit": min(1, 16 / (8 * written)),
                "total": [0.5] * (layers - 1) + [None],
                "by_age": [[1 / (age + 1) - 0.3 for age in range(written)]] * (layers - 1) + [[None] * written],
            }
            for written in (1, 2)
        ],
    }


def test_every_measure_has_its_figure(tmp_path):
    path = tmp_path / "inspection.json"
    path.write_text(json.dumps(inspection(1, 1, 2, sticky=True)))
    figures = plot_inspection(path)
    assert {figure.stem for figure in figures} == FIGURES
    for figure in figures:
        assert figure.parent == tmp_path
        picture = imread(figure)[..., :3]
        assert picture.min() < 0.3  # something is drawn
        assert min(picture.shape[:2]) > 300


def test_a_memory_that_is_not_sticky_has_no_samples_and_layers_fill_rows(drawn, monkeypatch):
    monkeypatch.setattr(memory, "COLUMNS", 1)  # two layers are two rows
    figures = drawn(plot_inspection, inspection(2, 6, 4, sticky=False), "inspection.json")
    assert figures.keys() == FIGURES - {"sticky_samples"}
    upper, lower = (axes.get_subplotspec().rowspan.start for axes in figures["density_widths"].axes)
    assert (upper, lower) == (0, 1)
