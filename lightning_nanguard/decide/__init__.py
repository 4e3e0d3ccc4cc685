"""From a fault and its evidence to a plan: pure functions over frozen data. Standard library only."""
