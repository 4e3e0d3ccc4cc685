"""Does the same work in the processes of a case, as ranks of one DDP run over gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

import torch
import torch.distributed as dist

from .cases import Case

_Result = TypeVar("_Result")

PATIENCE = 900
"""Seconds after which ranks that gave no result are ended."""


def on_ranks(case: Case, work: Callable[[], _Result]) -> _Result:
    """What ``work`` gives on the first rank of the case; here and now where the case has one process.

    Raises:
        RuntimeError: When a rank ended without a result.
    """
    if case.processes == 1:
        return work()
    context = multiprocessing.get_context("fork")  # what ``work`` closes over need not be pickled
    port, ends, ranks = _free_port(), [], []
    for rank in range(case.processes):
        mine, theirs = context.Pipe(duplex=False)
        ranks.append(context.Process(target=_rank, args=(rank, port, case, work, theirs)))
        ranks[-1].start()
        theirs.close()
        ends.append(mine)
    try:
        results = [end.recv() if end.poll(PATIENCE) else None for end in ends]
    except EOFError as error:
        raise RuntimeError(f"a rank of {case.name} ended without a result") from error
    finally:
        for process in ranks:
            process.join(5)
            process.kill()
    if results[0] is None:
        raise RuntimeError(f"the ranks of {case.name} gave no result in {PATIENCE} s")
    return results[0]  # type: ignore[no-any-return]


def _rank(rank: int, port: int, case: Case, work: Callable[[], _Result], result: Connection) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    result.send(work())
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
