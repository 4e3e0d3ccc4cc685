"""What the guard costs: ``python -m benchmarks.overhead``.

Each contender is on and off by turns of a few steps within one run, so that whatever else goes on there, and wherever
tensors happen to lie, both meet it alike.
"""
