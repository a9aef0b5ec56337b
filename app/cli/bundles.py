"""Commands that make and check bundles: export, calibrate, quantize, build, inspect, verify."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from packforcing.app.cli.options import (
    json_option,
    seed_option,
    shape_options,
)
from packforcing.app.cli.output import print_json, print_training_free, result_folder
from packforcing.app.cli.progress import (
    count_progress,
    engine_progress,
    graph_progress,
    print_status,
)
from packforcing.app.cli.settings import (
    shaped,
)
from packforcing.errors import (
    ConfigError,
    ExportError,
)
from packforcing.units import format_file_size, format_memory

if TYPE_CHECKING:
    from packforcing.config import Config
    from packforcing.runtime.engine_records import Length


@click.command()
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
@shape_options
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16"]),
    help="Number format of weights, cache and arithmetic.  [default: the model's]",
)
@json_option
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
    from packforcing.runtime import demo_bundle

    if weights and random_weights:
        raise ConfigError("choose one of --weights and --random-weights")
    if weights and Path(weights).is_dir():
        if model_name:
            raise ConfigError(f"{weights} says itself which model it holds: leave out --model")
        config = read_model_folder(weights).config
        if shape["vae"] not in (None, config.vae):
            raise ConfigError(f"{weights} holds the autoencoder {config.vae}: leave out --vae")
        config = shaped(config, **shape)
        weights = str(Path(weights) / WEIGHTS)
    else:
        config = shaped(model_config(model_name or "demo"), **shape)
    if not (weights or random_weights):
        if config.name != "demo":
            raise ConfigError(
                f"no weights of '{config.name}' come along; "
                "name a file with --weights, or use --random-weights"
            )
        weights = str(demo_bundle().parent / WEIGHTS)
    try:
        print_status("loading PyTorch ...", as_json)
        from packforcing import model
        from packforcing.export.exporter import export_bundle
    except ModuleNotFoundError as error:
        raise ExportError(
            f"exporting needs {error.name}, which is not installed: "
            "pip install '.[export]' in the checkout"
        ) from error
    source = model.open_weights(config, weights) if weights else model.random_weights(config)
    with graph_progress(quiet=as_json) as progress:
        manifest = export_bundle(config, source, out, progress)
    size = sum(record.bytes for record in manifest.files.values())
    if as_json:
        import msgspec

        files = msgspec.to_builtins(manifest.files)
        print_json({"path": out, "bytes": size, "files": files, "tools": manifest.tools})
    else:
        total = format_file_size(size)
        click.echo(f"{out}: {len(manifest.graphs)} graphs of model {config.name}, {total}")
        print_training_free(config, config.policy)


@click.command()
@click.argument("bundle")
@click.option(
    "--prompts",
    metavar="FILE",
    required=True,
    help="Text with a prompt per line, or the .safetensors that encode-prompt made of one.",
)
@click.option("--out", metavar="FILE.safetensors", required=True, help="What to write.")
@click.option("--seconds", default=5.0, show_default=True, help="Length of each video.")
@seed_option
@json_option
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
    from packforcing.evaluation.prompt_sets import read_prompts

    wanted = [prompt.content for prompt in read_prompts(Path(prompts), seed)]
    with count_progress("block", quiet=as_json) as progress:
        source = activations.calibrate(
            bundle, wanted, out, seconds=seconds, seed=seed, on_block=progress
        )
    if as_json:
        print_json({"path": out, **msgspec.to_builtins(source)})
    else:
        click.echo(f"{out}: {source.done} videos of {source.blocks} blocks by {source.model}")
    _warn_few_prompts(source.done)


@click.command()
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
@json_option
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
    with count_progress("matrix", quiet=as_json) as progress:
        done = quantize_bundle(bundle, out, weights, cache, calibration, progress)
    if cache and calibration:
        _warn_few_prompts(read(calibration)[0].done)
    if as_json:
        print_json({"path": out, "weights": weights, "cache": cache, **msgspec.to_builtins(done)})
        return
    if cache:
        click.echo(f"{out}: keys and values in {cache}")
    if not done.snr:
        return
    name, worst = next(iter(done.snr.items()))
    click.echo(
        f"{out}: {len(done.snr)} matrices in {weights}, {worst:.1f} dB above their rounding at "
        f"least ({name}); the denoiser takes {format_file_size(done.after)}, before "
        f"{format_file_size(done.before)}"
    )


@click.command()
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
@json_option
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
    with engine_progress(quiet=as_json) as (on_engine, on_step):
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
        print_json({"path": bundle, "backend": backend, "engines": engines})
        return
    for graph, record in records.items():
        click.echo(
            f"{graph:<12} {format_file_size(record.file.bytes)}; {format_memory(record.weights)} "
            f"of weights and {format_memory(max(record.scratch.values()))} of scratch on the card"
        )


@click.command()
@click.argument("bundle", required=False)
@json_option
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
        print_json(
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
    file_sizes = {name: record.bytes for name, record in manifest.files.items()}
    _print_sizes("files, all intact", file_sizes, format_file_size)
    _print_sizes("memory while rendering", sizes, format_memory)


@click.command()
@click.argument("bundle", required=False)
@click.option(
    "--out", metavar="DIR", default="out/verify", show_default=True, help="Folder for the report."
)
@json_option
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
    folder = result_folder(out)
    with graph_progress(quiet=as_json) as progress:
        found = verify(bundle or demo_bundle(), progress)
    page = verify_report.write_reports(folder, found)
    if as_json:
        click.echo(verify_report.as_json(found), nl=False)
    else:
        for line in verify_report.summary(found):
            click.echo(line)
        click.echo(f"report: {page}")
    ctx.exit(1 if found.missed else 0)


def _tokens(config: Config) -> dict[str, int]:
    return {
        "a block": config.block_tokens,
        "a compressed block": config.compressed_tokens,
        "of context": config.context_tokens,
    }


def _print_sizes(title: str, sizes: dict[str, int], form: Callable[[float], str]) -> None:
    click.echo(f"\n{title}:")
    for name, count in sizes.items():
        click.echo(f"  {name:<24} {form(count):>12}")


def _warn_few_prompts(count: int) -> None:
    from packforcing.calibration.recipes import ENOUGH

    if count < ENOUGH:
        click.echo(
            f"warning: statistics of {count} {'prompt' if count == 1 else 'prompts'}: a cache in 8 "
            f"bits cuts off what only other prompts show; calibrate with {ENOUGH} or more",
            err=True,
        )
