"""Progress on stderr: a bar on a terminal, a line every 30 seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import click

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
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            ProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        counts: list[ProgressColumn] = (
            [DownloadColumn()] if unit == "bytes" else [MofNCompleteColumn(), TextColumn(unit)]
        )
        with Bars(
            TextColumn("{task.description}", markup=False), BarColumn(), *counts,
            TimeRemainingColumn(), console=Console(stderr=True), transient=True,
        ) as bars:  # fmt: skip
            yield _BarMeter(bars, label)


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
