"""Progress on stderr: a bar on a terminal, a line every 30 seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import click

from packforcing.app.jobs.events import Ended, Event, Made, Retired

if TYPE_CHECKING:
    from rich.progress import Progress

    from packforcing.runtime import BlockInfo

LINE_SECONDS = 30  # between lines where stderr is no terminal


class Meter(Protocol):
    """Shows how far a task is."""

    def update(self, done: float, total: float | None = None, label: str | None = None) -> None:
        """Show that `done` of `total` units are finished."""

    def write(self, text: str) -> None:
        """Print a line beside the progress."""


class _Silent:
    def update(self, done: float, total: float | None = None, label: str | None = None) -> None:
        pass

    def write(self, text: str) -> None:
        pass


class LineMeter:
    """Prints a line every `LINE_SECONDS`, for logs of jobs that run for hours.

    Args:
        label: The task, like "rendering".
        unit: What is counted, like "frames".
        clock: Seconds since any moment.
    """

    def __init__(self, label: str, unit: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.label, self.unit, self.clock = label, unit, clock
        self.started = self.printed = clock()
        self.first: tuple[float, float] | None = None  # when and where a resumed task starts

    def update(self, done: float, total: float | None = None, label: str | None = None) -> None:
        now = self.clock()
        first_time, first_done = self.first = self.first or (now, done)
        if now - self.printed < LINE_SECONDS:
            return
        self.printed = now
        line = f"{label or self.label}: {done:,.0f}"
        if total:
            line += f" of {total:,.0f}"
        line += f" {self.unit}, {_clock_time(now - self.started)} elapsed"
        if total and done > first_done:
            left_seconds = (now - first_time) * (total - done) / (done - first_done)
            line += f", about {_clock_time(left_seconds)} left"
        click.echo(line, err=True)

    def write(self, text: str) -> None:
        click.echo(text, err=True)


class _BarMeter:
    """A bar of rich, for a terminal."""

    def __init__(self, progress: Progress, label: str) -> None:
        self.progress = progress
        self.task = progress.add_task(label, total=None)

    def update(self, done: float, total: float | None = None, label: str | None = None) -> None:
        self.progress.update(self.task, completed=done, total=total, description=label)

    def write(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _clock_time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def meter(label: str, unit: str, quiet: bool = False) -> Iterator[Meter]:
    """Show the progress of a task until the block ends.

    Args:
        label: The task, like "rendering".
        unit: What is counted, like "frames"; "bytes" are shown as MB.
        quiet: Show nothing.
    """
    if quiet:
        yield _Silent()
    elif not sys.stderr.isatty():
        yield LineMeter(label, unit)
    else:
        with _bars(unit) as bars:
            yield _BarMeter(bars, label)


def _bars(unit: str) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    counts: list[ProgressColumn] = (
        [DownloadColumn()] if unit == "bytes" else [MofNCompleteColumn(), TextColumn(unit)]
    )
    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), *counts,
        TimeRemainingColumn(), console=Console(stderr=True), transient=True,
    )  # fmt: skip


@contextmanager
def batch_meter(
    jobs: Mapping[str, int], workers: int, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int, Event], None]]:
    """Show the progress of a batch: a bar for all of it and one per worker, or lines.

    Args:
        jobs: Frames by the ID of each job that is to be rendered.
        workers: How many render at once.
        clock: Seconds since any moment.

    Yields:
        Takes the number of a worker and what happened there.
    """
    with ExitStack() as stack:
        whole: Meter = LineMeter("rendering", "frames", clock)
        each: list[Meter] = [_Silent()] * workers
        if sys.stderr.isatty():
            bars = stack.enter_context(_bars("frames"))
            whole = _BarMeter(bars, "rendering")
            if workers > 1:
                each = [_BarMeter(bars, f"worker {number + 1}") for number in range(workers)]
        frames = dict.fromkeys(jobs, 0)
        ended: set[str] = set()
        done, total = 0, sum(jobs.values())

        def show(worker: int, event: Event) -> None:
            nonlocal done
            if isinstance(event, Retired):
                whole.write(f"worker {worker + 1} has ended: {event.error}")
                return
            job_frames = jobs[event.id]
            now = event.frames if isinstance(event, Made) else frames[event.id]
            if isinstance(event, Ended):
                now = job_frames
                if event.id not in ended:
                    ended.add(event.id)
                    text = f"failed: {event.error}" if event.error else event.status
                    whole.write(f"{event.id}: {text}")
            done += now - frames[event.id]
            frames[event.id] = now
            if event.id not in ended:
                each[worker].update(now, job_frames, f"worker {worker + 1}: {event.id}")
            whole.update(done, total, f"{len(ended)} of {len(jobs)} jobs")

        yield show


@contextmanager
def frame_meter(quiet: bool = False) -> Iterator[Callable[[BlockInfo], None]]:
    """Show the frames of a render; recovered ones would promise a speed that is not theirs."""
    with meter("rendering", "frames", quiet) as frames:

        def show_block(info: BlockInfo) -> None:
            if not info.recovered:
                frames.update(info.frames, info.frames_total)

        yield show_block


@contextmanager
def count_meter(label: str, unit: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a count: the callback takes what is done and the total."""
    with meter(label, unit, quiet) as counts:
        yield counts.update


@contextmanager
def graph_meter(label: str, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show a count of graphs: the callback takes a graph's name, its number and the total."""
    with meter(label, "graphs", quiet) as graphs:
        yield lambda name, number, total: graphs.update(number, total, f"{label} {name}")


@contextmanager
def engine_meter(
    quiet: bool,
) -> Iterator[tuple[Callable[[str, str], None], Callable[[str, str, float], None]]]:
    """Print a line per engine, and show the percentage of the one that is built."""
    with meter("building", "%", quiet) as percent:
        yield (
            lambda graph, text: percent.write(f"{graph}: {text}"),
            lambda graph, phase, done: percent.update(100 * done, 100, f"{graph}: {phase.lower()}"),
        )


class FileMeters:
    """Makes a meter per file, with the interface of a tqdm that libraries for downloads call.

    Args:
        label: The task, like "fetching".
        quiet: Show nothing.
    """

    def __init__(self, label: str, quiet: bool) -> None:
        self.label, self.quiet = label, quiet

    def __call__(
        self, *, total: int | None = None, initial: int = 0, desc: str = "", **ignored: Any
    ) -> _FileMeter:
        label = f"{self.label} {desc}".strip()
        return _FileMeter(meter(label, "bytes", self.quiet), initial, total)


class _FileMeter:
    def __init__(self, context: Any, initial: int, total: int | None) -> None:
        self.context, self.n, self.total = context, initial, total

    def __enter__(self) -> _FileMeter:
        self.meter: Meter = self.context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)

    def update(self, size_bytes: float | None = 1) -> None:
        self.n += int(size_bytes or 0)
        self.meter.update(self.n, self.total)


def print_status(text: str, quiet: bool) -> None:
    """Print what takes a while, to a person at a terminal."""
    if not quiet and sys.stderr.isatty():
        click.echo(text, err=True)
