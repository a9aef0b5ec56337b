"""The command that publishes a bundle: `push`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from packforcing.app.cli.options import FOLDER, json_option, option
from packforcing.app.cli.output import print_json, print_tables
from packforcing.extras import optional_imports
from packforcing.units import format_file_size


@click.command()
@click.argument("bundle", type=FOLDER, metavar="BUNDLE")
@click.argument("repository", metavar="USER/REPO")
@option("--private", is_flag=True, help="Make the repository a private one.")
@option(
    "--dry-run", is_flag=True, help="Print the model card and what would be pushed; push nothing."
)
@json_option
def push(bundle: Path, repository: str, private: bool, dry_run: bool, as_json: bool) -> None:
    """Push a bundle to the Hugging Face hub.

    The repository is made where there is none. It gets the graphs, the engines if they are up to
    date, and a model card with licenses, memory plan and commands, in one commit. A README.md in
    BUNDLE takes its place. Other files in BUNDLE stay here.

    Log in first, with `hf auth login`. `Session.from_pretrained("USER/REPO")` opens the bundle.

    Needs `pip install "packforcing[fetch]"`.

    \b
    Examples:
      packforcing push my-bundle user/my-bundle --dry-run
      packforcing push my-bundle user/my-bundle --private
    """
    from packforcing import __version__
    from packforcing.app.reports.card import model_card
    from packforcing.app.reports.tables import make_table
    from packforcing.runtime.bundle import read_manifest
    from packforcing.runtime.hub import (
        MODEL_CARD,
        check_repository_name,
        list_bundle_files,
        push_bundle,
    )

    check_repository_name(repository)
    manifest = read_manifest(bundle)
    files, engines = list_bundle_files(bundle)
    own = bundle / MODEL_CARD
    card = own.read_bytes() if own.is_file() else model_card(manifest, engines, repository).encode()
    sizes = {**{name: path.stat().st_size for name, path in files.items()}, MODEL_CARD: len(card)}
    url = ""
    if not dry_run:
        with optional_imports("pushing", "fetch"):
            from huggingface_hub.utils import disable_progress_bars
        if as_json or not sys.stderr.isatty():
            disable_progress_bars()
        message = f"Push {manifest.config.name} with packforcing {__version__}"
        url = push_bundle(files, repository, card, message, private)
    total_bytes = sum(sizes.values())
    if as_json:
        print_json(
            {"repository": repository, "url": url, "bytes": total_bytes, "files": sizes,
             "model_card": card.decode("utf-8", "replace")}
        )  # fmt: skip
        return
    if dry_run:
        rows = ((name, format_file_size(size)) for name, size in sizes.items())
        print_tables(card.decode("utf-8", "replace"), make_table(rows, justify="lr"))
    what = f"{len(sizes)} files, {format_file_size(total_bytes)}"
    click.echo(f"nothing was pushed: {what}" if dry_run else f"{url}: {what}")
