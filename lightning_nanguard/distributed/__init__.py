"""Agreement between the processes of one run, by ``torch.distributed`` only."""
