"""The private parts of Lightning that the guard touches, each in one file."""
