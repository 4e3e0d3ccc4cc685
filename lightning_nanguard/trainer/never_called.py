"""Warns if nothing has ever called the hooks of a guard, so that nobody believes that the run was guarded."""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary, finalize, ref

_logger = logging.getLogger("lightning_nanguard")

_waiting: WeakKeyDictionary[object, finalize[[], object]] = WeakKeyDictionary()
_originals: WeakKeyDictionary[object, ref[object]] = WeakKeyDictionary()


def expect_hooks(guard: object) -> None:
    """From now on, warn if the guard is deleted or the process ends before :func:`hooks_called`."""
    _waiting[guard] = finalize(guard, _say)


def hooks_called(guard: object) -> None:
    """The guard is in use: a Trainer has called one of its hooks, or those of a copy of it."""
    waiting = _waiting.pop(guard, None)
    if waiting is not None:
        waiting.detach()
    original = _originals.pop(guard, ref(guard))()
    if original is not None and original is not guard:
        hooks_called(original)


def copied(guard: object, original: object) -> None:
    """The guard is a copy of another one."""
    _originals[guard] = ref(original)


def _say() -> None:
    _logger.warning(
        "NaNGuard: a guard was created, but no Trainer ever called it, so it did nothing. Give it to "
        "Trainer(callbacks=[NaNGuard()]) before fit. A loop that does not call the hooks of Lightning callbacks, such "
        "as a plain Fabric loop, is not guarded."
    )
