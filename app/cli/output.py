"""Print results on stdout: JSON, tables, folders, and lines that several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from packforcing.app.cli.settings import is_training_free
from packforcing.errors import OutputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from packforcing.config import Config, Policy


def print_json(value: dict[str, Any]) -> None:
    """Print a result for programs, in ASCII: right in every encoding of a terminal or pipe."""
    click.echo(json.dumps(value, indent=1))


def print_tables(*renderables: RenderableType) -> None:
    """Print lines and tables: styled on a terminal, plain in a pipe or with NO_COLOR."""
    import sys

    from rich.console import Console

    from packforcing.app.reports.tables import WIDE, render_lines

    width = None if sys.stdout.isatty() else WIDE
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)
    for line in render_lines(console, renderables):
        click.echo(line)


def printable(text: str) -> str:
    """Return a text in one line, without characters that a terminal takes for commands."""
    return "".join(one if one.isprintable() else "?" for one in text)


def make_folder(folder: Path) -> Path:
    """Make a folder for results where there is none.

    Raises:
        OutputError: The folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}") from error
    return folder


def print_differences(config: Config) -> None:
    """Print a line for each difference from how the model was published."""
    from packforcing.checkpoints.published import describe_differences

    for line in describe_differences(config):
        click.echo(f"not as published: {line}")


def print_training_free(config: Config, policy: Policy, *, err: bool = False) -> None:
    """Print a line where blocks are compressed without trained weights."""
    if is_training_free(config, policy):
        click.echo(
            f"{config.name} has no compressor: past blocks are compressed training-free, by the "
            "low branch alone",
            err=err,
        )
