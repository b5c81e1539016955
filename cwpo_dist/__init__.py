"""Confidence-weighted preference optimisation on Ray and DeepSpeed."""

__version__ = "0.1.0"
