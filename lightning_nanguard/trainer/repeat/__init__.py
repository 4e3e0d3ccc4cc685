"""Runs steps, windows of accumulation and updates again after a fault."""
