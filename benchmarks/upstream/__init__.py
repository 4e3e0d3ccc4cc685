"""Lightning's own tests with the guard in every Trainer; those that fail, with an empty callback in its place."""
