"""Measure a language model: `python eval.py checkpoint=outputs/tiny/checkpoints/best data=sample`."""

from infformer.commands import run_eval

if __name__ == "__main__":
    run_eval()
