"""The command line: `packforcing demo`, `render`, `export` and `inspect`.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 2 a mistake that a
message explains, 130 interrupted.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from packforcing import __version__
from packforcing.errors import ConfigError, ExportError, OutputError, PackForcingError

if TYPE_CHECKING:
    from packforcing.config import Config, Policy
    from packforcing.runtime import BlockInfo, Session

START_SECONDS = 2.0  # of a clip to start from; more would leave the model little to do


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
            click.echo("interrupted: finished files are kept, the unfinished one is gone", err=True)
            code = 130
        sys.exit(code)


def _explain(message: str) -> int:
    """One line about a mistake, and the exit code for it."""
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return 2


_bundle_option = click.option(
    "--bundle", metavar="DIR", help="Exported model to use.  [default: the demo model]"
)
_seed_option = click.option(
    "--seed", default=0, show_default=True, help="The same seed and prompt give the same video."
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

    Start with `packforcing demo`: it needs no download, no GPU and a few seconds.
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
@click.option("--seconds", default=8.0, show_default=True, help="Length of the video.")
@_seed_option
@click.option(
    "--out", metavar="DIR", default="out/demo", show_default=True, help="Folder for the results."
)
@_bundle_option
def demo(prompt: str, seconds: float, seed: int, out: str, bundle: str | None) -> None:
    """Render a first video, with a report about it.

    Uses the small model that comes along, which draws a coloured shape over a ground.

    Writes demo.mp4 and demo.html (a page to open in a browser: pictures from the video, speed,
    memory, and which past blocks each block looked at).

    \b
    Example:
      packforcing demo --prompt "a green circle over sand dots" --seconds 12
    """
    from packforcing.report import write_report
    from packforcing.runtime.buffers import memory
    from packforcing.runtime.video import check_output

    directory, config, _ = _checked(bundle, prompt, seconds, seed)
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}") from error
    video, page = folder / "demo.mp4", folder / "demo.html"
    check_output(video, config.frames(seconds), config.width, config.height)
    blocks: list[BlockInfo] = []
    with _session(directory) as session:
        with _rendering(config.frames(seconds)) as progress:

            def on_block(info: BlockInfo) -> None:
                blocks.append(info)
                progress(info)

            summary = session.render(prompt, seconds, video, seed, on_block=on_block)
        write_report(
            page, video, prompt, seed, config, blocks, summary, memory(config),
            session.manifest.tools,
        )  # fmt: skip
    click.echo(f"video:  {video} ({_speed(summary.frames, config, summary.seconds_total)})")
    click.echo(f"report: {page}")


@main.command()
@click.argument("prompt")
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
    help="How the past is remembered: packforcing, sliding-window, sink-window or full-history.  "
    "[default: as the model was made]",
)
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads.  [default: all cores]")
@_json_option
def render(
    prompt: str,
    out: str,
    bundle: str | None,
    seconds: float,
    seed: int,
    start: str | None,
    policy: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Render PROMPT as a video.

    The video is written while it is made, and appears under its name once it is complete. A
    file that is there already is replaced; a folder must be new or empty.

    \b
    Examples:
      packforcing render "a blue square over sand checks" --out square.mp4 --seconds 60
      packforcing render "a red star" --start photo.jpg --out frames/
    """
    from packforcing.runtime.video import check_output

    directory, config, chosen = _checked(bundle, prompt, seconds, seed, policy)
    check_output(out, config.frames(seconds), config.width, config.height)
    clip = None if start is None else _read_start(start, config)
    with (
        _session(directory, chosen, threads, quiet=as_json) as session,
        _rendering(config.frames(seconds), quiet=as_json) as progress,
    ):
        summary = session.render(prompt, seconds, out, seed, start=clip, on_block=progress)
    if as_json:
        import msgspec

        _print_json({"path": out, "fps": config.fps, **msgspec.to_builtins(summary)})
    else:
        click.echo(f"{out}: {_speed(summary.frames, config, summary.seconds_total)}")


@main.command()
@click.option("--out", metavar="DIR", required=True, help="Folder for the bundle.")
@click.option(
    "--model",
    "model_name",
    metavar="NAME",
    default="demo",
    show_default=True,
    help="Which model: demo or wan-1.3b.",
)
@click.option(
    "--weights",
    metavar="FILE",
    help="Trained weights, a .safetensors file.  [default for demo: the ones that come along]",
)
@click.option(
    "--random-weights", is_flag=True, help="Use random weights: for tests of size and speed."
)
@_json_option
def export(
    out: str, model_name: str, weights: str | None, random_weights: bool, as_json: bool
) -> None:
    """Turn a PyTorch model into a bundle.

    A bundle is the folder that `packforcing render` reads. Making one needs PyTorch and ONNX, from
    `pip install ".[export]"` in the checkout; rendering does not.

    \b
    Example:
      packforcing export --model demo --out my-bundle
      packforcing render "a white star" --bundle my-bundle --out star.mp4
    """
    from packforcing import model_config

    config = model_config(model_name)
    if weights and random_weights:
        raise ConfigError("choose one of --weights and --random-weights")
    if not (weights or random_weights):
        if config.name != "demo":
            raise ConfigError(
                f"no weights of '{config.name}' come along; "
                "name a file with --weights, or use --random-weights"
            )
        weights = str(Path(__file__).parent / "demo" / "model.safetensors")
    try:
        _say("loading PyTorch ...", as_json)
        from packforcing.export.bundle import export_bundle
        from packforcing.model import load_model, random_model
    except ModuleNotFoundError as error:
        raise ExportError(
            f"exporting needs {error.name}, which is not installed: "
            "pip install '.[export]' in the checkout"
        ) from error
    model = load_model(config, weights) if weights else random_model(config)
    with _exporting(quiet=as_json) as progress:
        manifest = export_bundle(model, out, progress)
    size = sum(record.bytes for record in manifest.files.values())
    if as_json:
        import msgspec

        files = msgspec.to_builtins(manifest.files)
        _print_json({"path": out, "bytes": size, "files": files, "tools": manifest.tools})
    else:
        click.echo(f"{out}: {len(manifest.graphs)} graphs of model {config.name}, {_size(size)}")


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
    from packforcing.runtime.buffers import memory
    from packforcing.runtime.bundle import check_files, read_manifest

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
    policy = config.policy
    block_seconds = config.block_pixel_frames / config.fps
    rows = {
        "bundle": f"{directory} (schema {manifest.schema_version})",
        "model": f"{config.name}: {config.width}x{config.height} at {config.fps} frames/s, "
        f"blocks of {config.block_pixel_frames} frames ({block_seconds:g} s)",
        "network": f"{config.layers} layers of width {config.dim}, {config.heads} heads, "
        f"{len(config.timesteps)} steps ({config.sampler})",
        "text": f"{config.text_encoder}, at most {config.text_len} words or pieces",
        "history": f"{policy.sink} sink + {policy.mid} mid + {policy.recent} recent blocks, "
        f"by {policy.selection}, {policy.positions} positions",
        "tokens": ", ".join(f"{count:,} {name}" for name, count in _tokens(config).items()),
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.tools.items()),
    }
    for name, text in rows.items():
        click.echo(f"{name:<10} {text}")
    _table("files, all intact", {name: record.bytes for name, record in manifest.files.items()})
    _table("memory while rendering", sizes)


def _tokens(config: Config) -> dict[str, int]:
    return {
        "a block": config.block_tokens,
        "a compressed block": config.compressed_tokens,
        "of context": config.context_tokens,
    }


def _checked(
    bundle: str | None, prompt: str, seconds: float, seed: int, policy_name: str | None = None
) -> tuple[Path, Config, Policy | None]:
    """The bundle, its config and the policy asked for, once the request is known to be possible."""
    from packforcing.config import policies
    from packforcing.runtime import demo_bundle
    from packforcing.runtime.bundle import read_manifest
    from packforcing.runtime.session import check_request

    directory = Path(bundle) if bundle is not None else demo_bundle()
    config = read_manifest(directory).config
    check_request(config, prompt, seconds, seed)
    known = policies(config)
    if policy_name is not None and policy_name not in known:
        raise ConfigError(f"unknown policy '{policy_name}'; known policies: {', '.join(known)}")
    return directory, config, None if policy_name is None else known[policy_name]


def _session(
    directory: Path, policy: Policy | None = None, threads: int | None = None, quiet: bool = False
) -> Session:
    from packforcing.runtime import Session

    _say(f"loading {directory} ...", quiet)
    return Session.open(directory, policy=policy, threads=threads)


def _read_start(path: str, config: Config) -> Any:
    """Frames of a picture or a clip's end that make up whole blocks of the video."""
    from packforcing.runtime.video import read_start

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
