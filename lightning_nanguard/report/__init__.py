"""The page and the figure of a run: what was recorded, drawn for whoever comes back to it."""
