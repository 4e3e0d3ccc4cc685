"""The order of a guarded step, for any training loop; nothing here knows Lightning."""
