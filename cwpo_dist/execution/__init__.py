"""Does a run: its stages in order, one after another or side by side."""
