"""Detectors: they look at readings and say what is wrong with the newest one. Standard library only."""
