"""Transient faults: does a run that meets one end bit for bit as the same run without it?"""
