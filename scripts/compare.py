"""Which of two models reads better, and how sure that is: from two results of eval.py on the same documents.

python scripts/compare.py outputs/control outputs/tiny
python scripts/compare.py A/results.json B/results.json --folder outputs/a_and_b
python scripts/compare.py outputs/window_of_2048 outputs/memory_behind_512 --across-protocols

Prints a table and a verdict; writes comparison.json and comparison.png.
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import argparse
import json
from pathlib import Path

from infformer.durable import check_new_folder, check_place
from infformer.evaluation.comparison import compare
from infformer.evaluation.report import format_comparison, write_results
from infformer.evaluation.streaming import EvaluationError
from infformer.plots.comparison import plot_comparison
from infformer.results import Results


def main() -> None:
    """Read both results, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "a", type=Path, metavar="RUN_A", help="the folder of a run or of an evaluation, or results.json"
    )
    parser.add_argument("b", type=Path, metavar="RUN_B")
    parser.add_argument(
        "--across-protocols", action="store_true", help="their segments and windows may differ; the verdict names costs"
    )
    parser.add_argument("--folder", type=Path, help="a new one; default: outputs/comparison/RUN_A_RUN_B, written anew")
    arguments = parser.parse_args()
    names = [(path if path.is_dir() else path.parent).resolve().name for path in (arguments.a, arguments.b)]
    folder = arguments.folder or Path("outputs", "comparison", "_".join(names))
    (check_new_folder if arguments.folder else check_place)("--folder", folder)  # that of these two is made in no time
    comparison = compare(_results(arguments.a), _results(arguments.b), arguments.across_protocols)
    print(format_comparison(comparison))
    write_results(folder / "comparison.json", comparison)
    for figure in plot_comparison(folder / "comparison.json"):
        print(f"drawn: {figure}")


def _results(path: Path) -> Results:
    file = path / "results.json" if path.is_dir() else path
    try:
        if file.is_fifo():
            raise OSError("it is a pipe")
        results: Results = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(results, dict):
            raise ValueError("it is no object with named parts")
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(
            f"{path}: there are no results of eval.py or train.py that can be read ({error}); name the folder of a run "
            "or of an evaluation"
        ) from error
    return results


if __name__ == "__main__":
    command.run(main)
