"""Remedies, one a file, and what they use to change a run."""
