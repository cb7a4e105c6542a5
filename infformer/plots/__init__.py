"""Figures of runs and evaluations. They read results files only, and import nothing else of infformer."""
