"""Gives the trainer's loggers what the guard records: curves, words, settings and the page of a run."""
