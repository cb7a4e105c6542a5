"""The command of the Language Model Evaluation Harness, with the model `infformer` in it; see docs/harness.md.

python scripts/evaluate_with_harness.py --model infformer --model_args checkpoint=CHECKPOINT --tasks wikitext
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import sys


def main() -> None:
    """Hand everything over to the harness."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(
            f"error: this needs the Language Model Evaluation Harness ({error}): pip install 'infformer[harness]' "
            "(from a checkout: pip install -e '.[harness]')"
        )
    import infformer.harness.adapter  # noqa: F401, which makes the model known

    cli_evaluate()


if __name__ == "__main__":
    command.run(main)
