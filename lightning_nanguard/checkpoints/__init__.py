"""Checkpoint files: no poisoned one is written, and none is resumed from unnoticed."""
