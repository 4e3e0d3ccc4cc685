"""Numbers that no user sets: limits of number formats, of memory, of recursion and of messages."""

from __future__ import annotations

LEAST_LOSS_SCALE = 2.0**-126
"""Smallest scale of a GradScaler, the smallest normal 32-bit number. A smaller one has no 32-bit inverse."""

HALF_SCALE = 2.0**-16
"""Factor on a loss whose gradient overflows in float16, to find out whether float32 holds it: 65,504 becomes 4.3e9."""

LARGEST_WITH_SQUARE = 1.844e19
"""Largest number whose square a 32-bit number can hold. The norm of a larger gradient, and second moments, overflow."""

DEEPEST_PART = 32
"""Levels of nesting down to which a batch is split into parts. Without a limit an object may lead to the whole
program."""

HASHED_FIRST = 16
"""Numbers of each tensor of a sample, spread over it, that the first half of its hash is computed from. If samples are
searched for in a batch, only these are hashed, which takes about 0.1 ms."""

ELEMENTS_AT_ONCE = 1 << 24
"""Elements that are examined at a time, because the results take memory."""

HOST_ALIGNMENT = 64
"""A tensor begins in a block of pinned memory at a multiple of this number of bytes, because vectorised copies need
it."""

LARGEST_BLOCK = 4 << 30
"""Bytes of the largest block of pinned memory that several tensors share."""

LEAST_BLOCK = 1 << 20
"""Bytes of the smallest block of pinned memory that is filled completely."""

RECENT_OPERATIONS = 32
"""Newest operations before an exception among whose inputs the guard looks for the value that caused it."""

EXCEPTION_TEXT = 200
"""Characters of an exception's text that are recorded."""

NUMBERS_PER_MESSAGE = 8
"""Line numbers, samples or names that one message lists. It gives the number of all others."""
