"""How a model is trained: runtime, optimisation, loop, checkpoints, metrics and trackers."""
