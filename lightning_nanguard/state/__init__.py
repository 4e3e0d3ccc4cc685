"""The state of a run that may be rewound: the learner, its snapshots, and what one batch changes."""
