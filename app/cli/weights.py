"""Commands about published weights: models, fetch, import-checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from packforcing.app.cli.options import (
    json_option,
)
from packforcing.app.cli.output import print_json
from packforcing.app.cli.progress import (
    count_progress,
    print_status,
)
from packforcing.errors import (
    ExportError,
)
from packforcing.presets import TINY_AUTOENCODERS
from packforcing.units import format_file_size

if TYPE_CHECKING:
    pass


@click.command()
@json_option
def models(as_json: bool) -> None:
    """List the published models, and what they need beside.

    \b
    Example:
      packforcing models
    """
    import dataclasses

    import msgspec

    from packforcing.checkpoints.published import PARTS, PUBLISHED, published_config

    if as_json:
        print_json(
            {
                kind: {
                    **dataclasses.asdict(row),
                    "config": msgspec.to_builtins(published_config(kind)),
                }
                for kind, row in PUBLISHED.items()
            }
        )
        return
    for kind, row in PUBLISHED.items():
        config = published_config(kind)
        steps = " ".join(f"{step:g}" for step in config.timesteps)
        click.echo(kind)
        if row.refused:
            click.echo(f"  weights only: {row.refused}")
        else:
            first = " ".join(f"{step:g}" for step in config.first_timesteps)
            click.echo(
                f"  blocks of {config.block_frames}, {config.sampler} at {steps}"
                + (f" (the first block at {first})" if first else "")
                + f", shift {config.shift:g}{'' if config.warp else ', not warped'}; "
                f"{config.policy}"
            )
        where = f"{row.source}: {', '.join(row.files)}" if row.source else "no public place known"
        click.echo(f"  {where}{f', {row.entry}' if row.entry else ''}; licence: {row.licence}")
    for name, row in PARTS.items():
        click.echo(f"{name}\n  {row.source}: {', '.join(row.files)}; licence: {row.licence}")


@click.command()
@click.argument("name")
@click.option("--out", metavar="DIR", help="Folder for the files.  [default: downloads/NAME]")
@click.option(
    "--from",
    "folder",
    metavar="DIR",
    help="Copy from a folder laid out like the repository, instead of asking the hub.",
)
@json_option
def fetch(name: str, out: str | None, folder: str | None, as_json: bool) -> None:
    """Download published weights from the Hugging Face hub.

    NAME is one of `packforcing models`. The licence is shown first. An interrupted download goes
    on when the command is run again; every checksum is compared. Without a network, what the hub's
    cache on this machine holds is taken. Needs `pip install ".[fetch]"` in the checkout.

    \b
    Examples:
      packforcing fetch self-forcing
      packforcing fetch umt5-xxl --from /media/usb/umt5-xxl
    """
    from functools import partial

    import msgspec
    from tqdm import tqdm

    from packforcing.checkpoints import fetch as fetching

    target = Path(out if out is not None else f"downloads/{name}")
    offer = fetching.look_up(name, target, None if folder is None else Path(folder))
    if not as_json:
        where = offer.folder or f"{offer.source} at {offer.revision[:12]}"
        click.echo(
            f"{name}: {len(offer.files)} files, {format_file_size(offer.bytes)}, from {where}"
        )
        click.echo(f"licence of the weights: {offer.licence}")
    bar = partial(tqdm, disable=as_json or None, leave=False)
    try:
        record = fetching.fetch(offer, target, bar)
    except KeyboardInterrupt:
        click.echo("interrupted: run the same command again to go on from here", err=True)
        sys.exit(130)
    unknown = [path for path, file in offer.files.items() if not file.checksum]
    steps = fetching.next_steps(offer, target)
    if as_json:
        files = {path: msgspec.to_builtins(record[path]) for path in offer.files}
        print_json({"path": str(target), "files": files, "unverified": unknown, "next": steps})
        return
    if unknown:
        click.echo(f"no checksum was known of {', '.join(unknown)}: recorded as it came")
    click.echo(f"{target}: complete, checksums in {fetching.RECORD}")
    for step in steps:
        click.echo(f"next: {step}")


@click.command("import-checkpoint")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--out", metavar="DIR", required=True, help="Folder for the model; new or empty.")
@click.option(
    "--kind",
    metavar="NAME",
    help="Which model it is, one of 'packforcing models'.  [default: as recognised]",
)
@click.option(
    "--entry",
    metavar="NAME",
    help="What to take of a torch checkpoint, like generator or generator_ema.  "
    "[default: what the model is published to be run with]",
)
@click.option(
    "--vae",
    type=click.Choice(TINY_AUTOENCODERS),
    help="Which of the tiny autoencoders it is.  [default: as its file is named]",
)
@click.option(
    "--lora-alpha",
    type=float,
    metavar="ALPHA",
    help="Scale a LoRA that does not say by ALPHA over its rank.  [default: its rank]",
)
@json_option
def import_checkpoint(
    files: tuple[str, ...],
    out: str,
    kind: str | None,
    entry: str | None,
    vae: str | None,
    lora_alpha: float | None,
    as_json: bool,
) -> None:
    """Turn a published checkpoint into a model's folder.

    `packforcing export --weights` reads it. FILE is a torch checkpoint, a safetensors file, or the
    index or folder of a sharded one. Name with it LoRAs to merge, and an autoencoder's weights,
    which exporting needs: the tiny one's or Wan's. Which model it is, is recognised; nothing in a
    file is executed. Exit code 2 if a tensor is missing, extra or misshaped, and nothing is written
    then.

    \b
    Examples:
      packforcing import-checkpoint self_forcing_dmd.pt taew2_1.pth --out self-forcing
      packforcing import-checkpoint longlive_base.pt lora.pt taew2_1.pth --out longlive
      packforcing export --weights self-forcing --policy packforcing --out my-bundle
    """
    import msgspec

    from packforcing.checkpoints.published import published

    try:
        print_status("loading PyTorch ...", as_json)
        from packforcing.checkpoints import convert
    except ModuleNotFoundError as error:
        raise ExportError(
            f"importing needs {error.name}, which is not installed: "
            "pip install '.[export]' in the checkout"
        ) from error
    with count_progress("tensor", quiet=as_json) as progress:
        done = convert.import_checkpoint(
            files, out, kind=kind, entry=entry, vae=vae, lora_alpha=lora_alpha, on_tensor=progress
        )
    folder = done.folder
    refused = published(folder.kind).refused
    if as_json:
        print_json({"path": out, "refused": refused, **msgspec.to_builtins(done)})
        return
    for line in done.said:
        click.echo(line)
    size = format_file_size(done.bytes)
    click.echo(f"{out}: {folder.kind} ({done.why}), {done.tensors} tensors, {size}")
    click.echo(f"licence of the weights: {folder.licence}")
    if refused:
        click.echo(f"weights only, {folder.kind} cannot be rendered: {refused}")
    elif not folder.autoencoder:
        click.echo("no autoencoder in it: exporting needs one's weights, taew2_1 or Wan2.1_VAE")
