"""The command line, `packforcing`: each command checks what is asked for and calls the library.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 an output that
`verify` compared is off, 2 a mistake that a message explains, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from packforcing import __version__
from packforcing.errors import (
    ConfigError,
    ExportError,
    OutputError,
    PackForcingError,
    PromptError,
    RenderStopped,
)
from packforcing.presets import AUTOENCODERS, TINY_AUTOENCODERS

if TYPE_CHECKING:
    from packforcing.config import Config, Policy, Precision
    from packforcing.embeddings import Embedding
    from packforcing.prompts import Prompts, Switch
    from packforcing.runtime import BlockInfo, Session
    from packforcing.runtime.engine_records import Length

START_SECONDS = 2.0  # of a clip to start from; more would leave the model little to do
MOST_BLOCKS = 1000  # of a kind in a history
MOST_PROMPTS = 10_000


class _Commands(click.Group):
    """A group whose commands end in one line instead of a traceback."""

    def main(self, *args: Any, **extra: Any) -> Any:
        for stream in sys.stdout, sys.stderr:
            if isinstance(stream, io.TextIOWrapper):  # a file name may hold what it cannot encode
                stream.reconfigure(errors="backslashreplace")
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "packforcing"
            code = _explain(f"{error.format_message().rstrip('.')} (see {where} --help)")
        except PackForcingError as error:
            code = _explain(str(error))
        except click.Abort:  # made from a KeyboardInterrupt
            click.echo("interrupted: no unfinished file has its final name", err=True)
            code = 130
        sys.exit(code)


def _explain(message: str) -> int:
    """One line about a mistake, and the exit code for it."""
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return 2


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    """Several options as one decorator, for the commands that share them."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_bundle_option = click.option(
    "--bundle", metavar="DIR", help="Exported model to use.  [default: the demo model]"
)
_seed_option = click.option(
    "--seed", default=0, show_default=True, help="The same seed and prompt give the same video."
)
_shape_options = _options(
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
_run_options = _options(
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
_json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.group(
    "packforcing",
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
)
@click.version_option(__version__, prog_name="packforcing")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Long videos from text, in fixed memory plus a small archive of the past.

    Start with `packforcing demo`: it needs no download, no GPU and about a minute.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@main.command()
@click.option(
    "--prompt",
    default="a red star over navy stripes",
    show_default=True,
    help="What to show. An unknown word makes the command list the known ones.",
)
@click.option("--seconds", default=120.0, show_default=True, help="Length of the video.")
@_seed_option
@click.option(
    "--out", metavar="DIR", default="out/demo", show_default=True, help="Folder for the results."
)
@_bundle_option
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
    from packforcing.runtime.video_files import check_output

    directory, config, _ = _checked(bundle, prompt, seconds, seed)
    folder = _folder(out)
    video, page = folder / "demo.mp4", folder / "demo.html"
    check_output(video, config.frames(seconds), config.width, config.height)
    blocks: list[BlockInfo] = []
    with _session(directory) as session:
        with _rendering(config.frames(seconds)) as progress:

            def on_block(info: BlockInfo) -> None:
                blocks.append(info)
                progress(info)

            summary = session.render(prompt, seconds, video, seed, on_block=on_block, resume=True)
        write_report(
            page, video, prompt, seed, config, blocks, summary, memory(config),
            session.manifest.tools,
        )  # fmt: skip
    click.echo(f"video:  {video} ({_speed(summary.frames, config, summary.seconds_total)})")
    click.echo(f"report: {page}")


@main.command()
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
@_bundle_option
@click.option("--seconds", default=10.0, show_default=True, help="Length of the video.")
@_seed_option
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
@_run_options
@_json_option
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
    from packforcing.prompts import as_schedule, read_schedule
    from packforcing.runtime.resume import finished
    from packforcing.runtime.video_files import check_output

    if sum(given is not None for given in (prompt, embedding, schedule)) > 1:
        raise ConfigError("choose one of PROMPT, --embedding and --schedule")
    if embedding is not None:
        asked: Prompts = load_embedding(embedding)
    elif schedule is not None:
        asked = read_schedule(schedule)
    elif prompt is not None:
        asked = prompt
    else:
        raise click.UsageError("Missing argument 'PROMPT', --embedding FILE or --schedule FILE")
    checked = asked
    if encoder is not None:
        switches = as_schedule(asked)
        words = [switch.prompt for switch in switches if isinstance(switch.prompt, str)]
        if not words:
            raise ConfigError("an embedding is encoded already: leave out --encoder")
        checked = _encoded(switches, dict.fromkeys(words, _any_embedding(bundle)))
    directory, config, chosen = _checked(bundle, checked, seconds, seed, policy)
    if not (resume and finished(out)):
        check_output(out, config.frames(seconds), config.width, config.height)
    clip = None if start is None else _read_start(start, config)
    if encoder is not None:  # last, as nothing takes as long to load
        asked = _encoded(switches, dict(zip(words, _encode(words, encoder, quiet=as_json))))
    with (
        _session(directory, chosen, threads, backend, quiet=as_json) as session,
        _rendering(config.frames(seconds), quiet=as_json) as progress,
        _stopping(session),
    ):
        summary = session.render(
            asked, seconds, out, seed, start=clip, on_block=progress, resume=resume
        )
    if as_json:
        import msgspec

        training_free = _training_free(config, chosen or config.policy)
        did = msgspec.to_builtins(summary)
        _print_json({"path": out, "fps": config.fps, "training_free": training_free, **did})
    else:
        fresh = summary.frames - summary.frames_resumed
        click.echo(f"{out}: {_speed(fresh, config, summary.seconds_total)}")
        for switch in summary.prompts[1:]:
            said = switch.prompt or "another embedding"
            click.echo(f"from {switch.seconds:.1f} s ({switch.history}): {said}")
        _say_training_free(config, chosen or config.policy)


@main.command("encode-prompt")
@click.argument("prompt")
@click.option(
    "--encoder",
    metavar="DIR",
    required=True,
    help="Folder of UMT5-XXL: as fetched, for transformers, or of a diffusers Wan.",
)
@click.option("--out", metavar="FILE.safetensors", required=True, help="What to write.")
@click.option("--int8", is_flag=True, help="Keep most weights in 8 bits: less memory, less exact.")
@_json_option
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
    from packforcing.embeddings import check_target, save_embedding

    check_target(out)
    [embedding] = _encode([prompt], encoder, int8=int8, quiet=as_json)
    save_embedding(out, embedding)
    tokens, width = embedding.text.shape
    if as_json:
        _print_json({
            "path": out, "prompt": embedding.prompt, "tokens": tokens, "width": width,
            "encoder": embedding.encoder, "encoder_sha256": embedding.encoder_sha256,
        })  # fmt: skip
    else:
        click.echo(
            f"{out}: {tokens} tokens of width {width}, "
            f"by {embedding.encoder} {embedding.encoder_sha256[:12]}"
        )


@main.command()
@click.option("--out", metavar="DIR", required=True, help="Folder for the bundle.")
@click.option(
    "--model",
    "model_name",
    metavar="NAME",
    help="Which model: demo, wan-1.3b or one of 'packforcing models'.  "
    "[default: what the weights are of, or demo]",
)
@click.option(
    "--weights",
    metavar="PATH",
    help="A folder that import-checkpoint made, or a .safetensors file of the model's own.  "
    "[default for demo: the ones that come along]",
)
@click.option(
    "--random-weights", is_flag=True, help="Use random weights: for tests of size and speed."
)
@_shape_options
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16"]),
    help="Number format of weights, cache and arithmetic.  [default: the model's]",
)
@_json_option
def export(
    out: str,
    model_name: str | None,
    weights: str | None,
    random_weights: bool,
    as_json: bool,
    **shape: Any,
) -> None:
    """Turn a PyTorch model into a bundle.

    A bundle is the folder that `packforcing render` reads. Making one needs PyTorch and ONNX, from
    `pip install ".[export]"` in the checkout; rendering does not.

    \b
    Examples:
      packforcing export --model demo --out my-bundle
      packforcing render "a white star" --bundle my-bundle --out star.mp4
      packforcing export --model wan-1.3b --random-weights --size 640x368 --out sizing
    """
    from packforcing.checkpoints.published import WEIGHTS, read_model_folder
    from packforcing.presets import model_config

    if weights and random_weights:
        raise ConfigError("choose one of --weights and --random-weights")
    if weights and Path(weights).is_dir():
        if model_name:
            raise ConfigError(f"{weights} says itself which model it holds: leave out --model")
        config = read_model_folder(weights).config
        if shape["vae"] not in (None, config.vae):
            raise ConfigError(f"{weights} holds the autoencoder {config.vae}: leave out --vae")
        config = _shaped(config, **shape)
        weights = str(Path(weights) / WEIGHTS)
    else:
        config = _shaped(model_config(model_name or "demo"), **shape)
    if not (weights or random_weights):
        if config.name != "demo":
            raise ConfigError(
                f"no weights of '{config.name}' come along; "
                "name a file with --weights, or use --random-weights"
            )
        weights = str(Path(__file__).parent / "demo" / "model.safetensors")
    try:
        _say("loading PyTorch ...", as_json)
        from packforcing import model
        from packforcing.export.exporter import export_bundle
    except ModuleNotFoundError as error:
        raise ExportError(
            f"exporting needs {error.name}, which is not installed: "
            "pip install '.[export]' in the checkout"
        ) from error
    source = model.open_weights(config, weights) if weights else model.random_weights(config)
    with _exporting(quiet=as_json) as progress:
        manifest = export_bundle(config, source, out, progress)
    size = sum(record.bytes for record in manifest.files.values())
    if as_json:
        import msgspec

        files = msgspec.to_builtins(manifest.files)
        _print_json({"path": out, "bytes": size, "files": files, "tools": manifest.tools})
    else:
        click.echo(f"{out}: {len(manifest.graphs)} graphs of model {config.name}, {_size(size)}")
        _say_training_free(config, config.policy)


@main.command()
@click.argument("name")
@click.option("--out", metavar="DIR", help="Folder for the files.  [default: downloads/NAME]")
@click.option(
    "--from",
    "folder",
    metavar="DIR",
    help="Copy from a folder laid out like the repository, instead of asking the hub.",
)
@_json_option
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
        click.echo(f"{name}: {len(offer.files)} files, {_size(offer.bytes)}, from {where}")
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
        _print_json({"path": str(target), "files": files, "unverified": unknown, "next": steps})
        return
    if unknown:
        click.echo(f"no checksum was known of {', '.join(unknown)}: recorded as it came")
    click.echo(f"{target}: complete, checksums in {fetching.RECORD}")
    for step in steps:
        click.echo(f"next: {step}")


@main.command()
@click.argument("bundle")
@click.option(
    "--prompts",
    metavar="FILE",
    required=True,
    help="Text with a prompt per line, or the .safetensors that encode-prompt made of one.",
)
@click.option("--out", metavar="FILE.safetensors", required=True, help="What to write.")
@click.option("--seconds", default=5.0, show_default=True, help="Length of each video.")
@_seed_option
@_json_option
def calibrate(
    bundle: str, prompts: str, out: str, seconds: float, seed: int, as_json: bool
) -> None:
    """Collect the statistics that `quantize` fits scales to.

    They are of BUNDLE's keys and values, and of what its matrices are multiplied with. Renders
    every prompt without keeping a picture. A cache in 8 bits cuts off what none of them shows: name
    8 or more that differ. The file is written after each, and the same command goes on where it was
    interrupted. Needs `pip install ".[calibration]"` in the checkout.

    \b
    Example:
      packforcing calibrate my-bundle --prompts prompts.txt --out statistics.safetensors
    """
    import msgspec

    try:
        from packforcing.calibration import activations
    except ModuleNotFoundError as error:
        raise ExportError(
            f"calibrating needs {error.name}, which is not installed: "
            "pip install '.[calibration]' in the checkout"
        ) from error
    from packforcing.evaluation.compare import read_prompts

    wanted = [prompt.given for prompt in read_prompts(Path(prompts), seed)]
    with _counting("block", quiet=as_json) as progress:
        source = activations.calibrate(
            bundle, wanted, out, seconds=seconds, seed=seed, on_block=progress
        )
    if as_json:
        _print_json({"path": out, **msgspec.to_builtins(source)})
    else:
        click.echo(f"{out}: {source.done} videos of {source.blocks} blocks by {source.model}")
    _say_few_prompts(source.done)


@main.command()
@click.argument("bundle")
@click.option(
    "--weights",
    type=click.Choice(["int8", "int4", "fp8"]),
    help="Number format of the matrices of all layers but the first and the last.",
)
@click.option(
    "--cache", type=click.Choice(["int8", "fp8"]), help="Number format of keys and values."
)
@click.option(
    "--calibration",
    metavar="FILE",
    help="What calibrate wrote of BUNDLE: for --cache and fp8 weights, and for better int4 ones.",
)
@click.option("--out", metavar="DIR", required=True, help="Folder for the quantised bundle.")
@_json_option
def quantize(
    bundle: str,
    weights: Literal["int8", "int4", "fp8"] | None,
    cache: Literal["int8", "fp8"] | None,
    calibration: str | None,
    out: str,
    as_json: bool,
) -> None:
    """Write BUNDLE again with smaller weights or cache.

    The denoiser's weights become small numbers with scales, in standard ONNX, and take a half
    (int8, fp8) or a quarter (int4) of what they took in fp16; so do the keys and values that it
    writes and reads, and the archive of them. The rest is copied. fp8 is for RTX 40 and later: what
    weights are multiplied with becomes fp8 as well. Needs `pip install ".[calibration]"` in the
    checkout; rendering does not.

    \b
    Examples:
      packforcing quantize my-bundle --weights int8 --out smaller
      packforcing quantize my-bundle --cache int8 --calibration statistics.safetensors --out small
    """
    import msgspec

    try:
        from packforcing.calibration.activations import read
        from packforcing.calibration.weights import quantize_bundle
    except ModuleNotFoundError as error:
        raise ExportError(
            f"quantising needs {error.name}, which is not installed: "
            "pip install '.[calibration]' in the checkout"
        ) from error
    with _counting("matrix", quiet=as_json) as progress:
        done = quantize_bundle(bundle, out, weights, cache, calibration, progress)
    if cache and calibration:
        _say_few_prompts(read(calibration)[0].done)
    if as_json:
        _print_json({"path": out, "weights": weights, "cache": cache, **msgspec.to_builtins(done)})
        return
    if cache:
        click.echo(f"{out}: keys and values in {cache}")
    if not done.snr:
        return
    name, worst = next(iter(done.snr.items()))
    click.echo(
        f"{out}: {len(done.snr)} matrices in {weights}, {worst:.1f} dB above their rounding at "
        f"least ({name}); the denoiser takes {_size(done.after)}, before {_size(done.before)}"
    )


@main.command("import-checkpoint")
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
@_json_option
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
        _say("loading PyTorch ...", as_json)
        from packforcing.checkpoints import convert
    except ModuleNotFoundError as error:
        raise ExportError(
            f"importing needs {error.name}, which is not installed: "
            "pip install '.[export]' in the checkout"
        ) from error
    with _counting("tensor", quiet=as_json) as progress:
        done = convert.import_checkpoint(
            files, out, kind=kind, entry=entry, vae=vae, lora_alpha=lora_alpha, on_tensor=progress
        )
    folder = done.folder
    refused = published(folder.kind).refused
    if as_json:
        _print_json({"path": out, "refused": refused, **msgspec.to_builtins(done)})
        return
    for line in done.said:
        click.echo(line)
    click.echo(f"{out}: {folder.kind} ({done.why}), {done.tensors} tensors, {_size(done.bytes)}")
    click.echo(f"licence of the weights: {folder.licence}")
    if refused:
        click.echo(f"weights only, {folder.kind} cannot be rendered: {refused}")
    elif not folder.autoencoder:
        click.echo("no autoencoder in it: exporting needs one's weights, taew2_1 or Wan2.1_VAE")


@main.command()
@_json_option
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
        _print_json(
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


@main.command()
@click.argument("bundle", required=False)
@_json_option
def inspect(bundle: str | None, as_json: bool) -> None:
    """Show what is in a bundle, and whether it is intact.

    That is the model, how much it remembers, its files, and the memory it renders in. Without
    BUNDLE, of the demo model that comes along. Exit code 2 if a file is missing or damaged.

    \b
    Example:
      packforcing inspect my-bundle
    """
    import msgspec

    from packforcing.runtime import demo_bundle
    from packforcing.runtime.bundle import check_files, read_manifest
    from packforcing.runtime.plan import memory

    directory = Path(bundle) if bundle is not None else demo_bundle()
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    config = manifest.config
    sizes = memory(config)
    if as_json:
        _print_json(
            {
                "path": str(directory),
                "schema_version": manifest.schema_version,
                "config": msgspec.to_builtins(config),
                "tokens": _tokens(config),
                "files": msgspec.to_builtins(manifest.files),
                "files_match": True,
                "memory": sizes,
                "tools": manifest.tools,
            }
        )
        return
    block_seconds = config.block_pixel_frames / config.fps
    rows = {
        "bundle": f"{directory} (schema {manifest.schema_version})",
        "model": f"{config.name}: {config.width}x{config.height} at {config.fps} frames/s, "
        f"blocks of {config.block_pixel_frames} frames ({block_seconds:g} s)",
        "network": f"{config.layers} layers of width {config.dim}, {config.heads} heads, "
        f"{len(config.timesteps)} steps ({config.sampler})",
        "text": f"{config.text_encoder}, at most {config.text_len} words or pieces",
        "history": str(config.policy),
        "tokens": ", ".join(f"{count:,} {name}" for name, count in _tokens(config).items()),
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.tools.items()),
    }
    for name, text in rows.items():
        click.echo(f"{name:<10} {text}")
    _table("files, all intact", {name: record.bytes for name, record in manifest.files.items()})
    _table("memory while rendering", sizes)


@main.command()
@click.argument("bundle")
@click.option(
    "--targets",
    metavar="NAME[,NAME...]",
    help="GPUs to build for: sm75 (RTX 20), sm80, sm86 (RTX 30), sm89 (RTX 40), sm120 (RTX 50), "
    "sm121.  [default: sm86,sm89,sm120; with tensorrt, this machine's]",
)
@click.option(
    "--backend",
    type=click.Choice(["tensorrt-rtx", "tensorrt"]),
    default="tensorrt-rtx",
    show_default=True,
    help="tensorrt-rtx builds on any machine; tensorrt needs the GPU that is to run the engines.",
)
@click.option(
    "--length",
    type=click.Choice(["input", "mask"]),
    default="input",
    show_default=True,
    help="How attention is told which part of the history is valid. Use mask if 'packforcing "
    "verify' finds the denoiser wrong on a GPU.",
)
@click.option(
    "--stream-weights",
    is_flag=True,
    help="Let the denoiser's weights stay in host memory in part, where a plan asks for it.",
)
@_json_option
def build(
    bundle: str,
    targets: str | None,
    backend: str,
    length: Length,
    stream_weights: bool,
    as_json: bool,
) -> None:
    """Build a bundle's engines for NVIDIA GPUs.

    This machine need not have one. Engines are put into BUNDLE/engines, each with the memory it
    takes; those that are up to date are kept.

    \b
    Examples:
      packforcing build my-bundle
      packforcing build my-bundle --targets sm89
    """
    import msgspec

    try:
        from packforcing.export.engines import build_engines
    except ModuleNotFoundError as error:
        raise ExportError(
            f"building needs {error.name}, which is not installed: "
            f"pip install '.[{backend}]' in the checkout"
        ) from error
    with _building(quiet=as_json) as (on_engine, on_step):
        records = build_engines(
            bundle,
            None if targets is None else [name.strip() for name in targets.split(",")],
            backend=backend,
            length=length,
            stream_weights=stream_weights,
            on_engine=on_engine,
            on_step=on_step,
        )
    if as_json:
        engines = msgspec.to_builtins(records)
        _print_json({"path": bundle, "backend": backend, "engines": engines})
        return
    for graph, record in records.items():
        click.echo(
            f"{graph:<12} {_size(record.file.bytes)}; {_size(record.weights)} of weights and "
            f"{_size(max(record.scratch.values()))} of scratch on the card"
        )


@main.command()
@click.argument("bundle", required=False)
@click.option("--model", "model_name", metavar="NAME", help="Which model: demo or wan-1.3b.")
@click.option(
    "--budget",
    metavar="GIB[,GIB...]",
    help="Memory on the card for everything but the CUDA context, in GiB.  "
    "[default: what the model asks for]",
)
@click.option(
    "--target",
    "targets",
    metavar="NAME[,NAME...]",
    help="What the card is, like sm86 (RTX 30), sm89 (RTX 40) or sm120 (RTX 50).  "
    "[default: what BUNDLE was built for, or sm86]",
)
@click.option("--gpu", metavar="NAME", help='A card by name, like "RTX 4060": target and budget.')
@_shape_options
@click.option(
    "--precision",
    metavar="WEIGHTS,CACHE",
    help="Number formats to keep to, like fp16,int8.  [default: the best that fits]",
)
@click.option(
    "--seconds", default=60.0, show_default=True, help="Length of the video, for the archive."
)
@click.option("--picture", metavar="FILE.png", help="Draw what fills the budgets.")
@_json_option
def plan(
    bundle: str | None,
    model_name: str | None,
    budget: str | None,
    targets: str | None,
    gpu: str | None,
    precision: str | None,
    seconds: float,
    picture: str | None,
    as_json: bool,
    **shape: Any,
) -> None:
    """Show what takes memory on a card, and what fits.

    Needs no weights, GPU or engine. Given a budget, gives up precision before history until all
    of it fits; several budgets or targets make a table. Of a BUNDLE whose engines are built, the
    builder's figures replace the estimates, and on a GPU those of the loaded engines stand
    beside them. Exit code 2 if the one budget asked for is too small.

    \b
    Examples:
      packforcing plan --model wan-1.3b --gpu "RTX 4060"
      packforcing plan --model wan-1.3b --budget 4,6,8,12 --target sm86,sm89,sm120
      packforcing plan my-bundle
    """
    from packforcing.app.reports import plan as plan_report
    from packforcing.errors import PlanError
    from packforcing.presets import model_config
    from packforcing.runtime.bundle import read_manifest
    from packforcing.runtime.estimate import find_gpu
    from packforcing.runtime.plan import CUDA_CONTEXT, Plan, choose
    from packforcing.units import GIB

    engines = None
    if bundle is None:
        config = _shaped(model_config(model_name or "wan-1.3b"), **shape)
        kept = _precision(precision, config)
    else:
        if model_name or precision or any(shape.values()):
            raise ConfigError("a bundle has its model, sizes, history and precision already")
        config, kept = read_manifest(bundle).config, None
        engines = plan_report.measured(Path(bundle))
    budgets = [None] if budget is None else _budgets(budget)
    known = engines.targets[:1] if engines else ()
    names = [name.strip() for name in targets.split(",")] if targets else [*known, "sm86"][:1]
    if gpu is not None:
        if targets is not None:
            raise ConfigError("choose one of --gpu and --target")
        card = find_gpu(gpu)
        names = [card.target]
        if budget is None:
            budgets = [card.memory * GIB - CUDA_CONTEXT]
    rows: list[tuple[int | None, str, Plan | PlanError]] = []
    for wanted, target in product(budgets, names):
        try:
            found = choose(
                config, target, wanted, precision=kept, seconds=seconds,
                built=engines and engines.built,
                any_autoencoder=bundle is None and shape["vae"] is None,
            )  # fmt: skip
            rows.append((wanted, target, found))
        except PlanError as error:
            if len(budgets) * len(names) == 1:
                raise
            rows.append((wanted, target, error))
    if picture is not None:
        plan_report.draw(rows, config, Path(picture))
    if as_json:
        _print_json(plan_report.described(rows, config, engines))
        return
    match rows:
        case [(wanted, _, Plan() as only)]:
            lines = plan_report.detail(wanted, only, seconds, engines)
        case _:
            free = kept is None and bundle is None
            lines = plan_report.table(rows, config, free)
    click.echo("\n".join(lines))


@main.command()
@_json_option
def doctor(as_json: bool) -> None:
    """Show what this machine can export, build and run.

    Every "no" comes with what to do about it. Nothing is changed, no model is loaded.

    \b
    Example:
      packforcing doctor
    """
    import msgspec

    from packforcing.runtime.doctor import diagnose

    found = diagnose(Path.cwd())
    if as_json:
        _print_json(msgspec.to_builtins(found))
        return
    memory, total = (f"{count / 2**30:.1f}" for count in (found.memory_free, found.memory_total))
    click.echo(f"packforcing {found.packforcing}, Python {found.python}, {found.system}")
    click.echo(f"CPU     {found.cpu_cores} cores, {memory} of {total} GiB memory free")
    click.echo(f"disk    {found.disk_free / 2**30:.1f} GiB free in {Path.cwd()}")
    if found.driver:
        cuda = "{}.{}".format(*found.driver.cuda)
        click.echo(f"driver  NVIDIA {found.driver.version}, runs CUDA up to {cuda}")
    for gpu in found.gpus:
        free, total = (f"{count / 2**30:.1f}" for count in (gpu.memory_free, gpu.memory_total))
        click.echo(f"GPU {gpu.index}   {gpu.name} ({gpu.target}), {free} of {total} GiB free")
    if found.no_gpu:
        click.echo(f"GPU     {found.no_gpu}")
    click.echo("")
    for capability in found.capabilities:
        answer = "yes" if capability.able else "no"
        click.echo(f"{answer:<4} {capability.name:<30} {capability.detail}")


@main.command()
@click.argument("bundle", required=False)
@click.option(
    "--out", metavar="DIR", default="out/verify", show_default=True, help="Folder for the report."
)
@_json_option
@click.pass_context
def verify(ctx: click.Context, bundle: str | None, out: str, as_json: bool) -> None:
    """Compare what a bundle computes with the same in fp32.

    Every graph runs on recorded inputs, with garbage where it must not read, and every output is
    compared. Without BUNDLE, of the demo model that comes along. Writes verify.html and
    verify.json. Exit code 0 if all outputs are verified, 1 if one missed.

    \b
    Example:
      packforcing verify my-bundle
    """
    from packforcing.app.reports import verify as verify_report
    from packforcing.runtime import demo_bundle

    try:
        from packforcing.export.verify import verify
    except ModuleNotFoundError as error:
        raise ExportError(
            f"verifying needs {error.name}, which is not installed: "
            "pip install '.[cpu,verify]' in the checkout"
        ) from error
    folder = _folder(out)
    with _exporting(quiet=as_json) as progress:
        found = verify(bundle or demo_bundle(), progress)
    page = verify_report.write_reports(folder, found)
    if as_json:
        click.echo(verify_report.as_json(found), nl=False)
    else:
        for line in verify_report.summary(found):
            click.echo(line)
        click.echo(f"report: {page}")
    ctx.exit(1 if found.missed else 0)


@main.command()
@click.argument("videos", metavar="VIDEO...", nargs=-1, required=True)
@click.option(
    "--prompt",
    metavar="TEXT",
    help="What the demo model was asked to show: adds what its own detectors see.",
)
@_json_option
def evaluate(videos: tuple[str, ...], prompt: str | None, as_json: bool) -> None:
    """Measure how each VIDEO holds, ten seconds at a time.

    Consistency of subject and background, colour drift, motion, smoothness and flicker, of any
    video; of the demo model's also whether colour, shape and ground are as the PROMPT says, and
    whether places look the same on return. Nothing is downloaded; a video of any length is read in
    bounded memory. docs/compare.md defines the measures.

    \b
    Example:
      packforcing evaluate square.mp4 --prompt "a blue square over sand checks"
    """
    from packforcing.evaluation.measures import described, probe, table
    from packforcing.evaluation.measures import evaluate as measure

    for video in videos:  # all of them before the first is read
        probe(Path(video))
    found = []
    for video in videos:
        with _counting("frame", quiet=as_json) as on_frame:
            found.append(measure(video, prompt, on_frame))
    if as_json:
        _print_json(described(found))
    else:
        click.echo("\n\n".join("\n".join(table(one)) for one in found))


@main.command()
@click.argument("bundle", required=False)
@click.option(
    "--policies",
    metavar="NAME,...",
    help="Ways to remember; the others are compared with the first. An unknown name makes the "
    "command list the known ones.  [default: packforcing,sliding-window,sink-window]",
)
@click.option(
    "--with",
    "others",
    metavar="DIR",
    multiple=True,
    help="A bundle that was quantised of BUNDLE, to be compared with it, under its own policy; "
    "can be given several times, instead of --policies.",
)
@click.option("--seconds", default=120.0, show_default=True, help="Length of every video.")
@click.option(
    "--prompts",
    metavar="N|FILE",
    default="4",
    show_default=True,
    help="How many to make up, for the demo model; or a file with a prompt in each line, or with "
    "the name of a file of encode-prompt.",
)
@_seed_option
@click.option(
    "--out", metavar="DIR", default="out/compare", show_default=True, help="Folder for the results."
)
@_run_options
@_json_option
def compare(
    bundle: str | None,
    policies: str | None,
    others: tuple[str, ...],
    seconds: float,
    prompts: str,
    seed: int,
    out: str,
    threads: int | None,
    backend: str,
    as_json: bool,
) -> None:
    """Render and measure prompts under several policies.

    Prompts and seeds are the same for all of them. With --with, by several bundles: how much is
    lost with what was quantised of BUNDLE. Without BUNDLE, of the demo model that comes along.
    Writes the videos, compare.json and compare.html, a page with tables, curves, pictures and what
    each block read. What is finished is not rendered again: after an interruption, or with a policy
    more, the same command goes on.

    \b
    Examples:
      packforcing compare --policies packforcing,sliding-window --seconds 120 --prompts 16
      packforcing compare half --with eight --seconds 5 --prompts 16
    """
    from packforcing.app.reports import compare as compare_report
    from packforcing.evaluation.compare import compare as run
    from packforcing.evaluation.compare import draw_prompts, read_prompts
    from packforcing.runtime import demo_bundle
    from packforcing.runtime.bundle import read_manifest

    compare_report.check_matplotlib()
    directory = Path(bundle) if bundle is not None else demo_bundle()
    config = read_manifest(directory).config
    if others and policies:
        raise ConfigError("--with compares bundles, --policies policies: leave one of them out")
    if others:
        chosen = {directory.resolve().name: config.policy}
    else:
        names = (policies or "packforcing,sliding-window,sink-window").split(",")
        chosen = {name: _policy(name, config) for name in map(str.strip, names)}
    if prompts.isdecimal():
        if not 0 < int(prompts) <= MOST_PROMPTS:
            raise ConfigError(f"--prompts takes 1 to {MOST_PROMPTS}; it is {prompts}")
        asked = draw_prompts(config, int(prompts), seed)
    else:
        asked = read_prompts(Path(prompts), seed)
    folder = Path(out)
    with _counting("frame", quiet=as_json) as progress:
        found = run(
            directory, chosen, asked, seconds, folder,
            others={Path(path).resolve().name: Path(path) for path in others},
            backend=backend, threads=threads, progress=progress,
        )  # fmt: skip
    page = compare_report.write_report(folder, found)
    if as_json:
        click.echo((folder / "compare.json").read_text(encoding="utf-8"), nl=False)
    else:
        click.echo("\n".join(compare_report.table(found)))
        click.echo(f"\nreport: {page}")


def _any_embedding(bundle: str | None) -> Embedding:
    """What a bundle's model could be given; raises `ConfigError` if it reads prompts itself."""
    import numpy as np

    from packforcing.embeddings import Embedding
    from packforcing.runtime import demo_bundle
    from packforcing.runtime.bundle import read_manifest

    config = read_manifest(bundle if bundle is not None else demo_bundle()).config
    if config.text_encoder == "words":
        raise ConfigError(f"the {config.name} model reads its prompt itself: leave out --encoder")
    return Embedding(np.zeros((1, config.text_dim), np.float32), "", "", "")


def _encoded(schedule: Sequence[Switch], embeddings: dict[str, Embedding]) -> list[Switch]:
    """A schedule with embeddings in place of words."""
    from dataclasses import replace

    return [
        replace(switch, prompt=embeddings[switch.prompt])
        if isinstance(switch.prompt, str)
        else switch
        for switch in schedule
    ]


def _encode(
    prompts: list[str], encoder: str, *, int8: bool = False, quiet: bool
) -> list[Embedding]:
    """Prompts' embeddings by UMT5, or from the user's cache."""
    from functools import partial

    from tqdm import tqdm

    from packforcing.embeddings import user_cache

    try:
        _say("loading PyTorch ...", quiet)
        from transformers.utils import logging

        from packforcing.checkpoints.umt5 import encode_umt5
    except ModuleNotFoundError as error:
        raise PromptError(
            f"encoding needs {error.name}, which is not installed: "
            "pip install '.[text]' in the checkout"
        ) from error
    logging.set_verbosity_error()
    _say("encoding ...", quiet)
    bar = partial(tqdm, disable=quiet or None, leave=False)
    return encode_umt5(prompts, encoder, "int8" if int8 else "bf16", user_cache(), bar)


def _tokens(config: Config) -> dict[str, int]:
    return {
        "a block": config.block_tokens,
        "a compressed block": config.compressed_tokens,
        "of context": config.context_tokens,
    }


def _shaped(
    config: Config,
    size: str | None,
    block_frames: int | None,
    history: str | None,
    policy: str | None,
    vae: str | None,
    precision: str | None = None,
) -> Config:
    """A config with another frame size, block, history, autoencoder or number format."""
    import msgspec

    from packforcing.config import Precision
    from packforcing.presets import with_autoencoder

    changes: dict[str, Any] = {}
    if size is not None:
        changes["width"], changes["height"] = _numbers(size, "x", "--size", "WxH, like 832x480", 2)
    if block_frames is not None:
        changes["block_frames"] = block_frames
    if precision is not None:
        everywhere = dict.fromkeys(("compute", "weights", "cache"), precision)
        changes["precision"] = msgspec.convert(everywhere, Precision)
    config = msgspec.structs.replace(config, **changes)
    if vae is not None:
        config = with_autoencoder(config, vae)
    if policy is not None:
        config = msgspec.structs.replace(config, policy=_policy(policy, config))
    if history is not None:
        example = "SINK,MID,RECENT, like 2,16,1"
        sink, mid, recent = _numbers(history, ",", "--history", example, 3)
        if max(sink, mid, recent) > MOST_BLOCKS:  # choosing a plan goes through them
            raise ConfigError(
                f"--history takes at most {MOST_BLOCKS} blocks of each; it is '{history}'"
            )
        changed = msgspec.structs.replace(config.policy, sink=sink, mid=mid, recent=recent)
        config = msgspec.structs.replace(config, policy=changed)
    return config


def _policy(name: str, config: Config) -> Policy:
    from packforcing.presets import policies

    known = policies(config)
    if name not in known:
        raise ConfigError(f"unknown policy '{name}'; known policies: {', '.join(known)}")
    return known[name]


def _training_free(config: Config, policy: Policy) -> bool:
    """Whether blocks are compressed without weights made for it."""
    return policy.mid > 0 and not config.compressor_widths


def _say_training_free(config: Config, policy: Policy) -> None:
    if _training_free(config, policy):
        click.echo(
            f"{config.name} has no compressor: past blocks are compressed training-free, by the "
            "low branch alone"
        )


def _say_few_prompts(count: int) -> None:
    from packforcing.calibration.recipes import ENOUGH

    if count < ENOUGH:
        click.echo(
            f"warning: statistics of {count} {'prompt' if count == 1 else 'prompts'}: a cache in 8 "
            f"bits cuts off what only other prompts show; calibrate with {ENOUGH} or more",
            err=True,
        )


def _precision(text: str | None, config: Config) -> Precision | None:
    """Formats of weights and cache as WEIGHTS,CACHE; None for none named."""
    import msgspec

    from packforcing.config import Precision

    if text is None:
        return None
    weights, *cache = text.split(",")
    named = {
        "compute": config.precision.compute,
        "weights": weights,
        "cache": ",".join(cache) or weights,
    }
    try:
        return msgspec.convert(named, Precision)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"--precision takes WEIGHTS,CACHE, like fp16,int8; '{text}' does not work: {error}"
        ) from error


def _budgets(text: str) -> list[int]:
    """Bytes of a list of budgets in GiB, which may say so."""
    budgets = []
    for part in text.split(","):
        try:
            size = float(part.strip().lower().removesuffix("gib"))
        except ValueError:
            size = math.nan
        if not 0 < size < 10_000:
            raise ConfigError(f"--budget takes GiB, like 8 or 4,6.5,12; it is '{text}'")
        budgets.append(int(size * 2**30))
    return budgets


def _numbers(text: str, separator: str, option: str, form: str, count: int) -> list[int]:
    parts = text.split(separator)
    if len(parts) != count or not all(part.isascii() and part.isdigit() for part in parts):
        raise ConfigError(f"{option} takes {form}; it is '{text}'")
    return [int(part) for part in parts]


def _checked(
    bundle: str | None,
    prompt: Prompts,
    seconds: float,
    seed: int,
    policy_name: str | None = None,
) -> tuple[Path, Config, Policy | None]:
    """The bundle, its config and the policy asked for, once the request is known to be possible."""
    from packforcing.runtime import demo_bundle
    from packforcing.runtime.bundle import read_manifest
    from packforcing.runtime.session import check_request

    directory = Path(bundle) if bundle is not None else demo_bundle()
    config = read_manifest(directory).config
    check_request(config, prompt, seconds, seed)
    return directory, config, None if policy_name is None else _policy(policy_name, config)


def _folder(path: str) -> Path:
    """A folder for results, made if it is not there."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}") from error
    return folder


def _session(
    directory: Path,
    policy: Policy | None = None,
    threads: int | None = None,
    backend: str = "onnxruntime",
    quiet: bool = False,
) -> Session:
    from packforcing.runtime import Session

    _say(f"loading {directory} ...", quiet)
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


@contextmanager
def _rendering(frames: int, quiet: bool = False) -> Iterator[Callable[[BlockInfo], None]]:
    """A progress bar in frames, with the time left; only for a person who watches."""
    from tqdm import tqdm

    with tqdm(total=frames, unit="frame", disable=quiet or None, leave=False) as bar:
        yield lambda info: bar.update(info.frames - bar.n) and None


@contextmanager
def _exporting(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar in graphs."""
    from tqdm import tqdm

    with tqdm(unit="graph", disable=quiet or None, leave=False) as bar:

        def on_graph(name: str, number: int, total: int) -> None:
            bar.total = total
            bar.set_description(name)
            bar.update(number - bar.n)

        yield on_graph


@contextmanager
def _counting(unit: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in units, told how many are done, of how many."""
    from tqdm import tqdm

    with tqdm(unit=unit, disable=quiet or None, leave=False) as bar:

        def on_unit(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_unit


@contextmanager
def _building(
    quiet: bool,
) -> Iterator[tuple[Callable[[str, str], None], Callable[[str, str, float], None]]]:
    """A line per engine and what happens with it, and a progress bar in percent."""
    from tqdm import tqdm

    form = "{desc} {percentage:3.0f}% |{bar}| {elapsed}"
    with tqdm(total=100, disable=quiet or None, leave=False, bar_format=form) as bar:

        def on_engine(graph: str, text: str) -> None:
            bar.set_description_str("", refresh=False)
            bar.reset()
            if not quiet:
                tqdm.write(f"{graph}: {text}", file=sys.stderr)

        def on_step(graph: str, phase: str, done: float) -> None:
            bar.n = 100 * done
            bar.set_description_str(f"{graph}: {phase.lower()}")  # draws it

        yield on_engine, on_step


def _say(text: str, quiet: bool) -> None:
    if not quiet and sys.stderr.isatty():
        click.echo(text, err=True)


def _speed(frames: int, config: Config, seconds: float) -> str:
    length = frames / config.fps
    return (
        f"{frames} frames, {length:.1f} s of video in {seconds:.1f} s, "
        f"{length / seconds:.1f} times real time"
    )


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def _table(title: str, sizes: dict[str, int]) -> None:
    click.echo(f"\n{title}:")
    for name, count in sizes.items():
        click.echo(f"  {name:<24} {_size(count):>12}")


def _print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, indent=1))


if __name__ == "__main__":
    main()
