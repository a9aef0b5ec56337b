"""The command that times a bundle: bench."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from packforcing.app.cli.options import bundle_option, json_option, option, run_options
from packforcing.app.cli.output import print_json, print_tables
from packforcing.app.cli.progress import count_meter


@click.command()
@bundle_option()
@option(
    "--blocks",
    type=click.IntRange(2, 10_000),
    default=20,
    show_default=True,
    metavar="N",
    help="Blocks to count, after those that fill the history.",
)
@run_options
@json_option
def bench(
    bundle: Path | None, blocks: int, threads: int | None, backend: str, as_json: bool
) -> None:
    """Time a bundle on this machine.

    Makes a video and encodes it, as `render` does. Prints milliseconds of each call, frames per
    second from noise to H.264, the time until the first frame, memory against the plan, and the
    share of the roofline: of a GPU's published figures, or on the CPU of a matrix product that is
    timed before and after. Other programs slow it down: leave the machine alone meanwhile.

    Needs `pip install "packforcing[cpu]"` or what --backend takes.

    \b
    Examples:
      packforcing bench
      packforcing bench my-bundle --backend tensorrt-rtx --json
    """
    import msgspec

    from packforcing.app.reports.bench import bench_tables
    from packforcing.runtime import Session, demo_bundle
    from packforcing.runtime.bench import run_benchmark

    directory = bundle or demo_bundle()
    open_session = partial(Session.open, directory, threads=threads, backend=backend)
    with count_meter("timing", "blocks", quiet=as_json) as on_block:
        result = run_benchmark(directory, open_session, blocks=blocks, on_block=on_block)
    if as_json:
        print_json(msgspec.to_builtins(result))
    else:
        print_tables(*bench_tables(result))
