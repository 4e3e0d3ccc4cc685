"""Builds the documentation site; standard library only, so that its tests need no mkdocs."""
