"""One fit of a Lightning Trainer: hooks, batches run again, and Lightning's private parts."""
