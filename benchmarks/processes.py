"""Runs the jobs of a benchmark, one after the other or in several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def results(
    measure: Callable[[_Job], _Result],
    jobs: Sequence[_Job],
    workers: int,
    prepare: Callable[[], object] | None = None,
) -> Iterator[_Result]:
    """The result of each job, in the order in which they are finished.

    Args:
        measure: Does one job; a function of a module, so that other processes find it.
        jobs: The jobs.
        workers: Processes; with one, this process does all of them in order.
        prepare: Called once in each process before its first job.
    """
    if workers <= 1:
        if prepare is not None:
            prepare()
        yield from map(measure, jobs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), prepare) as pool:
        for future in as_completed([pool.submit(measure, job) for job in jobs]):
            yield future.result()
