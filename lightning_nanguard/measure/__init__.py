"""Measures losses, gradients and batches: norms, readings, and whether they are finite."""
