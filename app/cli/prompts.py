"""Encode prompts with UMT5: the command `encode-prompt`, and what `render --encoder` needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from packforcing.app.cli.options import PATH, argument_for, json_option, option, strict_option
from packforcing.app.cli.output import print_json
from packforcing.app.cli.progress import FileMeters, print_status
from packforcing.errors import ConfigError
from packforcing.extras import optional_imports

if TYPE_CHECKING:
    from packforcing.checkpoints.umt5 import WeightDtype
    from packforcing.config import Config
    from packforcing.embeddings import Embedding
    from packforcing.prompts import Prompts, Switch


@click.command("encode-prompt")
@argument_for("prompt", "PROMPT")
@option("--prompt", metavar="TEXT", required=True, hidden=True)
@option(
    "--encoder",
    type=PATH,
    metavar="DIR",
    required=True,
    help="Folder of UMT5-XXL: as fetched, as saved by transformers, or of a diffusers Wan; or its "
    "file (safetensors or GGUF) with tokenizer.json beside it.",
)
@option("--out", metavar="FILE.safetensors", required=True, help="File for the embedding.")
@option(
    "--weight-dtype",
    type=click.Choice(["bf16", "int8"]),
    default="bf16",
    show_default=True,
    help="Dtype of the encoder's weights: int8 takes less memory and is less exact.",
)
@option("--int8", is_flag=True, hidden=True)
@strict_option
@json_option
def encode_prompt(
    prompt: str,
    encoder: Path,
    out: str,
    weight_dtype: str,
    int8: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Encode PROMPT into an embedding to render from.

    For models that read UMT5's embeddings. UMT5-XXL runs on the CPU in bfloat16. It takes 11.4 GB
    of memory, 6.7 GB with --weight-dtype int8. Embeddings are cached for this user. Nothing is
    downloaded.

    Of a prompt with more than 512 tokens the first 511 are read, as in Wan; a warning shows the
    rest.

    Needs `pip install "packforcing[text]"`; rendering from the file does not.

    \b
    Example:
      packforcing encode-prompt "a fox in the snow" --encoder Wan2.1-T2V-1.3B-Diffusers \\
        --out fox.safetensors
    """
    from packforcing.embeddings import check_embedding_path, save_embedding

    check_embedding_path(out)
    int8 = int8 or weight_dtype == "int8"
    [embedding], unread = _encode([prompt], encoder, strict, int8=int8, quiet=as_json)
    save_embedding(out, embedding)
    tokens, width = embedding.text.shape
    if as_json:
        print_json({
            "path": out, "prompt": embedding.prompt, "tokens": tokens, "width": width,
            "encoder": embedding.encoder, "encoder_sha256": embedding.encoder_sha256,
            "unread": unread.get(embedding.prompt, ""),
        })  # fmt: skip
    else:
        click.echo(
            f"{out}: {tokens} tokens of width {width}, "
            f"by {embedding.encoder} {embedding.encoder_sha256[:12]}"
        )


def check_encoder_is_needed(config: Config, prompts: Prompts) -> None:
    """Raise `ConfigError` where --encoder would have nothing to encode."""
    from packforcing.prompts import as_schedule

    if config.text_encoder == "words":
        raise ConfigError(f"the {config.name} model reads its prompt itself: leave out --encoder")
    if not any(isinstance(switch.prompt, str) for switch in as_schedule(prompts)):
        raise ConfigError("an embedding is encoded already: leave out --encoder")


def encode_schedule(prompts: Prompts, encoder: Path, strict: bool, *, quiet: bool) -> list[Switch]:
    """Replace the words of a schedule by their embeddings."""
    from dataclasses import replace

    from packforcing.prompts import as_schedule

    switches = as_schedule(prompts)
    words = [switch.prompt for switch in switches if isinstance(switch.prompt, str)]
    embeddings = dict(zip(words, _encode(words, encoder, strict, quiet=quiet)[0]))
    return [
        replace(switch, prompt=embeddings[switch.prompt])
        if isinstance(switch.prompt, str)
        else switch
        for switch in switches
    ]


def _encode(
    prompts: list[str], encoder: Path, strict: bool, *, int8: bool = False, quiet: bool
) -> tuple[list[Embedding], dict[str, str]]:
    """Encode prompts with UMT5, or take them from the user's cache.

    Returns:
        The embeddings, and by cleaned prompt what is not read of it, which a warning shows.
    """
    import warnings

    from packforcing.embeddings import embedding_cache_folder
    from packforcing.errors import PromptWarning

    print_status("loading PyTorch ...", quiet)
    with optional_imports("encoding", "text"):
        from transformers.utils import logging

        from packforcing.checkpoints.umt5 import encode_umt5
    logging.set_verbosity_error()
    print_status("encoding ...", quiet)
    meters = FileMeters("hashing", quiet)
    weights: WeightDtype = "int8" if int8 else "bf16"
    cache = embedding_cache_folder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PromptWarning)
        embeddings = encode_umt5(prompts, encoder, weights, cache, meters, strict=strict)
    unread = {}
    for warning in caught:
        if isinstance(warning.message, PromptWarning):
            unread[warning.message.prompt] = warning.message.unread
            click.echo(f"warning: {warning.message}", err=True)
        else:  # of a library
            warnings.showwarning(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return embeddings, unread
