"""Records of what the guard did, and the sinks that keep or show them, one a file. Standard library only."""
