"""Commands that make and check bundles: export, calibrate, quantize, inspect, verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from packforcing.app.cli.options import (
    COMPUTE_DTYPES,
    FILE,
    PATH,
    QUANTIZED_WEIGHT_DTYPES,
    argument_for,
    bundle_option,
    json_option,
    option,
    out_folder_option,
    seconds_option,
    seed_option,
    shape_options,
)
from packforcing.app.cli.output import (
    make_folder,
    print_differences,
    print_json,
    print_tables,
    print_training_free,
    printable,
)
from packforcing.app.cli.progress import count_meter, graph_meter, print_status
from packforcing.app.cli.settings import with_shape
from packforcing.errors import ConfigError
from packforcing.extras import optional_imports
from packforcing.origins import Origin, describe_licenses
from packforcing.units import format_file_size, format_memory

if TYPE_CHECKING:
    from packforcing.config import Config


@click.command()
@option("--out", metavar="DIR", required=True, help="Folder for the bundle.")
@option(
    "--model",
    metavar="NAME",
    help="Model to export: demo, wan-1.3b or one of `packforcing models`.  "
    "[default: the model of the weights, or demo]",
)
@option(
    "--weights",
    type=PATH,
    metavar="PATH",
    help="Folder written by `import-checkpoint`, or a .safetensors file in this project's format.  "
    "[default for demo: the bundled weights]",
)
@option("--random-weights", is_flag=True, help="Use random weights, to test size and speed.")
@shape_options
@option(
    "--dtype",
    aliases=["--precision"],
    type=click.Choice(COMPUTE_DTYPES),
    help="Dtype of weights, cache and arithmetic.  [default: the model's]",
)
@json_option
def export(
    out: str,
    model: str | None,
    weights: Path | None,
    random_weights: bool,
    as_json: bool,
    **shape: Any,
) -> None:
    """Export a PyTorch model to a bundle.

    A bundle is the folder that `packforcing render` reads. Exporting needs
    `pip install "packforcing[export]"`; rendering does not.

    \b
    Examples:
      packforcing export --model demo --out my-bundle
      packforcing render "a white star" --bundle my-bundle --out star.mp4
      packforcing export --model wan-1.3b --random-weights --size 640x368 --out sizing
    """
    from packforcing.checkpoints.published import (
        WEIGHTS,
        describe_differences,
        read_model_folder,
    )
    from packforcing.presets import model_config
    from packforcing.runtime import demo_bundle
    from packforcing.runtime.bundle import read_manifest

    if weights and random_weights:
        raise ConfigError("choose one of --weights and --random-weights")
    origins: tuple[Origin, ...] = ()
    if weights and weights.is_dir():
        if model:
            raise ConfigError(f"{weights} names its model: leave out --model")
        folder = read_model_folder(weights)
        config, origins = folder.config, folder.origins
        if shape["vae"] not in (None, config.vae):
            raise ConfigError(f"{weights} holds the autoencoder {config.vae}: leave out --vae")
        config = with_shape(config, **shape)
        weights = weights / WEIGHTS
    else:
        config = with_shape(model_config(model or "demo"), **shape)
    if not (weights or random_weights):
        if config.name != "demo":
            raise ConfigError(
                f"no weights of '{config.name}' are bundled: "
                "pass a file to --weights, or use --random-weights"
            )
        weights = demo_bundle().parent / WEIGHTS
        origins = read_manifest(demo_bundle()).origins
    print_status("loading PyTorch ...", as_json)
    with optional_imports("exporting", "export"):
        from packforcing.export.exporter import export_bundle
        from packforcing.model import open_weights
        from packforcing.model import random_weights as draw_weights
    source = open_weights(config, weights) if weights else draw_weights(config)
    with graph_meter("exporting", quiet=as_json) as on_graph:
        manifest = export_bundle(config, source, out, on_graph, origins)
    size_bytes = sum(record.bytes for record in manifest.files.values())
    if as_json:
        import msgspec

        files = msgspec.to_builtins(manifest.files)
        print_json(
            {
                "path": out,
                "bytes": size_bytes,
                "files": files,
                "tools": manifest.tools,
                "license": describe_licenses(manifest.origins),
                "origins": msgspec.to_builtins(manifest.origins),
                "differences": describe_differences(config),
            }
        )
    else:
        size = format_file_size(size_bytes)
        click.echo(f"{out}: {len(manifest.graphs)} graphs of model {config.name}, {size}")
        print_differences(config)
        print_training_free(config, config.policy)


@click.command()
@bundle_option("Bundle to render.", required=True)
@option(
    "--prompts",
    type=FILE,
    metavar="FILE",
    required=True,
    help="Text with a prompt per line, or an embedding produced by `encode-prompt`.",
)
@option("--out", metavar="FILE.safetensors", required=True, help="File for the statistics.")
@seconds_option(5.0, "Length of each video.")
@seed_option
@json_option
def calibrate(
    bundle: Path, prompts: Path, out: str, seconds: float, seed: int, as_json: bool
) -> None:
    """Collect activation statistics for `quantize`.

    Renders every prompt in FILE; frames are discarded. Use at least 8 varied prompts: values
    outside the observed range are clipped. The file is written after each prompt, so running the
    command again resumes it.

    Needs `pip install "packforcing[calibration]"`.

    \b
    Example:
      packforcing calibrate --bundle my-bundle --prompts prompts.txt --out statistics.safetensors
    """
    import msgspec

    with optional_imports("calibrating", "calibration"):
        from packforcing.calibration import activations
    from packforcing.evaluation.prompt_sets import read_prompts

    inputs = [prompt.content for prompt in read_prompts(prompts, seed)]
    with count_meter("calibrating", "blocks", quiet=as_json) as on_block:
        source = activations.calibrate(
            bundle, inputs, out, seconds=seconds, seed=seed, on_block=on_block
        )
    if as_json:
        print_json({"path": out, **msgspec.to_builtins(source)})
    else:
        click.echo(f"{out}: {source.done} videos of {source.blocks} blocks by {source.model}")
    _warn_few_prompts(source.done)


@click.command()
@bundle_option("Bundle to quantize.", required=True)
@option(
    "--weight-dtype",
    aliases=["--weights"],
    type=click.Choice(QUANTIZED_WEIGHT_DTYPES),
    help="Dtype of the matrices in all transformer layers but the first and last layer.",
)
@option(
    "--cache-dtype",
    aliases=["--cache"],
    type=click.Choice(["int8", "fp8"]),
    help="Dtype of the KV cache and its archive.",
)
@option(
    "--attention-dtype",
    aliases=["--attention"],
    type=click.Choice(["fp8"]),
    help="Dtype of the products of self-attention.",
)
@option(
    "--calibration",
    type=FILE,
    metavar="FILE",
    help="Statistics that `calibrate` wrote for this bundle. Required for --cache-dtype, "
    "--attention-dtype and w8a8, fp8 and nvfp4 weights; int4 weights are more exact with it.",
)
@option("--out", metavar="DIR", required=True, help="Folder for the quantized bundle.")
@json_option
def quantize(
    bundle: Path,
    weight_dtype: Literal["int8", "w8a8", "int4", "fp8", "nvfp4"] | None,
    cache_dtype: Literal["int8", "fp8"] | None,
    attention_dtype: Literal["fp8"] | None,
    calibration: Path | None,
    out: str,
    as_json: bool,
) -> None:
    """Quantize weights, KV cache or attention of a bundle.

    Weights are stored as integers, fp8 or nvfp4 (4-bit floating point) with scales, in standard
    ONNX. They take half (int8, w8a8, fp8) or about a quarter (int4, nvfp4) of their fp16 size. An
    8-bit KV cache and its archive take half of theirs. The dtype options combine. All else is
    copied, except engines: run build on the new bundle.

    w8a8 (int8 products, RTX 30 or later), fp8 (RTX 40 or later) and nvfp4 (RTX 50) quantize
    activations as well, so that products run in that dtype. int8 and int4 weights are multiplied in
    fp16. fp8 attention needs an RTX 40 or later.

    Needs `pip install "packforcing[calibration]"`; rendering does not.

    \b
    Examples:
      packforcing quantize --bundle my-bundle --weight-dtype int8 --out smaller
      packforcing quantize --bundle my-bundle --cache-dtype int8 \\
        --calibration statistics.safetensors --out small
    """
    import msgspec

    with optional_imports("quantizing", "calibration"):
        from packforcing.calibration.activations import read_statistics
        from packforcing.calibration.quantizer import quantize_bundle
    with count_meter("quantizing", "matrices", quiet=as_json) as on_matrix:
        result = quantize_bundle(
            bundle, out, weight_dtype, cache_dtype, calibration, on_matrix, attention_dtype
        )
    if (cache_dtype or attention_dtype) and calibration:
        _warn_few_prompts(read_statistics(calibration)[0].done)
    if as_json:
        dtypes = {"weights": weight_dtype, "cache": cache_dtype, "attention": attention_dtype}
        print_json({"path": out, **dtypes, **msgspec.to_builtins(result)})
        return
    if cache_dtype:
        click.echo(f"{out}: KV cache in {cache_dtype}")
    if attention_dtype:
        click.echo(f"{out}: attention in {attention_dtype}")
    if result.lowest_snr:
        name, lowest = result.lowest_snr
        click.echo(
            f"{out}: quantized {len(result.snr)} matrices to {weight_dtype} "
            f"(lowest SQNR {lowest:.1f} dB, {name}); "
            f"denoiser: {format_file_size(result.before)} -> {format_file_size(result.after)}"
        )


@click.command()
@argument_for("bundle", "[PATH]")
@option(
    "--bundle",
    type=PATH,
    metavar="DIR",
    help="Exported model; PATH may be a video instead.  [default: the demo model]",
)
@json_option
def inspect(bundle: Path | None, as_json: bool) -> None:
    """Show what a bundle holds, or how a video was made.

    A bundle's model, files and memory are listed, and every file is compared with its checksum.
    Exit code 2 if one is missing or damaged. A video, or a folder of PNG files, says which prompts,
    seed, policy and bundle it was made with.

    \b
    Examples:
      packforcing inspect my-bundle
      packforcing inspect star.mp4
    """
    import msgspec

    from packforcing.app.reports.plan import kernel_lines, read_built_records
    from packforcing.app.reports.tables import make_table, model_rows
    from packforcing.checkpoints.published import describe_differences
    from packforcing.presets import switch_history
    from packforcing.runtime import demo_bundle
    from packforcing.runtime.allocations import allocations, memory_by_purpose
    from packforcing.runtime.bundle import MANIFEST, check_files, read_manifest
    from packforcing.runtime.encoders import frame_file

    directory = bundle or demo_bundle()
    has_frames = (directory / frame_file(0)).is_file() and not (directory / MANIFEST).exists()
    if directory.is_file() or has_frames:
        _show_video(directory, as_json)
        return
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    config = manifest.config
    sizes = memory_by_purpose(config)
    backend, records = read_built_records(directory)
    kernels = kernel_lines(records)
    if as_json:
        print_json(
            {
                "path": str(directory),
                "schema_version": manifest.schema_version,
                "config": msgspec.to_builtins(config),
                "switch_history": switch_history(config),
                "differences": describe_differences(config),
                "tokens": _tokens(config),
                "files": msgspec.to_builtins(manifest.files),
                "files_match": True,
                "memory": sizes,
                "allocations": [entry._asdict() for entry in allocations(config)],
                "kernels": kernels,
                "tools": manifest.tools,
                "license": describe_licenses(manifest.origins),
                "origins": msgspec.to_builtins(manifest.origins),
            }
        )
        return
    rows = {
        "bundle": f"{directory} (schema {manifest.schema_version})",
        **model_rows(config),
        "tokens": ", ".join(f"{count:,} {name}" for name, count in _tokens(config).items()),
        "license": _license(describe_licenses(manifest.origins)),
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.tools.items()),
    }
    files = ((name, format_file_size(record.bytes)) for name, record in manifest.files.items())
    memory_rows = ((name, format_memory(size)) for name, size in sizes.items())
    arrays = (
        (entry.name, " x ".join(map(str, entry.shape)), entry.dtype, entry.place,
         format_memory(entry.nbytes))
        for entry in allocations(config)
    )  # fmt: skip
    print_tables(
        make_table(rows.items()),
        *(f"not as published: {line}" for line in describe_differences(config)),
        "\nfiles, all intact:",
        make_table(files, justify="lr", indent=2),
        "\nmemory while rendering:",
        make_table(memory_rows, justify="lr", indent=2),
        "\narrays, allocated once:",
        make_table(arrays, justify="llllr", indent=2),
        *(
            (f"\nwhat {backend} engines compute in:", make_table(kernels.items(), indent=2))
            if kernels
            else ()
        ),
    )


@click.command()
@bundle_option()
@out_folder_option("out/verify")
@json_option
def verify(bundle: Path | None, out: Path, as_json: bool) -> int:
    """Compare every output of a bundle with fp32.

    Each graph runs on recorded inputs. Unused cache slots hold garbage, to detect invalid reads.
    Engines are compared where a GPU for them is present. Writes verify.html and verify.json. Exit
    code 0 if all outputs are within tolerance, 1 if one is not.

    Needs `pip install "packforcing[cpu,verify]"`.

    \b
    Example:
      packforcing verify --bundle my-bundle
    """
    from packforcing.app.reports import verify as report
    from packforcing.runtime import demo_bundle

    with optional_imports("verifying", "cpu", "verify"):
        from packforcing.export.verify import verify_bundle
    folder = make_folder(out)
    with graph_meter("verifying", quiet=as_json) as on_graph:
        verification = verify_bundle(bundle or demo_bundle(), on_graph)
    page = report.write_reports(folder, verification)
    if as_json:
        print_json(json.loads(report.as_json(verification)))
    else:
        for line in report.summary(verification):
            click.echo(line)
        click.echo(f"report: {page}")
    return 1 if verification.missed else 0


def _license(name: str) -> str:
    """Say which license weights have, where it is known."""
    return f"{name} (of the weights)" if name else "unknown: the bundle does not say it"


def _show_video(path: Path, as_json: bool) -> None:
    """Print how a video was made, as its file says."""
    import msgspec

    from packforcing.app.reports.tables import make_table
    from packforcing.runtime.metadata import read_metadata

    metadata = read_metadata(path)
    if as_json:
        print_json({"path": str(path), **msgspec.to_builtins(metadata)})
        return
    rows = [
        ("video", str(path)),
        ("model", f"{metadata.model}, bundle {metadata.bundle}"),
        ("history", metadata.policy),
        ("denoising", metadata.denoising),
        *([("filters", metadata.filters)] if metadata.filters else []),
        ("seed", str(metadata.seed)),
        ("license", _license(metadata.license)),
        ("made with", f"packforcing {metadata.packforcing}"),
        *([("start", "a picture or clip that was not generated")] if metadata.started else []),
    ]
    for switch in metadata.prompts:
        over = f", over {switch.over} blocks" if switch.over > 1 else ""
        when = f"from {switch.seconds:.1f} s ({switch.history}{over})" if switch.block else "prompt"
        rows.append((when, switch.prompt or "an embedding"))
    # a file from elsewhere may hold anything, like commands for the terminal
    print_tables(make_table((name, printable(text)) for name, text in rows))


def _tokens(config: Config) -> dict[str, int]:
    """Count tokens; the names complete "1,040 ..."."""
    return {
        "a block": config.block_tokens,
        "a compressed block": config.compressed_tokens,
        "of context": config.context_tokens,
    }


def _warn_few_prompts(count: int) -> None:
    from packforcing.calibration.recipes import RECOMMENDED_PROMPTS

    if count < RECOMMENDED_PROMPTS:
        click.echo(
            f"warning: statistics of {count} {'prompt' if count == 1 else 'prompts'}: an 8-bit "
            "cache and fp8 attention clip values that only other prompts reach; calibrate with "
            f"{RECOMMENDED_PROMPTS} or more",
            err=True,
        )
