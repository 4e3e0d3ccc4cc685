"""Checkpoint files: the guard writes no poisoned one, and does not resume from one without notice."""
