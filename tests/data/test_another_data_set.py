"""A data set that no file of the package knows of is chosen by one word, and is one file of values."""

import shutil
import textwrap

from infformer.config import CONF, EvaluationRunConfig, RunConfig
from infformer.data.sources import read_documents
from infformer.training.command_line import compose

PLAYS = """
    # infformer/conf/data/plays.yaml
    source: files
    train: plays/*.txt
    validation: held_out.jsonl
    test: null
    segments_per_visit: 32
"""


def test_a_data_set_of_ones_own_is_chosen_by_one_word_and_read(tmp_path, monkeypatch):
    conf = shutil.copytree(CONF, tmp_path / "conf")
    (conf / "data").mkdir(exist_ok=True)
    (conf / "data" / "plays.yaml").write_text(textwrap.dedent(PLAYS))
    (tmp_path / "plays").mkdir()
    for title in ("hamlet", "macbeth"):
        (tmp_path / "plays" / f"{title}.txt").write_text(f"The tragedy of {title}.")
    (tmp_path / "held_out.jsonl").write_text('{"id": "the tempest", "text": "A tempestuous noise."}\n')
    monkeypatch.chdir(tmp_path)

    data = compose("train", RunConfig, conf, ["data=plays"]).data
    assert data == compose("eval", EvaluationRunConfig, conf, ["data=plays", "checkpoint=here"]).data
    found = {split: [document.id for document in read_documents(data, split)] for split in ("train", "validation")}
    assert found == {"train": ["hamlet", "macbeth"], "validation": ["the tempest"]}
    assert data.segments_per_visit == 32
