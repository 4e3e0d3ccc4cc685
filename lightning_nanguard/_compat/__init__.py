"""Private Lightning access, one file per concern; nothing else in the package touches what Lightning does not promise."""
