"""Makes the page and the figure of a run from its records."""
