"""Several one-thread processes that train one model, each on its own share of the batch.

On a few shared CPU cores this beats threads: processes meet once per step, threads at every
operation, and each of those meetings waits for the slower core.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def run(workers: int, job: Callable, *args) -> None:
    """Calls `job(rank, *args)` in each of `workers` processes, one thread each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
    torch.multiprocessing.spawn(_start, (workers, job, args), workers)


def _start(rank: int, workers: int, job: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    if hasattr(os, "sched_setaffinity"):  # else the system may put both on one core
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    try:
        job(rank, *args)
    finally:
        dist.destroy_process_group()


def _leave_with(parent: int) -> None:
    """A worker whose parent was killed would train on for nobody."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def add_up(tensors: Iterable[Tensor], scale: float = 1.0) -> None:
    """Replaces each tensor by the sum over the processes, times `scale`."""
    tensors = list(tensors)
    if size() == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, part in zip(tensors, flat.mul_(scale).split([t.numel() for t in tensors])):
        t.copy_(part.view_as(t))


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    add_up([p.grad for p in parameters if p.grad is not None], 1 / size())
