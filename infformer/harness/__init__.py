"""The Language Model Evaluation Harness (`lm_eval`), by which others judge, reads with our memory."""
