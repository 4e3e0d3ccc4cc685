"""Remedies, one in each file, and the tools by which they change a run."""
