"""Makes a plan from a fault and its evidence: pure functions of frozen data. Standard library only."""
