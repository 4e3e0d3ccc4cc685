"""Connects the guard to one fit of a Lightning Trainer, with everything that needs Lightning's private parts."""
