"""Records of interventions, and the sinks that store or show them, one a file. Standard library only."""
