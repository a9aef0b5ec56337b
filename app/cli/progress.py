"""Progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from packforcing.runtime import BlockInfo


@contextmanager
def frame_progress(frames: int, quiet: bool = False) -> Iterator[Callable[[BlockInfo], None]]:
    """A progress bar in frames, with the time left; only for a person who watches."""
    from tqdm import tqdm

    with tqdm(total=frames, unit="frame", disable=quiet or None, leave=False) as bar:
        yield lambda info: bar.update(info.frames - bar.n) and None


@contextmanager
def graph_progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar in graphs."""
    from tqdm import tqdm

    with tqdm(unit="graph", disable=quiet or None, leave=False) as bar:

        def on_graph(name: str, number: int, total: int) -> None:
            bar.total = total
            bar.set_description(name)
            bar.update(number - bar.n)

        yield on_graph


@contextmanager
def count_progress(unit: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in units, told how many are done, of how many."""
    from tqdm import tqdm

    with tqdm(unit=unit, disable=quiet or None, leave=False) as bar:

        def on_unit(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_unit


@contextmanager
def engine_progress(
    quiet: bool,
) -> Iterator[tuple[Callable[[str, str], None], Callable[[str, str, float], None]]]:
    """A line per engine and what happens with it, and a progress bar in percent."""
    from tqdm import tqdm

    form = "{desc} {percentage:3.0f}% |{bar}| {elapsed}"
    with tqdm(total=100, disable=quiet or None, leave=False, bar_format=form) as bar:

        def on_engine(graph: str, text: str) -> None:
            bar.set_description_str("", refresh=False)
            bar.reset()
            if not quiet:
                tqdm.write(f"{graph}: {text}", file=sys.stderr)

        def on_step(graph: str, phase: str, done: float) -> None:
            bar.n = 100 * done
            bar.set_description_str(f"{graph}: {phase.lower()}")  # draws it

        yield on_engine, on_step


def print_status(text: str, quiet: bool) -> None:
    if not quiet and sys.stderr.isatty():
        click.echo(text, err=True)
