"""Runs modules outside of a fit, for commands: checks of a configuration, and replays of an incident."""
