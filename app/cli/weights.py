"""Commands about published weights: models, fetch, import-checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from packforcing.app.cli.options import FOLDER, json_option, option
from packforcing.app.cli.output import print_differences, print_json
from packforcing.app.cli.progress import FileMeters, count_meter, print_status
from packforcing.extras import optional_imports
from packforcing.origins import describe_licenses
from packforcing.presets import TINY_AUTOENCODERS
from packforcing.units import format_file_size


@click.command()
@json_option
def models(as_json: bool) -> None:
    """List the published models, and what they need.

    \b
    Example:
      packforcing models
    """
    import msgspec

    from packforcing.checkpoints.published import (
        PARTS,
        PUBLISHED,
        UNSUPPORTED,
        published_config,
    )
    from packforcing.presets import switch_history
    from packforcing.sampler import describe_steps

    if as_json:
        print_json(
            {
                kind: {
                    **msgspec.to_builtins(row),
                    "config": msgspec.to_builtins(published_config(kind)),
                    "switch_history": switch_history(published_config(kind)),
                }
                for kind, row in PUBLISHED.items()
            }
        )
        return
    for kind, row in PUBLISHED.items():
        config = published_config(kind)
        click.echo(kind)
        if row.refused:
            click.echo(f"  weights only: {row.refused}")
        else:
            click.echo(
                f"  blocks of {config.block_frames}, {describe_steps(config)}; {config.policy}; "
                f"a prompt switch: {switch_history(config)}"
            )
            if row.note:
                click.echo(f"  not as published: {row.note}")
        where = f"{row.source}: {', '.join(row.files)}" if row.source else "not published"
        click.echo(f"  {where}{f', {row.entry}' if row.entry else ''}; license: {row.license}")
    for kind, reason in UNSUPPORTED.items():
        click.echo(f"{kind}\n  not supported: {reason}")
    for name, row in PARTS.items():
        click.echo(f"{name}\n  {row.source}: {', '.join(row.files)}; license: {row.license}")


@click.command()
@click.argument("model", metavar="NAME")
@option(
    "--out", type=FOLDER, metavar="DIR", help="Folder for the files.  [default: downloads/NAME]"
)
@option(
    "--from",
    "folder",
    type=FOLDER,
    metavar="DIR",
    help="Copy from a folder laid out like the repository instead of downloading.",
)
@json_option
def fetch(model: str, out: Path | None, folder: Path | None, as_json: bool) -> None:
    """Download published weights from the Hugging Face hub.

    NAME is one of `packforcing models`. The license is shown first. Running the command again
    resumes an interrupted download. Every checksum is verified. Without a network, files come from
    the hub's cache on this machine.

    Needs `pip install "packforcing[fetch]"`.

    \b
    Examples:
      packforcing fetch self-forcing
      packforcing fetch umt5-xxl --from /media/usb/umt5-xxl
    """
    import msgspec

    from packforcing.checkpoints import fetch as fetching

    target = out or Path("downloads") / model
    offer = fetching.look_up(model, target, folder)
    if not as_json:
        where = offer.folder or f"{offer.source} at {offer.revision[:12]}"
        size = format_file_size(offer.bytes)
        click.echo(f"{model}: {len(offer.files)} files, {size}, from {where}")
        click.echo(f"license of the weights: {offer.license}")
    try:
        record = fetching.fetch(offer, target, FileMeters("fetching", quiet=as_json))
    except KeyboardInterrupt:
        click.echo("run the same command again to resume", err=True)
        raise
    unverified = [path for path, file in offer.files.items() if not file.checksum]
    steps = fetching.next_commands(offer, target)
    if as_json:
        files = {path: msgspec.to_builtins(record[path]) for path in offer.files}
        print_json({"path": str(target), "files": files, "unverified": unverified, "next": steps})
        return
    if unverified:
        click.echo(f"not verified, as no checksum is published: {', '.join(unverified)}")
    click.echo(f"{target}: complete, checksums in {fetching.RECORD}")
    for step in steps:
        click.echo(f"next: {step}")


@click.command("import-checkpoint")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@option(
    "--out", metavar="DIR", required=True, help="Folder for the model. It must be new or empty."
)
@option(
    "--model",
    aliases=["--kind"],
    metavar="NAME",
    help="The model, one of `packforcing models`.  [default: what `fetch` recorded of the file, or "
    "tensors that one model alone has]",
)
@option(
    "--entry",
    metavar="NAME",
    help="Which weights of a file that holds several, like generator or generator_ema.  "
    "[default: those that the model is published to run with]",
)
@option(
    "--vae",
    type=click.Choice(TINY_AUTOENCODERS),
    help="Which tiny autoencoder a FILE holds.  [default: what `fetch` recorded of the file]",
)
@option(
    "--lora-alpha",
    type=float,
    metavar="ALPHA",
    help="Scale of LoRAs that state no alpha: ALPHA over the rank.  [default: the rank]",
)
@option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE[:STRENGTH]",
    help="A LoRA to merge, as if named among FILE... May be used several times.",
)
@json_option
def import_checkpoint(
    files: tuple[str, ...],
    out: str,
    model: str | None,
    entry: str | None,
    vae: str | None,
    lora_alpha: float | None,
    loras: tuple[str, ...],
    as_json: bool,
) -> None:
    """Convert a published checkpoint to a model folder.

    `packforcing export --weights` reads the folder. FILE is a torch checkpoint, a safetensors or
    GGUF file, the index or folder of a sharded one, or a diffusers pipeline's folder. Weights in
    fp8, with scales or without, and in GGUF's quantizations are dequantized. Add LoRAs to merge
    them, as FILE:0.8 for another strength than 1. Add the weights of an autoencoder, the tiny one's
    or Wan's, for export.

    Several models have the same tensors. What `packforcing fetch` downloaded is known by its
    record; for other files, say with --model which model it is. Pickled code is never executed.

    Exit code 2 if a tensor is missing, extra or misshaped; nothing is written then. Needs
    `pip install "packforcing[export]"`, for GGUF files `"packforcing[export,gguf]"`.

    \b
    Examples:
      packforcing import-checkpoint dmd.pt taew2_1.pth --model self-forcing --vae taehv --out mine
      packforcing import-checkpoint longlive_base.pt lora.pt --model longlive --out longlive
      packforcing import-checkpoint dmd.pt style.safetensors:0.8 --model self-forcing --out styled
      packforcing export --weights mine --policy packforcing --out my-bundle
    """
    import msgspec

    from packforcing.checkpoints.published import describe_differences, published

    print_status("loading PyTorch ...", as_json)
    with optional_imports("importing", "export"):
        from packforcing.checkpoints import convert
    with count_meter("importing", "tensors", quiet=as_json) as on_tensor:
        imported = convert.import_checkpoint(
            [*files, *loras],
            out,
            kind=model,
            entry=entry,
            vae=vae,
            lora_alpha=lora_alpha,
            on_tensor=on_tensor,
        )
    folder = imported.folder
    refused = published(folder.kind).refused
    if as_json:
        fields = msgspec.to_builtins(imported)
        differences = describe_differences(folder.config)
        print_json({"path": out, "refused": refused, "differences": differences, **fields})
        return
    for line in imported.lines:
        click.echo(line)
    size = format_file_size(imported.bytes)
    click.echo(f"{out}: {folder.kind} ({imported.why}), {imported.tensors} tensors, {size}")
    click.echo(f"license of the weights: {describe_licenses(folder.origins)}")
    print_differences(folder.config)
    if refused:
        click.echo(f"weights only, {folder.kind} cannot be rendered: {refused}")
    elif not folder.autoencoder:
        click.echo("no autoencoder: export needs the weights of taew2_1 or Wan2.1_VAE as well")
