"""Documents, tokens, lanes: what a model reads, and in which order. It knows no model."""
