"""Figures of runs and evaluations. They read results files only, and import nothing else of infformer."""

from infformer.plots.evaluation import plot_results
from infformer.plots.run import plot_run

__all__ = ["plot_results", "plot_run"]
