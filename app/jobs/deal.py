"""Deal jobs out to workers that may die: what processes and Ray actors have in common.

A worker opens what it renders with and then gets one job after the other. What it renders claims
its job by the lock of a file, so that workers, several runs with one folder and shards never make a
video twice. A job that another run renders is dealt again until that run has ended it, or has
ended. A worker that dies is replaced and its job resumes. One that cannot work retires, and its
job goes to another.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from packforcing.app.jobs.events import Ended, Event, Made, Retired
from packforcing.errors import BackendError, PackForcingError, RenderLocked, RenderStopped

if TYPE_CHECKING:
    from packforcing.app.jobs.shares import Needs
    from packforcing.runtime import Session

POLL_SECONDS = 0.5  # between looks at jobs that others render, and at signals
_DEATHS = 10  # of workers at the same place, after which it is neither chance nor the user


@dataclass(frozen=True)
class Place:
    """What a worker has of its machine.

    Attributes:
        device: The GPU, among the visible ones.
        threads: CPU threads; None: one for each core.
    """

    device: int = 0
    threads: int | None = None


class Stop:
    """Ends work, before the next call of a graph; from every thread and from signal handlers."""

    def __init__(self) -> None:
        self.requested = False
        self.session: Session | None = None

    def __call__(self) -> None:
        self.requested = True
        if self.session is not None:
            self.session.stop()


OnEvent = Callable[[int, Event], None]  # takes the worker's number from 0 on
Render = Callable[[str, Callable[[Event], None]], None]
"""Renders a job by its ID and reports what happens.

Raises `RenderLocked` where another run renders it, and `RenderStopped`.
"""


class Work(Protocol):
    """What is rendered; it can be pickled.

    Attributes:
        bundles: SHA-256 of the manifests, by the bundles' folders.
        folder: Of the results.
    """

    @property
    def bundles(self) -> Mapping[Path, str]: ...

    @property
    def folder(self) -> Path: ...

    def needs(self, target: str | None = None) -> Needs:
        """Return what a worker takes, on a GPU of an architecture or on the CPU."""

    def open(self, place: Place, stop: Stop) -> AbstractContextManager[Render]:
        """Open what renders, in the worker."""

    def fail(self, job_id: str, error: str) -> Ended:
        """Give a job up at which workers die one after the other."""


@dataclass(frozen=True)
class Ready:
    """A worker waits for a job."""


@dataclass(frozen=True)
class Locked:
    """Another run renders the job."""

    id: str


@dataclass(frozen=True)
class Gone:
    """A worker has ended."""

    reason: str  # how, if nobody told it to, like "with exit code 1"


Message = Event | Ready | Locked | Gone | PackForcingError


class Worker(Protocol):
    """One that renders, as the loop below sees it; no method waits for it."""

    def deal(self, job_id: str) -> None:
        """Give it a job."""

    def stop(self) -> None:
        """Have it end, resumably."""

    def kill(self) -> None:
        """End it."""


class Team(Protocol):
    """A kind of workers.

    Attributes:
        size: How many there are.
    """

    @property
    def size(self) -> int: ...

    def start(self, number: int) -> Worker:
        """Start a worker."""

    def receive(self, seconds: float) -> Iterable[tuple[int, Message]]:
        """Wait until a worker reports something, or for so long."""


class Executor(Protocol):
    """Where work is done."""

    def size(self, jobs: int) -> int:
        """Return how many workers there are for so many jobs."""

    def check(self, work: Work) -> None:
        """Check what can be checked before anything is loaded.

        Raises:
            PackForcingError: The work cannot be done here.
        """

    def render(self, work: Work, ids: Sequence[str], on_event: OnEvent, stop: Stop) -> None:
        """Render until every job has a result, or work is stopped.

        Raises:
            PackForcingError: No worker can work, like one without a GPU.
        """


def serve(
    work: Work,
    place: Place,
    stop: Stop,
    next_job: Callable[[], str | None],
    send: Callable[[Message], None],
) -> None:
    """Render the jobs that a worker is dealt.

    Args:
        work: What is rendered.
        place: The worker's.
        stop: May end the work.
        next_job: Waits for a job; None: there is none any more.
        send: Takes what is to be reported.
    """
    if place.threads is not None:  # not a session's own number: a job resumes with its own
        os.environ["OMP_NUM_THREADS"] = str(place.threads)
    try:
        with work.open(place, stop) as render:
            while not stop.requested:
                send(Ready())
                if (job_id := next_job()) is None:
                    return
                try:
                    render(job_id, send)
                except RenderLocked:
                    send(Locked(job_id))
                except RenderStopped:
                    pass
    except PackForcingError as error:
        send(error)


def render_here(
    work: Work, ids: Iterable[str], on_event: Callable[[Event], None], stop: Stop
) -> None:
    """Render in this process until every job has a result, or work is stopped.

    Args:
        work: What is rendered.
        ids: The jobs.
        on_event: Called with what happens.
        stop: May end the work.

    Raises:
        PackForcingError: The work cannot be opened, or a result not be written.
    """
    waiting = [*ids]
    with work.open(Place(), stop) as render:
        while waiting and not stop.requested:
            locked = []
            for job_id in waiting:
                try:
                    render(job_id, on_event)
                except RenderLocked:
                    locked.append(job_id)
                except RenderStopped:
                    pass
                if stop.requested:
                    return
            if len(locked) == len(waiting):
                time.sleep(POLL_SECONDS)
            waiting = locked


def render_by(team: Team, work: Work, ids: Iterable[str], on_event: OnEvent, stop: Stop) -> None:
    """Render with a team until every job has a result, or work is stopped.

    Args:
        team: Not started yet.
        work: What is rendered.
        ids: The jobs, in the order to begin with.
        on_event: Called with what happens.
        stop: May end the work.

    Raises:
        PackForcingError: No worker is left that could work.
        BackendError: Workers die before they render anything.
    """
    dealer = _Dealer(team, work, [*ids], on_event)
    try:
        while dealer.workers:
            for number, message in team.receive(POLL_SECONDS):
                dealer.take(number, message)
            if stop.requested or not dealer.missing:
                dealer.stop()
            dealer.deal()
    finally:
        for worker in dealer.workers.values():  # only where the caller is interrupted once more
            worker.kill()
    if dealer.failure and dealer.missing and not stop.requested:
        raise dealer.failure


class _Dealer:
    """Which worker has which job.

    Attributes:
        workers: Those that have not ended, by number.
        missing: Jobs without a result.
        failure: Why the first worker that could not work retired.
    """

    def __init__(self, team: Team, work: Work, ids: list[str], on_event: OnEvent) -> None:
        self._team, self._work, self._on_event = team, work, on_event
        self.missing = set(ids)
        self.failure: PackForcingError | None = None
        self._queue = deque(ids)
        self._locked: list[str] = []
        self._unlocked_at = time.monotonic()
        self._jobs: dict[int, str] = {}  # by worker
        self._idle: dict[int, None] = {}  # workers, in order
        self._retired: set[int] = set()
        self._deaths: Counter[str | None] = Counter()  # by job since its latest new block; or none
        self._stopping = False
        self.workers = {number: team.start(number) for number in range(team.size)}

    def stop(self) -> None:
        """Have all workers end."""
        if not self._stopping:
            self._stopping = True
            for worker in self.workers.values():
                worker.stop()

    def deal(self) -> None:
        """Give jobs to the workers that wait for some."""
        if self._locked and time.monotonic() - self._unlocked_at >= POLL_SECONDS:
            self._queue.extend(self._locked)
            self._locked.clear()
            self._unlocked_at = time.monotonic()
        while self._queue and self._idle and not self._stopping:
            job_id = self._queue.popleft()
            if job_id in self.missing:
                number = next(iter(self._idle))
                del self._idle[number]
                self._jobs[number] = job_id
                self.workers[number].deal(job_id)

    def take(self, number: int, message: Message) -> None:
        """Take a worker's message."""
        match message:
            case Ready():
                if (job_id := self._jobs.pop(number, None)) in self.missing and job_id:
                    self._queue.append(job_id)
                self._idle[number] = None
            case Locked():
                self._locked.append(self._jobs.pop(number))
            case Gone():
                self._replace(number, message.reason)
            case PackForcingError():
                self.failure = self.failure or message
                self._retired.add(number)
                if number in self._jobs:  # to the end: it may be what nobody can do
                    self._queue.append(self._jobs.pop(number))
                if self.workers.keys() - self._retired:  # or it is raised
                    self._on_event(number, Retired(str(message)))
            case _:
                if isinstance(message, Made) and not message.recovered:
                    self._deaths[None] = self._deaths[message.id] = 0
                elif isinstance(message, Ended):
                    self.missing.discard(message.id)
                self._on_event(number, message)

    def _replace(self, number: int, reason: str) -> None:
        """Put another worker in the place of one that has ended, unless it was to end."""
        del self.workers[number]
        self._idle.pop(number, None)
        job_id = self._jobs.pop(number, None)
        if self._stopping or number in self._retired:
            return
        if job_id not in self.missing:
            job_id = None
        self._deaths[job_id] += 1
        error = f"its worker ended {_DEATHS} times, {reason}"
        if self._deaths[job_id] < _DEATHS:
            if job_id is not None:
                self._queue.appendleft(job_id)
        elif job_id is None:
            self.failure = BackendError(f"no worker gets as far as rendering: {error}")
            return
        else:
            self.missing.discard(job_id)
            self._on_event(number, self._work.fail(job_id, error))
        self.workers[number] = self._team.start(number)
