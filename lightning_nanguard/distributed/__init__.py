"""Communication among the ranks of a run, through ``torch.distributed`` and sockets."""
