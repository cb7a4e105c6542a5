"""What each memory is worth: against none, against a cache of as many floats, and on top of a short-term memory.

python scripts/study.py --model FOLDER --minutes 8
python scripts/study.py --model FOLDER --memories gibbs keys_values --seeds 0 -- data=text 'data.train=books/*.txt'
python scripts/study.py --model FOLDER --row mine model/memory=long_term model.memory.basis_functions=64

All rows are trained alike beside the same pretrained model. When the minutes are over, the table is of what is whole;
the same command goes on. Writes study.md, study.json and study.png. Options of train.py may follow after --.
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from grid import (
    add_memories,
    check_measured,
    chosen_memories,
    format_mean,
    format_perplexity,
    new_parser,
    run_all,
    write_report,
)

from infformer.evaluation.comparison import compare
from infformer.plots.study import plot_study
from infformer.results import (
    CONTINUOUS_CACHE,
    DOCUMENT_UNIGRAM,
    MEMORY_SHUFFLED_IN_TIME,
    RECENCY,
    Comparison,
    Document,
    Results,
    StudyRow,
)

_LONG_TERM = "model/memory=long_term"
MEMORIES = {
    "affine": [_LONG_TERM],
    "gibbs": [_LONG_TERM, "model.memory.read=gibbs"],
    "keys_values": [_LONG_TERM, "model.memory.stores=keys_values", "model.memory.read=gibbs"],
    "dyadic": [
        _LONG_TERM,
        "model.memory.stores=keys_values",
        "model.memory.read=slots",
        "model.memory.contraction=dyadic",
    ],
    "fast_weight": ["model/memory=fast_weight"],
    "moments": [_LONG_TERM, "model.memory.read=moments"],
    "slots": [_LONG_TERM, "model.memory.read=slots"],
}
"""The options of each row; `none`, the short-term memory and the caches are opponents of all."""
NONE, SHORT_TERM, CACHE, BEHIND = "none", "short_term", "cache", "behind_short_term"


def main() -> None:
    """Read the options, make the runs that are still to be made, write what came out."""
    parser = new_parser(__doc__, "outputs/study")
    add_memories(parser, MEMORIES, list(MEMORIES))
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a causal language model with rotary places")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after so many; default: go on")
    parser.add_argument("--short-term", type=int, default=512, metavar="TOKENS", help="on top of which; default: 512")
    arguments = parser.parse_args()
    check_measured(arguments.options)
    until = time.monotonic() + 60 * arguments.minutes

    rows = chosen_memories(arguments, MEMORIES)
    if taken := {NONE, SHORT_TERM, CONTINUOUS_CACHE, DOCUMENT_UNIGRAM} & rows.keys():
        parser.error(f"--row {taken.pop()}: an opponent of all rows is called so; choose another name")
    shared = ["model=hf", f"model.pretrained={arguments.model}", "training.bptt_segments=2", *arguments.options]
    found: dict[str, dict[int, Results]] = {}
    for seed in arguments.seeds:
        of_seed: dict[str, Results] = {}
        for name, options in _plan(rows, arguments.short_term, of_seed):
            run = f"{name}_seed{seed}"
            results = run_all({run: [*shared, *options, f"seed={seed}"]}, arguments.folder, until)
            if run in results:
                of_seed[name] = results[run]
        for name, result in [*of_seed.items(), *_baselines(of_seed)]:
            found.setdefault(name, {})[seed] = result
    study = [describe(name, found) for name in found]
    write_report(arguments.folder, "study", {"rows": study}, format_table(study), plot_study)


def _plan(rows: dict[str, list[str]], short_term: int, found: dict[str, Results]) -> Iterator[tuple[str, list[str]]]:
    """The runs of a seed and their options: opponents first, then each memory and its cache, then all on top.

    Args:
        found: what each run that was handed out has found, for the next one.
    """
    yield NONE, ["model/memory=none", "evaluation.baselines=true"]
    yield SHORT_TERM, ["model/memory=short_term", f"model.memory.short_term_length={short_term}"]
    for name, options in rows.items():
        yield name, options
        floats = floats_of(found[name]) if name in found else None  # the time was over
        if floats is not None and f"{CACHE}_{floats}" not in found:
            yield f"{CACHE}_{floats}", ["model/memory=cache", f"model.memory.match_floats={floats}"]
    for name, options in rows.items():
        yield f"{name}_{BEHIND}", [*options, f"model.memory.short_term_length={short_term}"]


def _baselines(found: dict[str, Results]) -> Iterator[tuple[str, Any]]:
    """What needs no training beside the model without a memory, as if it were a row."""
    for name, baseline in found[NONE].get("baselines", {}).items() if NONE in found else ():
        sizes = {**found[NONE]["sizes"], "state_floats": [baseline["settings"]["floats"]]}
        yield name, {**found[NONE], **baseline, "sizes": sizes}


def floats_of(results: Results) -> int:
    """How many floats the memories of all layers hold of a text."""
    return sum(results["sizes"]["state_floats"])


def pooled(runs: dict[int, Results]) -> Results:
    """The results of runs that differ in their seed as those of one: of everything the mean over seeds."""
    first, *_ = runs.values()
    mean: Any = dict(first)
    mean["per_document"] = _mean_documents([run["per_document"] for run in runs.values()])
    mean["controls"] = {
        name: {
            **control,
            "per_document": _mean_documents([run["controls"][name]["per_document"] for run in runs.values()]),
        }
        for name, control in first["controls"].items()
    }
    return mean


def _mean_documents(runs: list[list[Document]]) -> list[Any]:
    classes = ("by_position", "by_place", "by_recency")
    return [
        {
            **one[0],
            "nll": float(np.mean([document["nll"] for document in one])),
            **{name: np.mean([document[name] for document in one], axis=0).tolist() for name in classes},
        }
        for one in zip(*runs, strict=True)
    ]


def describe(name: str, found: dict[str, dict[int, Results]]) -> StudyRow:
    """What a row found, and its differences from its opponents: each of the seeds that both have."""
    runs = found[name]
    first = next(iter(runs.values()))
    behind = f"{name}_{BEHIND}"
    against = compare_seeds(found, NONE, name)
    shuffled = [run["controls"][MEMORY_SHUFFLED_IN_TIME]["difference"] for run in runs.values() if run["controls"]]
    return {
        "name": name,
        "seeds": sorted(runs),
        "perplexity": [run["perplexity"]["token"] for run in runs.values()],
        "against_none": against,
        "against_cache": compare_seeds(found, f"{CACHE}_{floats_of(first)}", name),
        "on_short_term": compare_seeds(found, SHORT_TERM, behind),
        "shuffled": [difference["nats_per_token"] for difference in shuffled],
        "floats": floats_of(first),
        "memory_parameters": first["sizes"]["memory_parameters"],
        "seconds_per_token": None
        if name in (CONTINUOUS_CACHE, DOCUMENT_UNIGRAM)
        else float(np.mean([run["cost"]["seconds_per_token"] for run in runs.values()])),
    }


def compare_seeds(found: dict[str, dict[int, Results]], a: str, b: str) -> Comparison | None:
    """By how much row b is better or worse than row a, pooled over the seeds of both; None where there are none."""
    seeds = found.get(a, {}).keys() & found.get(b, {}).keys()
    if a == b or not seeds:
        return None
    one, other = (pooled({seed: found[row][seed] for seed in sorted(seeds)}) for row in (a, b))
    return compare(one, other)


def format_table(rows: list[StudyRow]) -> str:
    """Two tables in Markdown: what each row gains, and where, with what it costs."""
    lines = [
        "| row | seeds | perplexity | against none | against a cache of as many floats | on top of short-term | "
        "of the document alone | shuffled in time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parts = None if row["against_none"] is None else row["against_none"]["parts"]
        specific = None if parts is None else parts["specific"]
        three = (row["against_none"], row["against_cache"], row["on_short_term"])
        told = [_tell(None if each is None else each["difference"]) for each in three]
        lines.append(
            f"| {row['name']} | {len(row['seeds'])} | {format_perplexity(row['perplexity'])} | {' | '.join(told)} | "
            f"{_tell(specific)} | {format_mean(row['shuffled'], 4) if parts else '–'} |"
        )
    places = next((row["against_none"]["by_place"] for row in rows if row["against_none"]), [])
    heads = [f"places {place['from']} to {place['to']}" for place in places]
    lines += [
        "",
        f"| row | {' | '.join([*RECENCY.values(), *heads])} | floats a text | parameters | ms a token |",
        f"|{'---|' * (len(RECENCY) + len(heads) + 4)}",
    ]
    for row in rows:
        against = row["against_none"]
        classes = {} if against is None else {each["previous_occurrence"]: each for each in against["by_recency"]}
        cells = [_tell(classes.get(name)) for name in RECENCY]
        found = [] if against is None else against["by_place"]
        cells += [_tell(place) for place in found] or ["–"] * len(heads)
        lines.append(
            f"| {row['name']} | {' | '.join(cells)} | {row['floats']:,} | {row['memory_parameters']:,} | "
            + ("– |" if row["seconds_per_token"] is None else f"{1000 * row['seconds_per_token']:.3g} |")
        )
    lines += [
        "",
        "Differences are in nats per token, below 0 is better, with 95 % over documents; by last occurrence and by "
        "place in the segment they are those against none. Perplexity per token is the geometric mean over seeds ± "
        "half the range; differences are pooled over the seeds that both have.",
    ]
    return "\n".join(lines) + "\n"


def _tell(difference: Any) -> str:
    if difference is None or difference["nats_per_token"] is None:
        return "–"
    interval = difference["interval"]
    spread = "" if interval is None else f" ({interval[0]:+.4f} to {interval[1]:+.4f})"
    return f"{difference['nats_per_token']:+.4f}{spread}"


if __name__ == "__main__":
    command.run(main)
