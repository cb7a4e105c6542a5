"""One table of many runs, such as a sweep's: the best first, seeds pooled, with intervals; and a figure.

python scripts/summarise.py outputs/sweep_*

Prints the table; writes summary.json and summary.png.
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import argparse
from pathlib import Path

from infformer.durable import check_place
from infformer.training.sweep import write_summary


def main() -> None:
    """Read all runs, pool, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("--folder", type=Path, default=Path("outputs/summary"))
    arguments = parser.parse_args()
    check_place("--folder", arguments.folder)
    print(write_summary(arguments.runs, arguments.folder))


if __name__ == "__main__":
    command.run(main)
