"""Many runs in one table, held against the same figures computed here."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from infformer.evaluation.figures import interval_of_ratio
from infformer.evaluation.streaming import EvaluationError
from infformer.training.command_line import end_of_sweep
from infformer.training.sweep import SweepError, format_sweep, read_runs, summarise_runs, write_summary

SCRIPTS = Path(__file__).parents[2] / "scripts"
TOKENS = np.array([100, 200, 400])


def figures(nats: list[float]) -> dict[str, Any]:
    """Of three documents, so many nats per token on each."""
    documents = [
        {"id": str(number), "tokens": int(tokens), "nll": float(each * tokens)}
        for number, (each, tokens) in enumerate(zip(nats, TOKENS, strict=True))
    ]
    loss = float((np.array(nats) * TOKENS).sum() / TOKENS.sum())
    return {"per_document": documents, "perplexity": {"token": float(np.exp(loss))}}


def perplexities(nats: list[float], memory: dict[str, Any] | None = None, **protocol: object) -> dict[str, Any]:
    controls = {}
    if memory is not None:
        shifts = {"memory_off": 0.5, "memory_of_another_document": 0.125}
        controls = {name: figures([each + shift for each in nats]) for name, shift in shifts.items()}
    counts = {"documents": 3, "tokens": 700, "words": 600, "bytes": 3000}
    read = {"segment": 64, "stride": 64, "warmup_documents": 0, "dtype": "float32", "documents": "same"}
    return {**figures(nats), **counts, "controls": controls, "protocol": {**read, "memory": memory, **protocol}}


@pytest.fixture
def run(tmp_path):
    """The folder of a run with these options and results."""

    def make(name: str, options: dict[str, object], results: dict[str, Any] | None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = {"name": name, "output_dir": str(folder), "resume": None, "optimizer": {"learning_rate": 0.1}}
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.merge(config, options)))
        if results is not None:
            (folder / "results.json").write_text(json.dumps(results))
        return folder

    return make


def summarise(*folders: Path) -> Any:
    return summarise_runs(read_runs(folders)[0])


STICKY = {"kind": "long_term", "sticky": True, "basis_functions": 8}


@pytest.fixture
def four(run) -> list[Path]:
    """Two seeds without a memory, which are worse, and two with one."""
    nothing: dict[str, object] = {"model": {"memory": None}}
    sticky: dict[str, object] = {"model": {"memory": {"sticky": True, "basis_functions": 8}}}
    return [
        run("sweep_0", {**nothing, "seed": 0}, perplexities([3.0, 3.5, 4.0])),
        run("sweep_1", {**nothing, "seed": 1}, perplexities([3.5, 3.0, 4.5])),
        run("sweep_2", {**sticky, "seed": 0}, perplexities([2.5, 3.25, 3.5], STICKY)),
        run("sweep_3", {**sticky, "seed": 1}, perplexities([2.75, 3.0, 4.0], STICKY)),
    ]


def test_seeds_are_pooled_and_the_best_is_first(four):
    best, other = summarise(*four)["rows"]
    assert (best["name"], other["name"]) == ("model.memory=sticky long_term", "model.memory=null")
    assert (best["seeds"], other["seeds"]) == ([0, 1], [0, 1])
    assert best["runs"] == [str(folder) for folder in four[2:]]
    pooled = {"best": np.array([2.625, 3.125, 3.75]), "other": np.array([3.25, 3.25, 4.25])}
    for row, nats in ((best, pooled["best"]), (other, pooled["other"])):
        assert row["value"] == pytest.approx(np.exp((nats * TOKENS).sum() / 700))
        assert row["interval"] == pytest.approx(np.exp(interval_of_ratio(nats * TOKENS, TOKENS)))
    assert best["behind"] is None
    apart = (pooled["other"] - pooled["best"]) * TOKENS
    assert other["behind"]["nats_per_token"] == pytest.approx(apart.sum() / 700)
    assert other["behind"]["interval"] == pytest.approx(interval_of_ratio(apart, TOKENS))
    assert best["specific"] == pytest.approx(-0.125)
    assert other["specific"] is None
    assert best["by_seed"] == pytest.approx([np.exp(x) for x in (2300 / 700, 2475 / 700)])


def test_documents_that_two_rows_read_alike_are_neither_better_nor_worse(run):
    folders = [
        run(f"run_{rate}", {"seed": 0, "optimizer": {"learning_rate": rate}}, perplexities(nats))
        for rate, nats in ((0.1, [2.0, 2.0, 2.0]), (0.2, [2.00001, 2.0, 3.0]))
    ]
    behind = summarise(*folders)["rows"][1]["behind"]
    assert (behind["better"], behind["worse"]) == (0, 1)


def test_the_table_has_a_line_for_each_row(four):
    head, best, other, note = format_sweep(summarise(*four)).splitlines()
    assert head.split("  ")[-2:] == ["seeds", "options"]
    assert best.split()[-3:] == ["2", "model.memory=sticky", "long_term"]
    assert "-0.1250" in best
    assert other.split()[-2:] == ["2", "model.memory=null"]
    assert "+0.4107" in other
    assert note.startswith("perplexity per token, the mean of seeds")


def test_rows_are_named_by_what_differs(run):
    folders = [
        run(f"run_{rate}_{size}", {"seed": 0, "optimizer": {"learning_rate": rate, "batch": size}}, results)
        for rate, size, results in ((0.1, 4, perplexities([2, 2, 2])), (0.2, 4, perplexities([1, 1, 1])))
    ]
    assert [row["name"] for row in summarise(*folders)["rows"]] == [
        "optimizer.learning_rate=0.2",
        "optimizer.learning_rate=0.1",
    ]
    assert [row["name"] for row in summarise(folders[0])["rows"]] == ["all alike"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"training": {"max_steps": 100}}, {"training": {"max_steps": 9}}),
        ({"training": {"evaluate_every": 5}}, {"training": {"evaluate_every": None}}),
        ({"growth": []}, {"growth": [{"step": 5, "num_hidden_layers": 9}]}),
    ],
)
def test_runs_that_differ_in_what_they_learned_have_rows_of_their_own(run, one, other):
    folders = [
        run(name, {"seed": 0, **options}, perplexities([2, 2, 2])) for name, options in (("a", one), ("b", other))
    ]
    assert len(summarise(*folders)["rows"]) == 2


def test_seeds_are_pooled_whatever_engine_and_tracker_they_had(run):
    one: dict[str, object] = {"engine": {"name": "ddp"}, "tracker": {"name": "none"}}
    other: dict[str, object] = {"engine": {"name": "fsdp2"}, "tracker": {"name": "wandb"}, "data": {"workers": 4}}
    both = [{"seed": 0, **one}, {"seed": 1, **other}]
    folders = [run(f"run_{options['seed']}", options, perplexities([2, 2, 2])) for options in both]
    assert [row["seeds"] for row in summarise(*folders)["rows"]] == [[0, 1]]


def test_accuracies_are_better_where_they_are_higher(run):
    def cells(*values: float) -> dict[str, Any]:
        found = [{"exact_match": value, "answers": count} for value, count in zip(values, (1, 3), strict=True)]
        return {"cells": found, "controls": {}, "protocol": {}}

    folders = [
        run(f"run_{rate}_{seed}", {"seed": seed, "optimizer": {"learning_rate": rate}}, cells(*values))
        for rate, seed, values in ((1, 0, (0, 0.5)), (1, 1, (0.4, 0.5)), (2, 0, (1, 1)), (2, 1, (0, 1)))
    ]
    sweep = summarise(*folders)
    assert sweep["measure"] == "exact match"
    assert [row["value"] for row in sweep["rows"]] == pytest.approx([0.875, 0.425])
    assert sweep["rows"][0]["by_seed"] == pytest.approx([1, 0.75])
    low, high = sweep["rows"][0]["interval"]
    assert (low + high) / 2 == pytest.approx(0.875)
    assert (high - low) / 2 == pytest.approx(12.706 * 0.125, rel=1e-3)  # Student's with one degree of freedom


def test_what_cannot_stand_in_one_table_is_refused(run, four, tmp_path):
    with pytest.raises(SweepError, match="nowhere: there is no run"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(SweepError, match="no run has its results yet"):
        summarise(run("begun", {"seed": 0}, None))
    other = run("other", {"seed": 0}, perplexities([1, 1, 1], documents="other"))
    with pytest.raises(EvaluationError, match="of other tokens"):
        summarise(*four, other)
    with pytest.raises(SweepError, match="different tasks"):
        summarise(*four, run("sorting", {"seed": 0}, {"lengths": [{"accuracy": 1}], "protocol": {}}))
    broken = run("broken", {"seed": 0}, {})
    (broken / "results.json").write_text("{")
    with pytest.raises(SweepError, match="broken: its"):
        read_runs([broken])


def test_the_script_prints_the_table_and_draws_it(four, run, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPTS)
    begun = run("sweep_4", {"seed": 2}, None)
    folder = tmp_path / "summary"
    monkeypatch.setattr(sys, "argv", ["summarise.py", *map(str, [*four, begun]), "--folder", str(folder)])
    import_module("summarise").main()
    *_, unfinished, written = capsys.readouterr().out.splitlines()
    assert unfinished == f"without results yet: {begun}"
    assert written == f"written to {folder / 'summary.json'}, drawn in {folder / 'summary.png'}"
    assert json.loads((folder / "summary.json").read_text()) == summarise(*four)
    assert (folder / "summary.png").stat().st_size > 5_000


def test_a_run_whose_perplexity_no_number_holds_is_the_last(four, run, tmp_path):
    lost = perplexities([1.0, 1.0, 1.0])
    for document in lost["per_document"]:
        document["nll"] *= 1000
    lost["perplexity"]["token"] = None  # as JSON has no infinity
    written = write_summary([*four, run("lost", {"seed": 7, "optimizer": {"learning_rate": 9.0}}, lost)], tmp_path)
    assert written.splitlines()[3].split()[0] == "inf"
    last = json.loads((tmp_path / "summary.json").read_text())["rows"][-1]
    assert last["value"] is None
    assert last["behind"]["nats_per_token"] > 990


def test_a_sweep_ends_with_the_table_and_where_it_lies(four, run, tmp_path):
    said = end_of_sweep(four)
    assert "model.memory=sticky long_term" in said
    assert said.endswith(f"drawn in {tmp_path / 'summary' / 'summary.png'}")
    assert "python scripts/summarise.py" in end_of_sweep([])  # by SLURM, somewhere else
    begun = run("begun", {"seed": 0}, None)
    assert "there is no table of its runs: no run has its results yet" in end_of_sweep([begun])


@pytest.mark.slow
def test_a_sweep_on_the_command_line_ends_with_one_table(configure, options_of, tmp_path):
    options = [option for option in options_of(configure(tmp_path)) if not option.startswith(("seed=", "output_dir="))]
    where = ["output_dir=" + str(tmp_path) + "/run_${hydra:job.num}", f"hydra.sweep.dir={tmp_path / 'multirun'}"]
    found = subprocess.run(
        [sys.executable, "train.py", "-m", *options, *where, "seed=0,1", "training.max_steps=1"],
        cwd=SCRIPTS.parent, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1].startswith(f"written to {tmp_path / 'summary' / 'summary.json'}")
    (row,) = json.loads((tmp_path / "summary" / "summary.json").read_text())["rows"]
    assert row["seeds"] == [0, 1]
