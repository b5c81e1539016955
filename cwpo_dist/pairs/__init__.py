"""The pair record: sources, splits, rejects."""
