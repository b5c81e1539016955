"""One file a stage: reads, calls, commits."""
