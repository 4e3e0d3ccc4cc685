"""Lightning's own tests with the guard in every Trainer, against the same tests with an empty callback."""
