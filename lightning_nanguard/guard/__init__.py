"""The order of a guarded step, for any training loop. Nothing here depends on Lightning."""
