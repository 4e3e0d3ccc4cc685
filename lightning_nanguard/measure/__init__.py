"""From losses, gradients and batches to a few numbers: norms, readings, and what is not finite."""
