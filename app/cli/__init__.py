"""The command line, `packforcing`: each command checks its request and calls the library."""

from packforcing.app.cli.group import main

__all__ = ["main"]
