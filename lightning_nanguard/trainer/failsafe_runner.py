"""Runs micro-batches, so that an error inside the guard does not end the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from lightning_nanguard.errors import has_to_be_raised
from lightning_nanguard.trainer.private.closures import MicroBatchRun, MicroBatchRunner, is_from_run


@final
class FailsafeRunner:
    """Lets the guard leave the run if it fails while it runs a micro-batch; a ``MicroBatchRunner``.

    Args:
        runner: Runs micro-batches.
        leave: Lets the guard leave the run, because of an error in the named place.
        world_size: Number of processes.
    """

    def __init__(self, runner: MicroBatchRunner, leave: Callable[[str, Exception], None], world_size: int) -> None:
        self._runner = runner
        self._leave = leave
        self._world_size = world_size

    def forward(self, forward: Callable[[], Any]) -> Any:
        """Run the forward pass; return the result."""
        return self._runner.forward(forward)

    def run(self, micro: MicroBatchRun) -> Any:
        """Run a micro-batch; return the result for Lightning."""
        whole, results = micro.whole, []

        def noted() -> Any:
            results.append(whole())
            return results[-1]

        micro.whole = noted
        try:
            return self._runner.run(micro)
        except Exception as error:
            if is_from_run(error) or has_to_be_raised(error, self._world_size):
                raise
            self._leave("a training step", error)
            # After a second run that broke off, gradients may be missing.
            return results[0] if len(results) == 1 else whole()
        finally:
            micro.whole = whole
            results.clear()
