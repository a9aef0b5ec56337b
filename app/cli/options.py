"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from packforcing.presets import AUTOENCODERS

if TYPE_CHECKING:
    pass


def options(*options: Callable[..., Any]) -> Callable[..., Any]:
    """Several options as one decorator, for the commands that share them."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


bundle_option = click.option(
    "--bundle", metavar="DIR", help="Exported model to use.  [default: the demo model]"
)
seed_option = click.option(
    "--seed", default=0, show_default=True, help="The same seed and prompt give the same video."
)
shape_options = options(
    click.option("--size", metavar="WxH", help="Pixels of a frame.  [default: the model's]"),
    click.option(
        "--block-frames",
        type=click.IntRange(1, 64),
        metavar="N",
        help="Latent frames made together: 4 in PackForcing, 3 in Self-Forcing.  "
        "[default: the model's]",
    ),
    click.option(
        "--history",
        metavar="SINK,MID,RECENT",
        help="Blocks kept whole at the start, read compressed, and kept whole at the end.  "
        "[default: the model's]",
    ),
    click.option(
        "--policy",
        metavar="NAME",
        help="How the past is remembered, like packforcing or sink-window; an unknown name lists "
        "all.  [default: as the model was published]",
    ),
    click.option(
        "--vae",
        type=click.Choice(list(AUTOENCODERS)),
        help="Autoencoder: a tiny one, or Wan's.  [default: what the weights hold, or the tiny "
        "one; in a plan for a budget, Wan's where nothing else has to go for it]",
    ),
)
run_options = options(
    click.option(
        "--threads", type=click.IntRange(1, 1024), help="CPU threads.  [default: all cores]"
    ),
    click.option(
        "--backend",
        metavar="NAME",
        default="onnxruntime",
        show_default=True,
        help="What runs the model: onnxruntime on the CPU; on a GPU tensorrt-rtx, tensorrt or "
        "onnxruntime-cuda.",
    ),
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
