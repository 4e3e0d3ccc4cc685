"""Healthy forms drawn whole from a seed: data, net, loss, optimizer and rate, one file a kind.

:data:`DRAWN` holds all of them. Other than the forms of :mod:`benchmarks.rescue.cases`, whose seed draws rates, weights
and the order of the data, a seed draws here the task itself, so that a thousand draws are a thousand different runs.
"""

from .catalogue import BY_NAME, DRAWN

__all__ = ["BY_NAME", "DRAWN"]
