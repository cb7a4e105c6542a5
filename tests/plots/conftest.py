import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

Drawn = Callable[..., dict[str, Figure]]


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Drawn:
    """The figures that a function draws of a file's content, by the names of theirs; none becomes a picture."""

    def draw(plot: Callable[[Path], Any], content: Any, name: str = "results.json") -> dict[str, Figure]:
        figures: dict[str, Figure] = {}
        file = tmp_path_factory.mktemp("drawn") / name
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", lambda figure, path, **_: figures.update({Path(path).stem: figure}))
            plot(file)
        return figures

    return draw
