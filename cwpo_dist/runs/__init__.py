"""What a run is: its graph and keys, what stages are handed, what is checked before it begins."""
