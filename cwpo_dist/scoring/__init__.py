"""The sharded Ray Data pipeline and its scorers."""
