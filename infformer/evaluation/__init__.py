"""How well a model reads: figures that do not depend on batch size, order or number of processes."""
