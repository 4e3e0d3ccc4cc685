"""Runs that are killed: what a SIGKILL at any moment leaves on the disk, and whether the next run goes on."""
