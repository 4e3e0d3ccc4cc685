"""Gives the trainer's loggers the curves, messages and settings of the guard, and the page of a run."""
