"""Connects the guard to one fit of a Lightning Trainer. Only this package uses Lightning's private parts."""
