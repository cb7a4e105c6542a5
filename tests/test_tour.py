"""The notebook runs as it stands, and is kept without its outputs."""

import base64
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "examples" / "tour.ipynb"


def test_the_tour_is_kept_without_outputs():
    cells = [cell for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    for cell in cells:
        compile("".join(cell["source"]), str(TOUR), "exec")


@pytest.mark.slow
@pytest.mark.needs("nbclient")
@pytest.mark.needs("ipykernel")
def test_the_tour_runs_from_its_first_cell_to_its_last(monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    tour = nbformat.read(TOUR, as_version=4)
    nbclient.NotebookClient(tour, timeout=900, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in tour.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "\nTrue\n" in printed  # a new memory changed nothing
    assert "with its memory " in printed
    (figure,) = (output.data["image/png"] for output in outputs if "image/png" in output.get("data", {}))
    assert len(base64.b64decode(figure)) > 10_000
