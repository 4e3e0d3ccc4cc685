"""Records of interventions, and the sinks that store or show them, one in each file. Standard library only."""
