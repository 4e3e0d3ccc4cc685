"""The state of a run: the learner, its snapshots, and what one batch changes."""
