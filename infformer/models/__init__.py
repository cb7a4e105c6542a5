"""Language models with a memory."""
