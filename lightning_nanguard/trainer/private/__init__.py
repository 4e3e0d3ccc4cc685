"""Access to private parts of Lightning, with one file for each concern."""
