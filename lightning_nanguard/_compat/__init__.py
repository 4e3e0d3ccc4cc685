"""Private Lightning access, one file per concern: nothing else touches what Lightning does not promise."""
