"""What the commands run on a module outside of a fit: checks of a configuration, and the batches of an incident."""
