"""Causes that lie in the model and its loss as they are, seen layer by layer in one forward and backward pass."""
