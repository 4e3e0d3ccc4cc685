"""Failing runs of every cause, made from seeds: which cause, place and samples are named, and what others say.

``python -m benchmarks.diagnose`` runs it; ``docs/diagnosis.md`` sums it up.
"""
