"""The group of commands: loads a command when it is named, turns errors into exit codes.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 an output missed its
tolerance in `verify` or a job of `batch` failed, 2 a mistake that one line explains, 129, 130 and
143 ended by SIGHUP, Ctrl-C and SIGTERM, 141 the reader of the result left.

The result of the commands in `WRITING` is on the disk: what they print is about it, and may be
lost. With --json, and in all other commands, the words are the result: where standard output does
not take them, the exit code says so.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import click

from packforcing import __version__
from packforcing.app.cli.options import JSON
from packforcing.app.cli.process import (
    BROKEN_PIPE,
    forgive_output,
    interrupted,
    output_error,
)
from packforcing.errors import PackForcingError

GROUPS = {  # heading: names of commands, and the module that has each
    "Make videos": {
        "demo": "videos",
        "render": "videos",
        "batch": "batch",
        "serve": "serve",
        "encode-prompt": "prompts",
    },
    "Prepare models": {
        "models": "weights",
        "fetch": "weights",
        "import-checkpoint": "weights",
        "export": "bundles",
        "calibrate": "bundles",
        "quantize": "bundles",
        "inspect": "bundles",
        "verify": "bundles",
        "push": "push",
    },
    "Prepare for a GPU": {
        "doctor": "machine",
        "plan": "machine",
        "build": "machine",
    },
    "Measure": {
        "bench": "bench",
        "evaluate": "evaluation",
        "compare": "evaluation",
    },
}
COMMANDS = {name: module for group in GROUPS.values() for name, module in group.items()}
WRITING = {
    "demo", "render", "batch", "serve", "encode-prompt", "fetch", "import-checkpoint", "export",
    "calibrate", "quantize", "verify", "push", "build", "compare",
}  # fmt: skip


class CommandGroup(click.Group):
    """A group that imports commands on demand and ends in one line instead of a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = import_module(f"packforcing.app.cli.{COMMANDS[name]}")
        command: click.Command = getattr(module, name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, COMMANDS))
        for heading, names in GROUPS.items():
            rows = []
            for name in names:
                command = self.get_command(ctx, name)
                assert command is not None
                rows.append((name.ljust(width), command.get_short_help_str(formatter.width)))
            with formatter.section(heading):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        code = super().invoke(ctx)  # raises Exit where --help is the result
        if ctx.invoked_subcommand in WRITING and not ctx.meta.get(JSON):
            forgive_output()
        return code

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "packforcing"
            code = _print_error(f"{error.format_message().rstrip('.')} (see {where} --help)")
        except PackForcingError as error:
            if interrupted():  # as where a library did not load because of it
                raise KeyboardInterrupt from error
            code = _print_error(str(error))
        except click.Abort as error:  # raised by click for a KeyboardInterrupt
            raise KeyboardInterrupt from error
        if not code and (failure := output_error()):
            if isinstance(failure, BrokenPipeError):
                code = BROKEN_PIPE
            else:
                code = _print_error(f"cannot write to standard output: {failure.strerror}")
        sys.exit(code)


def _print_error(message: str) -> int:
    """Print one line about a mistake and return its exit code."""
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return 2


@click.group(
    "packforcing",
    cls=CommandGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "PACKFORCING",
    },
    epilog="""\b
Environment variables set defaults: PACKFORCING_RENDER_BUNDLE is for
`render --bundle`, PACKFORCING_BUILD_TARGET for `build --target`.

\b
Completion of commands and options, in ~/.bashrc:
  eval "$(_PACKFORCING_COMPLETE=bash_source packforcing)"
zsh_source and fish_source are for the other shells.
""",
    invoke_without_command=True,
)
@click.version_option(__version__, prog_name="packforcing", allow_from_autoenv=False)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Long videos from text, in GPU memory that is fixed before the first frame.

    An archive of compressed past blocks grows in host memory. `render --archive-limit` caps it.

    Start with `packforcing demo`: it needs no download, no GPU and about a minute.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
