"""Faults of every kind at every place and moment: does a guarded run keep what the guard promises?"""
