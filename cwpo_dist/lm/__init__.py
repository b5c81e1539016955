"""Language models in plain torch: tokens, rows, batches, log-probs, loading."""
