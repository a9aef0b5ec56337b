"""Run the command line as `python -m packforcing.app.cli`."""

from packforcing.app.cli import main

main(prog_name="packforcing")
