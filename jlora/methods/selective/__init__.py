"""Trained parts of what is there: scales, rows, norms, biases."""
