"""Render the jobs of a folder: in this process, or in several that claim one job after the other.

A worker walks through the jobs and claims each by the lock of its render, so that workers, runs of
the same batch and shards never make a video twice, and need nobody who deals out the work. It waits
for jobs that others render, and takes them over if those end. What a killed worker leaves resumes.

Workers are spawned. Each has a pipe of its own, as a shared queue would not survive a kill: it
reports through it, and stops when it closes, be it that the run was stopped or that it was killed.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from packforcing.app.jobs.events import Began, Ended, Event, Made
from packforcing.app.jobs.records import (
    JobRecord,
    Result,
    read_record,
    record_path,
    remove_files,
    write_record,
)
from packforcing.errors import (
    BackendError,
    BundleError,
    OutputError,
    PackForcingError,
    RenderLocked,
    RenderStopped,
)

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from packforcing.runtime import BlockInfo, Session, Video

_POLL_SECONDS = 0.5  # between looks at jobs that others render, and at signals
_FATAL = (BackendError, BundleError, OutputError)  # of the machine: other jobs would meet it too
_DEATHS = 10  # of workers at the same place, after which it is neither chance nor the user


@dataclass(frozen=True)
class Work:
    """What a worker needs to know.

    Attributes:
        bundle: The bundle's folder.
        folder: Of the jobs.
        ids: Jobs, in the order to begin with.
        backend: Runs the graphs.
        device: The GPU, among the visible ones.
        threads: CPU threads; None: one for each core.
    """

    bundle: Path
    folder: Path
    ids: tuple[str, ...]
    backend: str = "onnxruntime"
    device: int = 0
    threads: int | None = None


OnEvent = Callable[[int, Event], None]  # takes the worker's number from 0 on


class Stop:
    """Ends work, before the next call of a graph; from every thread and from signal handlers."""

    def __init__(self) -> None:
        self.requested = False
        self.session: Session | None = None

    def __call__(self) -> None:
        self.requested = True
        if self.session is not None:
            self.session.stop()


def render_here(work: Work, on_event: Callable[[Event], None], stop: Stop) -> None:
    """Render in this process until every job has a result, or work is stopped.

    Args:
        work: What to render.
        on_event: Called with what happens.
        stop: May end the work.

    Raises:
        PackForcingError: The session cannot be opened, or a record not be written.
    """
    from packforcing.runtime import Session

    with Session.open(work.bundle, backend=work.backend, device=work.device) as session:
        stop.session = session
        waiting = list(work.ids)
        while waiting and not stop.requested:
            locked = []
            for job_id in waiting:
                try:
                    _render_job(session, work.folder, job_id, on_event, stop)
                except RenderLocked:
                    locked.append(job_id)
                except RenderStopped:
                    pass
                if stop.requested:
                    return
            if len(locked) == len(waiting):
                time.sleep(_POLL_SECONDS)
            waiting = locked


def _render_job(
    session: Session, folder: Path, job_id: str, on_event: Callable[[Event], None], stop: Stop
) -> None:
    from packforcing.app.jobs.execute import render_job

    record, began = read_record(record_path(folder, job_id)), 0.0

    @contextmanager
    def making(video: Video) -> Iterator[None]:
        nonlocal began
        began = time.time()
        on_event(Began(job_id, record.frames))
        if stop.requested:
            video.stop()
        yield

    def on_block(info: BlockInfo) -> None:
        on_event(Made(job_id, info.frames, info.recovered))

    if record.result is None:
        error = render_job(session, folder, record, making, on_block, _FATAL)
        record = read_record(record_path(folder, job_id))  # another worker may have ended it
        if record.result is None:
            record = _end_job(folder, record, error, began)
    assert record.result is not None
    on_event(Ended(job_id, record.result.status, record.result.error))


def _end_job(folder: Path, record: JobRecord, error: str | None, began: float) -> JobRecord:
    """Write the result of a job: completed, or why it failed."""
    result = Result(
        "completed" if error is None else "failed", time.time(), began or None, error or ""
    )
    ended = msgspec.structs.replace(record, result=result)
    write_record(folder, ended)
    if error is not None:
        remove_files(folder, record.id, keep_request=True)
    return ended


class _Member:
    """A process of the pool."""

    def __init__(self, number: int, work: Work) -> None:
        context = get_context("spawn")
        self.number, self.work = number, work
        self.job: str | None = None  # that it renders
        self.finished = False
        self.pipe, end = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=_serve, args=(work, end), name=f"packforcing worker {number + 1}", daemon=True
        )
        self.process.start()
        end.close()


def render_in_processes(works: Sequence[Work], on_event: OnEvent, stop: Stop) -> None:
    """Render in a process each until every job has a result, or work is stopped.

    Args:
        works: For each process.
        on_event: Called with what happens.
        stop: May end the work.

    Raises:
        PackForcingError: A worker cannot work, like one without a GPU.
        BackendError: Workers die before they render anything.
    """
    members = {member.pipe: member for member in map(_Member, range(len(works)), works)}
    deaths: Counter[str | None] = Counter()  # by job since its latest new block; None: before one
    failure: PackForcingError | None = None
    stopping = False
    try:
        while members:
            for pipe in connection.wait([*members], _POLL_SECONDS):
                assert isinstance(pipe, Connection)
                member = members[pipe]
                try:
                    message = pipe.recv()
                except (EOFError, OSError, pickle.UnpicklingError):  # it has ended
                    del members[pipe]
                    pipe.close()
                    member.process.join()
                    if member.finished or stop.requested or failure:
                        continue
                    deaths[member.job] += 1
                    if deaths[member.job] >= _DEATHS:
                        error = f"its worker ended {_DEATHS} times, {_exit_of(member.process)}"
                        if member.job is None:
                            failure = BackendError(
                                f"no worker gets as far as rendering: {error}; try --workers 1"
                            )
                            continue
                        ended = _fail(member.work.folder, member.job, error)
                        on_event(member.number, ended)
                    again = _Member(member.number, member.work)
                    members[again.pipe] = again
                    continue
                if isinstance(message, PackForcingError):
                    failure = failure or message
                elif message is None:
                    member.finished = True
                else:
                    if isinstance(message, Began):
                        member.job = message.id
                    elif isinstance(message, Ended) and message.id == member.job:
                        member.job = None
                    elif isinstance(message, Made) and not message.recovered:
                        deaths[None] = deaths[message.id] = 0
                    on_event(member.number, message)
            if (stop.requested or failure) and not stopping:
                stopping = True
                for member in members.values():
                    with suppress(OSError):
                        member.pipe.send("stop")
    finally:
        for member in members.values():  # only where the caller is interrupted once more
            member.process.kill()
            member.process.join()
    if failure:
        raise failure


def _fail(folder: Path, job_id: str, error: str) -> Ended:
    record = read_record(record_path(folder, job_id))
    if record.result is None:
        record = _end_job(folder, record, error, 0.0)
    assert record.result is not None
    return Ended(job_id, record.result.status, record.result.error)


def _exit_of(process: SpawnProcess) -> str:
    code = process.exitcode or 0
    if code >= 0:
        return f"with exit code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"


def _serve(work: Work, pipe: Connection) -> None:
    """Render in a process of its own; signals of the terminal are the parent's."""
    stop = Stop()
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: stop())
    if work.threads is not None:  # not a session's own number: a job resumes with its own
        os.environ["OMP_NUM_THREADS"] = str(work.threads)

    def listen() -> None:
        with suppress(EOFError, OSError):
            pipe.recv()
        stop()

    threading.Thread(target=listen, name="packforcing-stop", daemon=True).start()
    with suppress(BrokenPipeError):  # the parent is gone
        try:
            render_here(work, pipe.send, stop)
        except PackForcingError as error:
            pipe.send(error)
        if not stop.requested:
            pipe.send(None)
