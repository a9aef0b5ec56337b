"""Results on stdout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from packforcing.app.cli.settings import training_free
from packforcing.errors import (
    OutputError,
)

if TYPE_CHECKING:
    from packforcing.config import Config, Policy


def result_folder(path: str) -> Path:
    """A folder for results, made if it is not there."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}") from error
    return folder


def print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, indent=1))


def print_training_free(config: Config, policy: Policy) -> None:
    if training_free(config, policy):
        click.echo(
            f"{config.name} has no compressor: past blocks are compressed training-free, by the "
            "low branch alone"
        )
