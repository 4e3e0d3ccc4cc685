"""Detectors, which check each reading and return a fault or nothing. Standard library only."""
