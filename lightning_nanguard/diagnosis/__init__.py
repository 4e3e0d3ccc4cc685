"""Finds why a fault happened: ``replay`` gathers clues, and ``rules`` judge them, with one rule for each cause.

This file imports nothing, so that the rules can be imported without torch.
"""
