"""Checkpoint files: the guard writes no poisoned one, and resumes from none without notice."""
