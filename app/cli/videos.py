"""Commands that make videos: demo and render."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from packforcing.app.cli.options import (
    FILE,
    LIMIT,
    OTHER_CONTEXT,
    PATH,
    POLICY_HELP,
    SIZE,
    argument_for,
    bundle_option,
    filter_options,
    json_option,
    option,
    out_folder_option,
    run_options,
    seconds_option,
    seed_option,
    step_options,
    strict_option,
)
from packforcing.app.cli.output import make_folder, print_json, print_training_free
from packforcing.app.cli.progress import frame_meter, print_status
from packforcing.app.cli.prompts import check_encoder_is_needed, encode_schedule
from packforcing.app.cli.settings import (
    is_training_free,
    policy_by_name,
    require_size,
    step_overrides,
)
from packforcing.errors import ConfigError, RenderStopped
from packforcing.extras import optional_imports

if TYPE_CHECKING:
    from packforcing.config import Config, Policy
    from packforcing.prompts import Prompts
    from packforcing.runtime import Block, BlockInfo, RenderSummary, Session, Video
    from packforcing.runtime.start_clip import Fit
    from packforcing.sampler import StepOverrides


@click.command()
@option(
    "--prompt",
    metavar="TEXT",
    default="a red star over navy stripes",
    show_default=True,
    help="What to show. An unknown word lists the known ones.",
)
@argument_for("prompt")
@seconds_option(120.0)
@seed_option
@out_folder_option("out/demo")
@bundle_option()
def demo(prompt: str, seconds: float, seed: int, out: Path, bundle: Path | None) -> None:
    """Render a first video, with a report about it.

    The bundled demo model draws a colored shape over a background. The video lasts two minutes;
    the model was trained on clips of 5 seconds.

    Writes demo.mp4 and demo.html. The page shows frames, speed, memory, and which past blocks
    each block read. Running the command again resumes an interrupted render.

    \b
    Example:
      packforcing demo --prompt "a green circle over sand dots" --seconds 20
    """
    from packforcing.app.reports.demo import write_report
    from packforcing.runtime.allocations import memory_by_purpose
    from packforcing.runtime.request import check_request
    from packforcing.runtime.video_files import check_output

    directory, config, _ = bundle_and_policy(bundle)
    timeline = check_request(config, prompt, seconds, seed)
    folder = make_folder(out)
    video, page = folder / "demo.mp4", folder / "demo.html"
    check_output(video, config.frames(seconds), config.width, config.height)
    blocks: list[BlockInfo] = []
    with open_session(directory) as session:
        with frame_meter() as show_block, _stopping(session, "with the same command"):

            def on_block(info: BlockInfo) -> None:
                blocks.append(info)
                show_block(info)

            summary = session.render(timeline, seconds, video, seed, on_block=on_block, resume=True)
        write_report(
            page, video, prompt, seed, config, blocks, summary, memory_by_purpose(config),
            session.manifest.tools,
        )  # fmt: skip
    click.echo(f"video:  {video} ({_format_speed(summary, config)})")
    click.echo(f"report: {page}")


@click.command()
@argument_for("prompt", "[PROMPT]")
@option("--prompt", metavar="TEXT", hidden=True)
@option(
    "--embedding",
    type=FILE,
    metavar="FILE",
    help="Render from an embedding produced by `encode-prompt` instead of PROMPT.",
)
@option(
    "--schedule",
    type=FILE,
    metavar="FILE",
    help="Render a prompt schedule instead of PROMPT.",
)
@option(
    "--encoder",
    type=PATH,
    metavar="DIR",
    help="Encode the prompts first, with UMT5 from this folder or file.",
)
@strict_option
@option(
    "--out",
    metavar="PATH",
    required=True,
    streams=True,
    help="Result: NAME.mp4 or .mov (H.264), .webm (VP9), .gif, .mkv (lossless), FOLDER/ for PNG "
    "files, or - for MP4 on standard output.",
)
@bundle_option()
@seconds_option(10.0)
@seed_option
@option(
    "--start",
    metavar="FILE",
    help="Picture or clip to begin with, a part of --seconds: a picture fills one block, of a clip "
    "the last 2 s count.",
)
@option(
    "--start-fit",
    type=click.Choice(["fill", "fit", "stretch"]),
    default="fill",
    show_default=True,
    help="Where the start has another aspect: fill crops it, fit adds bars, stretch distorts it.",
)
@option(
    "--policy",
    metavar="NAME",
    help=f"{POLICY_HELP} {OTHER_CONTEXT}  [default: the bundle's]",
)
@step_options("bundle")
@filter_options
@option(
    "--size",
    type=SIZE,
    metavar="WxH",
    help="Pixels of a frame: where the bundle has others, the error names a bundle of this size "
    "beside it, or the commands that make one.  [default: the bundle's]",
)
@option(
    "--archive-limit",
    type=LIMIT,
    metavar="BLOCKS",
    help="Archived blocks to keep at most, or host memory for them, like 512MiB; a full archive "
    "thins out evenly.  [default: all]",
)
@option(
    "--resume",
    is_flag=True,
    help="Resume an interrupted render; start a new one where there is none.",
)
@option("--no-metadata", is_flag=True, help="Leave out of the file how it was made.")
@option("--watch", is_flag=True, help="Show the render in a browser, on a page of this machine.")
@run_options
@json_option
def render(
    prompt: str | None,
    embedding: Path | None,
    schedule: Path | None,
    encoder: Path | None,
    strict: bool,
    out: str,
    bundle: Path | None,
    seconds: float,
    seed: int,
    start: str | None,
    start_fit: Fit,
    policy: str | None,
    steps: tuple[float, ...] | int | None,
    first_steps: tuple[float, ...] | int | None,
    shift: float | None,
    commit: Literal["clean", "last-step"] | None,
    scale: int,
    interpolate: int,
    size: tuple[int, int] | None,
    archive_limit: int | str | None,
    resume: bool,
    no_metadata: bool,
    watch: bool,
    threads: int | None,
    backend: str,
    as_json: bool,
) -> None:
    """Render PROMPT as a video.

    The demo model reads PROMPT itself. Other models read an embedding: make one with
    `packforcing encode-prompt` and pass it to --embedding, or pass the encoder to --encoder.

    The FILE of --schedule is a prompt schedule in TOML. Each prompt takes effect at the first block
    that begins at its time or later. Times are in seconds. "history" is keep (nothing is dropped),
    recompute (keys and values of recent blocks are computed again under the new prompt; sink, mid
    and archive stay) or cut (a new scene: all of these are emptied). Default: recompute for
    longlive, keep for other models.

    \b
      [[switch]]
      time = 0
      prompt = "a red star over navy stripes"  # or embedding = "fox.safetensors"
      [[switch]]
      time = 5
      prompt = "a blue circle over sand"
      history = "keep"
      over = 4  # blocks to blend over; not with cut

    PATH is written only on completion and replaces an existing file. A folder must be new or empty.
    Unfinished work is in PATH.render: after Ctrl-C, SIGTERM, a crash or a full disk, the same
    command with --resume finishes it, with the same frames. With --out -, frames are written to
    standard output as they are made, messages go to stderr, and nothing can be resumed.

    The file says how it was made, in its metadata: prompts, seed, policy and bundle. `packforcing
    inspect PATH` shows it.

    \b
    Examples:
      packforcing render "a blue square over sand checks" --out square.mp4 --seconds 60
      packforcing render "a red star" --start photo.jpg --out frames/
      packforcing render "a red star" --seconds 600 --out star.mp4 --watch
      packforcing render --embedding fox.safetensors --bundle my-bundle --out fox.mp4
      packforcing render --schedule scenes.toml --seconds 20 --out scenes.mp4
    """
    import msgspec

    from packforcing.embeddings import load_embedding
    from packforcing.presets import switch_history
    from packforcing.prompts import as_schedule, read_schedule
    from packforcing.runtime.render import render_video
    from packforcing.runtime.request import check_archive_limit, check_request, check_schedule
    from packforcing.runtime.resume import finished
    from packforcing.runtime.start_clip import load_video_start
    from packforcing.runtime.video_files import check_output
    from packforcing.runtime.video_filters import VideoFilters
    from packforcing.runtime.video_forms import STDOUT
    from packforcing.sampler import describe_steps

    filters = VideoFilters(scale, interpolate)
    streamed = out == STDOUT
    if streamed and as_json:
        raise click.UsageError("--json and --out - both write to standard output: leave out one")
    if sum(source is not None for source in (prompt, embedding, schedule)) > 1:
        raise ConfigError("choose one of PROMPT, --embedding and --schedule")
    if embedding is not None:
        prompts: Prompts = load_embedding(embedding)
    elif schedule is not None:
        prompts = read_schedule(schedule)
    elif prompt is not None:
        prompts = prompt
    else:
        raise click.UsageError("Missing argument 'PROMPT', --embedding FILE or --schedule FILE")
    watching = _load_watching() if watch else None
    switches = as_schedule(prompts)
    directory, config, chosen = bundle_and_policy(bundle, policy)
    if size is not None:
        require_size(directory, config, size, backend)
    overrides = step_overrides(config, steps, first_steps, shift, commit)
    own_steps = describe_steps(config)
    config = overrides.apply(config)
    with_policy = msgspec.structs.replace(config, policy=chosen or config.policy)
    check_archive_limit(with_policy, archive_limit, endless=False)
    if encoder is None:
        prompts = check_request(config, prompts, seconds, seed)
    else:
        check_encoder_is_needed(config, prompts)
        check_schedule(config, prompts, seconds, seed)
    if streamed and resume:
        raise click.UsageError("standard output cannot be resumed: leave out --resume")
    if not (resume and finished(out)):
        frames, frame_size = config.frames(seconds), (config.width, config.height)
        check_output(out, filters.rate(frames), *filters.size(*frame_size))
    clip = None if start is None else load_video_start(start, config, start_fit)
    if encoder is not None:  # last, as nothing takes as long to load
        encoded = encode_schedule(prompts, encoder, strict, quiet=as_json)
        prompts = check_request(config, encoded, seconds, seed)
    with (
        open_session(directory, chosen, overrides, threads, backend, as_json) as session,
        session.begin(
            prompts, seed, seconds=seconds, start=None if clip is None else clip.frames,
            lead=None, archive_limit=archive_limit,
        ) as video,
        frame_meter(quiet=as_json) as show_block,
        _stopping(session, "" if streamed else "with the same command and --resume"),
        watching(session, video) if watching else nullcontext() as show_frames,
    ):  # fmt: skip
        summary = render_video(
            session, video, out, on_block=show_block, on_frames=show_frames, resume=resume,
            metadata=not no_metadata, filters=filters,
        )  # fmt: skip
    policy_used = chosen or config.policy
    if as_json:
        training_free = is_training_free(config, policy_used)
        fields = msgspec.to_builtins(summary)
        if clip is not None:
            fields["start"] = {"path": start, **clip.record()}
        fps = filters.rate(config.fps)
        print_json({"path": out, "fps": fps, "training_free": training_free, **fields})
    else:
        say = partial(click.echo, err=streamed)
        name = "standard output" if streamed else out
        say(f"{name}: {_format_speed(summary, config)}")
        if filters:
            width, height = filters.size(config.width, config.height)
            say(f"written at {width}x{height}, {filters.rate(config.fps)} frames/s: {filters}")
        if clip is not None:
            say(f"start: {start}, {clip}")
        for switch in summary.prompts[1:]:
            name = switch.prompt or "another embedding"
            over = f", over {switch.over} blocks" if switch.over > 1 else ""
            say(f"from {switch.seconds:.1f} s ({switch.history}{over}): {name}")
        if any(switch.history is None for switch in switches[1:]):
            default = switch_history(config)
            say(f"a switch without a history: {default}, as {config.name} was published")
        if (used_steps := describe_steps(config)) != own_steps:
            say(f"denoising: {used_steps}; the bundle's: {own_steps}")
        print_training_free(config, policy_used, err=streamed)


def bundle_and_policy(
    bundle: Path | None, policy_name: str | None = None
) -> tuple[Path, Config, Policy | None]:
    """Return a bundle's folder, its config and the policy of this name."""
    from packforcing.presets import policies
    from packforcing.runtime import demo_bundle
    from packforcing.runtime.bundle import read_manifest

    directory = bundle or demo_bundle()
    config = read_manifest(directory).config
    policy = None if policy_name is None else policy_by_name(policy_name, policies(config))
    return directory, config, policy


def open_session(
    directory: Path,
    policy: Policy | None = None,
    steps: StepOverrides | None = None,
    threads: int | None = None,
    backend: str = "onnxruntime",
    quiet: bool = False,
) -> Session:
    """Open a session, with a line for a person who waits."""
    from packforcing.runtime import Session

    print_status(f"loading {directory} ...", quiet)
    return Session.open(directory, policy=policy, steps=steps, threads=threads, backend=backend)


def _load_watching() -> Callable[[Session, Video], AbstractContextManager[Callable[[Block], None]]]:
    """Return what serves a page of a render and prints its address."""
    with optional_imports("--watch", "serve"):
        from packforcing.app.server.watch import watching

    return partial(watching, on_url=lambda url: click.echo(f"watch it on {url}", err=True))


@contextmanager
def _stopping(session: Session, how: str) -> Iterator[None]:
    """Stop before the next call of a graph on the first signal; the next one is obeyed.

    Args:
        session: Makes the video.
        how: The end of the message: how to resume.
    """
    import signal

    from packforcing.app.cli.process import handle_signals

    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        for other, handler in handlers.items():  # of the program: they end it at once
            signal.signal(other, handler)
        received.append(number)
        session.stop()

    try:
        with handle_signals(stop) as handlers:
            yield
    except RenderStopped as error:
        click.echo(f"{error} {how}", err=True)
        number = received[0] if received else signal.SIGINT  # stopped on the page
        raise click.exceptions.Exit(128 + number) from None


def _format_speed(summary: RenderSummary, config: Config) -> str:
    """Say how fast the frames were that this run generated, and how many an earlier one did."""
    frames, earlier = summary.frames_generated, summary.frames - summary.frames_generated
    length_seconds = frames / config.fps
    resumed = f"; {earlier} frames are from an earlier run" if earlier else ""
    if not frames:
        return f"{summary.frames} frames, all from an earlier run"
    return (
        f"{frames} frames, {length_seconds:.1f} s of video in {summary.seconds_generating:.1f} s, "
        f"{length_seconds / summary.seconds_generating:.1f} times real time{resumed}"
    )
