"""Commands that make videos: demo, render, encode-prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from packforcing.app.cli.options import (
    bundle_option,
    json_option,
    run_options,
    seed_option,
)
from packforcing.app.cli.output import print_json, print_training_free, result_folder
from packforcing.app.cli.progress import (
    frame_progress,
    print_status,
)
from packforcing.app.cli.settings import (
    policy_by_name,
    training_free,
)
from packforcing.errors import (
    ConfigError,
    PromptError,
    RenderStopped,
)

if TYPE_CHECKING:
    from packforcing.config import Config, Policy
    from packforcing.embeddings import Embedding
    from packforcing.prompts import Prompts, Switch
    from packforcing.runtime import BlockInfo, Session

START_SECONDS = 2.0  # of a clip to start from; more would leave the model little to do


@click.command()
@click.option(
    "--prompt",
    default="a red star over navy stripes",
    show_default=True,
    help="What to show. An unknown word makes the command list the known ones.",
)
@click.option("--seconds", default=120.0, show_default=True, help="Length of the video.")
@seed_option
@click.option(
    "--out", metavar="DIR", default="out/demo", show_default=True, help="Folder for the results."
)
@bundle_option
def demo(prompt: str, seconds: float, seed: int, out: str, bundle: str | None) -> None:
    """Render a first video, with a report about it.

    Uses the small model that comes along, which draws a coloured shape over a ground: two minutes
    of it, from a model that was trained on 5 seconds.

    Writes demo.mp4 and demo.html (a page to open in a browser: pictures from the video, speed,
    memory, and which past blocks each block looked at).

    \b
    Example:
      packforcing demo --prompt "a green circle over sand dots" --seconds 20
    """
    from packforcing.app.reports.demo import write_report
    from packforcing.runtime.plan import memory
    from packforcing.runtime.session import check_request
    from packforcing.runtime.video_files import check_output

    directory, config, _ = _bundle_and_policy(bundle)
    timeline = check_request(config, prompt, seconds, seed)
    folder = result_folder(out)
    video, page = folder / "demo.mp4", folder / "demo.html"
    check_output(video, config.frames(seconds), config.width, config.height)
    blocks: list[BlockInfo] = []
    with _session(directory) as session:
        with frame_progress(config.frames(seconds)) as progress:

            def on_block(info: BlockInfo) -> None:
                blocks.append(info)
                progress(info)

            summary = session.render(timeline, seconds, video, seed, on_block=on_block, resume=True)
        write_report(
            page, video, prompt, seed, config, blocks, summary, memory(config),
            session.manifest.tools,
        )  # fmt: skip
    click.echo(f"video:  {video} ({_format_speed(summary.frames, config, summary.seconds_total)})")
    click.echo(f"report: {page}")


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "--embedding",
    metavar="FILE",
    help="Render from what encode-prompt made of a prompt, instead of PROMPT.",
)
@click.option(
    "--schedule",
    metavar="FILE",
    help="Render prompts that change over time, instead of PROMPT.",
)
@click.option(
    "--encoder",
    metavar="DIR",
    help="Encode prompts first, as encode-prompt does, with UMT5 from this folder.",
)
@click.option(
    "--out",
    metavar="PATH",
    required=True,
    help="What to write: NAME.mp4 (H.264), NAME.mkv (lossless), or FOLDER/ for PNG files.",
)
@bundle_option
@click.option("--seconds", default=10.0, show_default=True, help="Length of the video.")
@seed_option
@click.option(
    "--start",
    metavar="FILE",
    help=f"Picture or clip (its last {START_SECONDS:g} seconds) that the video begins with.",
)
@click.option(
    "--policy",
    metavar="NAME",
    help="How the past is remembered, like packforcing or full-history; an unknown name lists "
    "all.  [default: as the model was made]",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with a render that was interrupted; begin one where there is none.",
)
@run_options
@json_option
def render(
    prompt: str | None,
    embedding: str | None,
    schedule: str | None,
    encoder: str | None,
    out: str,
    bundle: str | None,
    seconds: float,
    seed: int,
    start: str | None,
    policy: str | None,
    resume: bool,
    threads: int | None,
    backend: str,
    as_json: bool,
) -> None:
    """Render PROMPT as a video.

    The demo model reads its prompt itself; a model that reads UMT5's embeddings is given a FILE of
    `packforcing encode-prompt` with --embedding, or the encoder with --encoder.

    The FILE of --schedule is a list of prompts in TOML. A prompt is followed from the first block
    that begins at its time, in seconds. "history" says what happens to the video's memory then:
    keep (default), recompute (the recent blocks, under the new prompt) or cut (a new scene):

    \b
      [[switch]]
      time = 0
      prompt = "a red star over navy stripes"  # or embedding = "fox.safetensors"
      [[switch]]
      time = 5
      prompt = "a blue circle over sand"
      history = "cut"

    The video appears under its name once it is complete. A file that is there already is
    replaced; a folder must be new or empty. Until then what is done is kept in PATH.render: after
    Ctrl-C, SIGTERM, a crash or a full disk, the same command with --resume goes on, and the video
    is the same as if nothing had happened. After the first Ctrl-C the block in work is finished,
    a second one ends at once.

    \b
    Examples:
      packforcing render "a blue square over sand checks" --out square.mp4 --seconds 60
      packforcing render "a red star" --start photo.jpg --out frames/
      packforcing render --embedding fox.safetensors --bundle my-bundle --out fox.mp4
      packforcing render --schedule scenes.toml --seconds 20 --out scenes.mp4
    """
    from packforcing.embeddings import load_embedding
    from packforcing.prompts import read_schedule
    from packforcing.runtime.resume import finished
    from packforcing.runtime.session import check_request, check_schedule
    from packforcing.runtime.video_files import check_output

    if sum(given is not None for given in (prompt, embedding, schedule)) > 1:
        raise ConfigError("choose one of PROMPT, --embedding and --schedule")
    if embedding is not None:
        prompts: Prompts = load_embedding(embedding)
    elif schedule is not None:
        prompts = read_schedule(schedule)
    elif prompt is not None:
        prompts = prompt
    else:
        raise click.UsageError("Missing argument 'PROMPT', --embedding FILE or --schedule FILE")
    directory, config, chosen = _bundle_and_policy(bundle, policy)
    if encoder is None:
        prompts = check_request(config, prompts, seconds, seed)
    else:
        _check_encoder_is_needed(config, prompts)
        check_schedule(config, prompts, seconds, seed)
    if not (resume and finished(out)):
        check_output(out, config.frames(seconds), config.width, config.height)
    clip = None if start is None else _read_start(start, config)
    if encoder is not None:  # last, as nothing takes as long to load
        encoded = _encode_schedule(prompts, encoder, quiet=as_json)
        prompts = check_request(config, encoded, seconds, seed)
    with (
        _session(directory, chosen, threads, backend, quiet=as_json) as session,
        frame_progress(config.frames(seconds), quiet=as_json) as progress,
        _stopping(session),
    ):
        summary = session.render(
            prompts, seconds, out, seed, start=clip, on_block=progress, resume=resume
        )
    if as_json:
        import msgspec

        compressed = training_free(config, chosen or config.policy)
        did = msgspec.to_builtins(summary)
        print_json({"path": out, "fps": config.fps, "training_free": compressed, **did})
    else:
        fresh = summary.frames - summary.frames_resumed
        click.echo(f"{out}: {_format_speed(fresh, config, summary.seconds_total)}")
        for switch in summary.prompts[1:]:
            said = switch.prompt or "another embedding"
            click.echo(f"from {switch.seconds:.1f} s ({switch.history}): {said}")
        print_training_free(config, chosen or config.policy)


@click.command("encode-prompt")
@click.argument("prompt")
@click.option(
    "--encoder",
    metavar="DIR",
    required=True,
    help="Folder of UMT5-XXL: as fetched, for transformers, or of a diffusers Wan.",
)
@click.option("--out", metavar="FILE.safetensors", required=True, help="What to write.")
@click.option("--int8", is_flag=True, help="Keep most weights in 8 bits: less memory, less exact.")
@json_option
def encode_prompt(prompt: str, encoder: str, out: str, int8: bool, as_json: bool) -> None:
    """Turn PROMPT into an embedding to render from.

    For models that read UMT5's embeddings. The encoder runs on the CPU in bfloat16; UMT5-XXL takes
    11.4 GB of memory, and 6.7 GB with --int8. What it made before comes from the user's cache.
    Nothing is downloaded. Needs `pip install ".[text]"` in the checkout; rendering from the file
    does not.

    \b
    Example:
      packforcing encode-prompt "a fox in the snow" --encoder Wan2.1-T2V-1.3B-Diffusers \\
        --out fox.safetensors
    """
    from packforcing.embeddings import check_embedding_path, save_embedding

    check_embedding_path(out)
    [embedding] = _encode([prompt], encoder, int8=int8, quiet=as_json)
    save_embedding(out, embedding)
    tokens, width = embedding.text.shape
    if as_json:
        print_json({
            "path": out, "prompt": embedding.prompt, "tokens": tokens, "width": width,
            "encoder": embedding.encoder, "encoder_sha256": embedding.encoder_sha256,
        })  # fmt: skip
    else:
        click.echo(
            f"{out}: {tokens} tokens of width {width}, "
            f"by {embedding.encoder} {embedding.encoder_sha256[:12]}"
        )


def _check_encoder_is_needed(config: Config, prompts: Prompts) -> None:
    """Raise `ConfigError` where --encoder would have nothing to encode."""
    from packforcing.prompts import as_schedule

    if config.text_encoder == "words":
        raise ConfigError(f"the {config.name} model reads its prompt itself: leave out --encoder")
    if not any(isinstance(switch.prompt, str) for switch in as_schedule(prompts)):
        raise ConfigError("an embedding is encoded already: leave out --encoder")


def _encode_schedule(prompts: Prompts, encoder: str, *, quiet: bool) -> list[Switch]:
    """Replace the words of a schedule by their embeddings."""
    from dataclasses import replace

    from packforcing.prompts import as_schedule

    switches = as_schedule(prompts)
    words = [switch.prompt for switch in switches if isinstance(switch.prompt, str)]
    embeddings = dict(zip(words, _encode(words, encoder, quiet=quiet)))
    return [
        replace(switch, prompt=embeddings[switch.prompt])
        if isinstance(switch.prompt, str)
        else switch
        for switch in switches
    ]


def _encode(
    prompts: list[str], encoder: str, *, int8: bool = False, quiet: bool
) -> list[Embedding]:
    """Prompts' embeddings by UMT5, or from the user's cache."""
    from functools import partial

    from tqdm import tqdm

    from packforcing.embeddings import embedding_cache_folder

    try:
        print_status("loading PyTorch ...", quiet)
        from transformers.utils import logging

        from packforcing.checkpoints.umt5 import encode_umt5
    except ModuleNotFoundError as error:
        raise PromptError(
            f"encoding needs {error.name}, which is not installed: "
            "pip install '.[text]' in the checkout"
        ) from error
    logging.set_verbosity_error()
    print_status("encoding ...", quiet)
    bar = partial(tqdm, disable=quiet or None, leave=False)
    return encode_umt5(prompts, encoder, "int8" if int8 else "bf16", embedding_cache_folder(), bar)


def _bundle_and_policy(
    bundle: str | None, policy_name: str | None = None
) -> tuple[Path, Config, Policy | None]:
    """Find a bundle, its config and the policy of this name."""
    from packforcing.presets import policies
    from packforcing.runtime import demo_bundle
    from packforcing.runtime.bundle import read_manifest

    directory = Path(bundle) if bundle is not None else demo_bundle()
    config = read_manifest(directory).config
    policy = None if policy_name is None else policy_by_name(policy_name, policies(config))
    return directory, config, policy


def _session(
    directory: Path,
    policy: Policy | None = None,
    threads: int | None = None,
    backend: str = "onnxruntime",
    quiet: bool = False,
) -> Session:
    from packforcing.runtime import Session

    print_status(f"loading {directory} ...", quiet)
    return Session.open(directory, policy=policy, threads=threads, backend=backend)


@contextmanager
def _stopping(session: Session) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the render after the block in work; a second one ends it at once."""
    import signal

    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        signal.signal(number, before[signal.Signals(number)])
        received.append(number)
        session.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except RenderStopped as error:
        click.echo(f"{error} with the same command and --resume", err=True)
        raise click.exceptions.Exit(128 + received[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read_start(path: str, config: Config) -> Any:
    """Frames of a picture or a clip's end that make up whole blocks of the video."""
    from packforcing.runtime.video_files import read_start

    blocks = max(1, config.frames(START_SECONDS) // config.block_pixel_frames)
    limit = blocks * config.block_pixel_frames - config.trimmed_frames
    return read_start(path, config.width, config.height, config.fps, limit)


def _format_speed(frames: int, config: Config, seconds: float) -> str:
    length = frames / config.fps
    return (
        f"{frames} frames, {length:.1f} s of video in {seconds:.1f} s, "
        f"{length / seconds:.1f} times real time"
    )
