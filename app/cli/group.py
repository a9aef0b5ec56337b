"""The group of commands: loads a command when it is named, turns errors into exit codes.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 an output that
`verify` compared is off, 2 a mistake that a message explains, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import io
import sys
from importlib import import_module
from typing import Any

import click

from packforcing import __version__
from packforcing.errors import PackForcingError

COMMANDS = {  # name: module that defines it
    "demo": "videos",
    "render": "videos",
    "encode-prompt": "videos",
    "models": "weights",
    "fetch": "weights",
    "import-checkpoint": "weights",
    "export": "bundles",
    "calibrate": "bundles",
    "quantize": "bundles",
    "inspect": "bundles",
    "verify": "bundles",
    "build": "bundles",
    "plan": "machine",
    "doctor": "machine",
    "evaluate": "evaluation",
    "compare": "evaluation",
}


class CommandGroup(click.Group):
    """A group that imports commands on demand and ends in one line instead of a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = import_module(f"packforcing.app.cli.{COMMANDS[name]}")
        command: click.Command = getattr(module, name.replace("-", "_"))
        return command

    def main(self, *args: Any, **extra: Any) -> Any:
        for stream in sys.stdout, sys.stderr:
            if isinstance(stream, io.TextIOWrapper):  # a file name may hold what it cannot encode
                stream.reconfigure(errors="backslashreplace")
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "packforcing"
            code = _print_error(f"{error.format_message().rstrip('.')} (see {where} --help)")
        except PackForcingError as error:
            code = _print_error(str(error))
        except click.Abort:  # made from a KeyboardInterrupt
            click.echo("interrupted: no unfinished file has its final name", err=True)
            code = 130
        sys.exit(code)


def _print_error(message: str) -> int:
    """Print one line about a mistake and return its exit code."""
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return 2


@click.group(
    "packforcing",
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
)
@click.version_option(__version__, prog_name="packforcing")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Long videos from text, in fixed memory plus a small archive of the past.

    Start with `packforcing demo`: it needs no download, no GPU and about a minute.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
