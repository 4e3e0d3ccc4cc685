"""The former name of :mod:`lightning_nanguard.types`, for code written for version 0.1.0."""

from __future__ import annotations

from lightning_nanguard.types import *  # noqa: F403
