"""What the guard costs: ``python -m benchmarks.overhead``.

Trainers of all contenders take turns of a few steps each on one machine, so that whatever else goes on there meets all
of them alike, and each turn is divided by the bare one of the same round.
"""
