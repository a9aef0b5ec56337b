"""Render on this machine: in this process, or in several.

Processes are spawned. Each has a pipe of its own, as a shared queue would not survive a kill: jobs
and reports go through it, and the worker stops when it closes, be it that the run was stopped or
that it was killed.
"""

from __future__ import annotations

import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from packforcing.app.jobs.deal import (
    Gone,
    Message,
    OnEvent,
    Place,
    Stop,
    Work,
    render_by,
    render_here,
    serve,
)
from packforcing.app.jobs.shares import check_per_gpu
from packforcing.machine import cpu_cores
from packforcing.runtime.device import VisibleGpu

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess


@dataclass(frozen=True)
class ThisMachine:
    """Divides the GPUs, or the threads of the CPU, among workers; no more of them than jobs.

    Attributes:
        workers: How many.
        gpus: Visible ones; none: the CPU.
    """

    workers: int
    gpus: Sequence[VisibleGpu] = ()

    def size(self, jobs: int) -> int:
        return min(self.workers, jobs)

    def check(self, work: Work) -> None:
        for gpu in self.gpus:
            share = -(-self.workers // len(self.gpus))
            check_per_gpu(share, work.needs(gpu.target).device, gpu)

    def render(self, work: Work, ids: Sequence[str], on_event: OnEvent, stop: Stop) -> None:
        count = self.size(len(ids))
        if count == 1 and not self.gpus:
            return render_here(work, ids, partial(on_event, 0), stop)
        threads = max(1, cpu_cores() // count) if count > 1 else None
        places = [Place(n % max(1, len(self.gpus)), threads) for n in range(count)]
        render_by(Processes(work, places), work, ids, on_event, stop)


class _Process:
    def __init__(self, work: Work, place: Place, number: int) -> None:
        context = get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=_serve, args=(work, place, end), name=f"packforcing worker {number + 1}",
            daemon=True,
        )  # fmt: skip
        self.process.start()
        end.close()

    def deal(self, job_id: str) -> None:
        with suppress(OSError):  # it has ended, which the pipe will tell
            self.pipe.send(job_id)

    def stop(self) -> None:
        with suppress(OSError):
            self.pipe.send(None)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


class Processes:
    """A team of processes, one for each place."""

    def __init__(self, work: Work, places: Sequence[Place]) -> None:
        self._work, self._places = work, places
        # by their pipes, which on Windows are of another class than `Connection`
        self._members: dict[Any, tuple[int, _Process]] = {}
        self.size = len(places)

    def start(self, number: int) -> _Process:
        member = _Process(self._work, self._places[number], number)
        self._members[member.pipe] = number, member
        return member

    def receive(self, seconds: float) -> Iterator[tuple[int, Message]]:
        for pipe in connection.wait([*self._members], seconds):
            number, member = self._members[pipe]
            try:
                message = member.pipe.recv()
            except (EOFError, OSError, pickle.UnpicklingError):  # it has ended
                del self._members[pipe]
                member.pipe.close()
                member.process.join()
                message = Gone(_exit_of(member.process))
            yield number, message


def _exit_of(process: SpawnProcess) -> str:
    code = process.exitcode or 0
    if code >= 0:
        return f"with exit code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"


def _serve(work: Work, place: Place, pipe: Connection) -> None:
    """Render in a process of its own; signals of the terminal are the parent's."""
    stop = Stop()
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: end())
    jobs: SimpleQueue[str | None] = SimpleQueue()

    def end() -> None:
        stop()
        jobs.put(None)

    def listen() -> None:
        with suppress(EOFError, OSError):
            while (job_id := pipe.recv()) is not None:
                jobs.put(job_id)
        end()

    threading.Thread(target=listen, name="packforcing-jobs", daemon=True).start()
    with suppress(BrokenPipeError):  # the parent is gone
        serve(work, place, stop, jobs.get, pipe.send)
