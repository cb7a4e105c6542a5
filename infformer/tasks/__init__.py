"""What is asked of a model: what it learns from, and how well it does it."""
