"""Accuracy, calibration and gold reward accuracy."""
