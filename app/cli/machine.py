"""Commands that prepare for a GPU: doctor, plan, build."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from packforcing.app.cli.options import (
    ATTENTION_DTYPES,
    BUDGETS,
    CACHE_DTYPES,
    FILE,
    PRECISION,
    TARGET_NAMES,
    WEIGHT_DTYPES,
    bundle_option,
    json_option,
    option,
    seconds_option,
    shape_options,
    target_attrs,
)
from packforcing.app.cli.output import print_json, print_tables
from packforcing.app.cli.progress import engine_meter
from packforcing.app.cli.settings import with_dtypes, with_shape
from packforcing.errors import ConfigError
from packforcing.extras import optional_imports
from packforcing.units import format_file_size, format_memory

if TYPE_CHECKING:
    from packforcing.runtime.engine_records import Length


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show what this machine can export, build and run.

    Each "no" names its remedy. Nothing is changed, and no model is loaded.

    \b
    Example:
      packforcing doctor
    """
    import msgspec

    from packforcing.app.reports.tables import make_table
    from packforcing.runtime.doctor import diagnose

    machine = diagnose(Path.cwd())
    if as_json:
        print_json(msgspec.to_builtins(machine))
        return
    rows = [
        (
            "CPU",
            f"{machine.cpu_cores} cores, {format_memory(machine.memory_free)} of "
            f"{format_memory(machine.memory_total)} memory free",
        ),
        ("disk", f"{format_file_size(machine.disk_free)} free in {Path.cwd()}"),
    ]
    if machine.driver:
        cuda = "{}.{}".format(*machine.driver.cuda)
        rows.append(("driver", f"NVIDIA {machine.driver.version}, runs CUDA up to {cuda}"))
    for gpu in machine.gpus:
        memory = f"{format_memory(gpu.memory_free)} of {format_memory(gpu.memory_total)} free"
        rows.append((f"GPU {gpu.index}", f"{gpu.name} ({gpu.target}), {memory}"))
    if machine.no_gpu:
        rows.append(("GPU", machine.no_gpu))
    capabilities = (
        ("yes" if capability.able else "no", capability.name, capability.detail)
        for capability in machine.capabilities
    )
    print_tables(
        f"packforcing {machine.packforcing}, Python {machine.python}, {machine.system}",
        make_table(rows),
        "",
        make_table(capabilities),
    )


@click.command()
@bundle_option("Exported model.  [default: no bundle; a model by --model]")
@option(
    "--model",
    metavar="NAME",
    help="Model to plan: demo, wan-1.3b or one of `packforcing models`.  [default: wan-1.3b]",
)
@option(
    "--budget",
    type=BUDGETS,
    metavar="GIB[,GIB...]",
    help="GPU memory in GiB that driver and desktop leave free; on Jetson and DGX Spark, of GPU "
    "and host together. --gpu allows 0.39 GiB for the driver, there 1.5 for the system as well.  "
    "[default: as much as the model takes]",
)
@option(
    "--target",
    **target_attrs,
    help=f"GPU architecture: {TARGET_NAMES}.  [default: the first one of the bundle's engines, or "
    "sm86]",
)
@option(
    "--gpu",
    metavar="NAME",
    help='A GPU by name, like "RTX 4060", "4070 laptop 80W" or "Orin Nano 8GB 25W", or "here" for '
    "the one in this machine: sets target and budget.",
)
@shape_options
@option("--weight-dtype", type=click.Choice(WEIGHT_DTYPES), help="Dtype of the weights.  "
        "[default: the highest precision that fits]")  # fmt: skip
@option("--cache-dtype", type=click.Choice(CACHE_DTYPES), help="Dtype of the KV cache.  "
        "[default: the highest precision that fits]")  # fmt: skip
@option("--attention-dtype", type=click.Choice(ATTENTION_DTYPES), help="Dtype of the products of "
        "self-attention.  [default: fp16]")  # fmt: skip
@option("--precision", type=PRECISION, metavar="WEIGHTS,CACHE", hidden=True)
@option(
    "--fps",
    type=float,
    metavar="N",
    help="Look for settings that reach so many frames per second on --gpu, or on every known GPU. "
    "What other options set is kept.",
)
@option("--realtime", is_flag=True, help="As --fps, with the frame rate of the model.")
@option(
    "--efficiency",
    type=float,
    metavar="SHARE",
    help="Share of a GPU's peak that --fps expects kernels to reach.  [default: 0.6]",
)
@option(
    "--rates",
    metavar="DTYPE=TFLOPS,...",
    help="For --fps on a GPU that --gpu does not know: dense rates and the bandwidth in GB/s, like "
    "fp16=30,fp8=60,bandwidth=272, with --target and --budget.",
)
@option(
    "--unmeasured",
    is_flag=True,
    help="Let --fps choose dtypes whose loss over two minutes of video has not been measured.",
)
@seconds_option(60.0, "Length of the video; its archive in host memory grows with it.")
@option("--picture", type=FILE, metavar="FILE.png", help="Draw the plans as bars.")
@json_option
def plan(
    bundle: Path | None,
    model: str | None,
    budget: tuple[int, ...] | None,
    target: tuple[str, ...] | None,
    gpu: str | None,
    weight_dtype: str | None,
    cache_dtype: str | None,
    attention_dtype: str | None,
    precision: tuple[str, str] | None,
    fps: float | None,
    realtime: bool,
    efficiency: float | None,
    rates: str | None,
    unmeasured: bool,
    seconds: float,
    picture: Path | None,
    as_json: bool,
    **shape: Any,
) -> None:
    """Show what takes memory on a GPU, and what fits.

    Needs no weights, GPU or engine, and changes nothing. Of a --model, plan looks for settings that
    fit a budget: it lowers precision first, then shortens history. A --bundle has its settings:
    plan shows whether they fit, by the builder's figures once engines are built, on a GPU with
    those of the loaded engines. Several budgets or targets make a table. Exit code 2 if a single
    budget is too small. Memory that GPU and host share is planned as one.

    With --fps, plan looks for settings that reach a frame rate: it lowers precision first, then
    history, steps and size. It shows the best trade-offs, predicted, and the commands that make the
    first. Exit code 2 if the GPU is too slow.

    \b
    Examples:
      packforcing plan --model wan-1.3b --gpu "RTX 4060"
      packforcing plan --model wan-1.3b --budget 4,6,8,12 --target sm86,sm89,sm120
      packforcing plan --bundle my-bundle
      packforcing plan --gpu "RTX 4090" --fps 16
      packforcing plan --gpu "AGX Orin 64GB 30W"
    """
    import msgspec

    from packforcing.app.cli.frame_rate import free_axes, plan_frame_rate
    from packforcing.errors import PlanError
    from packforcing.presets import model_config
    from packforcing.runtime.bundle import read_manifest
    from packforcing.runtime.gpus import find_gpu
    from packforcing.runtime.plan import Plan, choose_plan, memory_budget

    if precision is not None:
        if weight_dtype or cache_dtype:
            raise ConfigError("choose --weight-dtype and --cache-dtype, or --precision")
        weight_dtype, cache_dtype = precision
    if fps is not None or realtime:
        if fps is not None and realtime:
            raise ConfigError("choose one of --fps and --realtime")
        if bundle or picture:
            raise ConfigError("--fps plans for a --model, without --bundle and --picture")
    elif efficiency is not None or rates or unmeasured:
        raise ConfigError("--efficiency, --rates and --unmeasured are for --fps")
    dtypes = None
    if bundle is None:
        config = with_shape(model_config(model or "wan-1.3b"), **shape)
        dtypes = with_dtypes(config, weight_dtype, cache_dtype, attention_dtype)
    elif model or any((weight_dtype, cache_dtype, attention_dtype, *shape.values())):
        raise ConfigError("a bundle has its model, sizes, history and dtypes already")
    if bundle is None and (fps is not None or realtime):
        plan_frame_rate(
            msgspec.structs.replace(config, precision=dtypes or config.precision),
            config.fps if fps is None else fps, efficiency, gpu, target, budget, rates, as_json,
            free_axes(model, dtypes, shape), unmeasured,
        )  # fmt: skip
        return
    from packforcing.app.reports import plan as report  # after --fps, whose time it would double

    engines = None
    if bundle is not None:
        config = read_manifest(bundle).config
        engines = report.read_engine_sizes(bundle)
    budgets: tuple[int | None, ...] = budget or (None,)
    targets = target or (engines.targets[:1] if engines else ()) or ("sm86",)
    gpus = report.examples(*targets)
    if gpu is not None:
        if target is not None:
            raise ConfigError("choose one of --gpu and --target")
        gpus = [find_gpu(gpu)]
        targets = (gpus[0].target,)
        if budget is None:
            budgets = (memory_budget(gpus[0].memory_bytes, gpus[0].target),)
    rows: list[tuple[int | None, str, Plan | PlanError]] = []
    for budget_bytes, name in product(budgets, targets):
        try:
            fitting = choose_plan(
                config, name, budget_bytes, precision=dtypes, seconds=seconds,
                built=engines and engines.built,
                any_autoencoder=bundle is None and shape["vae"] is None,
            )  # fmt: skip
            rows.append((budget_bytes, name, fitting))
        except PlanError as error:
            if len(budgets) * len(targets) == 1:
                raise
            rows.append((budget_bytes, name, error))
    if picture is not None:
        report.draw(rows, config, picture)
    if as_json:
        print_json(report.plans_json(rows, config, engines))
        return
    match rows:
        case [(budget_bytes, _, Plan() as only)]:
            print_tables(*report.detail(budget_bytes, only, seconds, engines, gpus))
        case _:
            print_tables(*report.table(rows, config, dtypes is None and bundle is None, gpus))


@click.command()
@bundle_option("Bundle to build engines for.", required=True)
@option(
    "--target",
    aliases=["--targets"],
    **target_attrs,
    help=f"GPU architecture: {TARGET_NAMES}. Jetsons by tensorrt alone, on the device.  [default: "
    "sm86,sm89,sm120; with tensorrt, this machine's and no other]",
)
@option(
    "--backend",
    type=click.Choice(["tensorrt-rtx", "tensorrt"]),
    default="tensorrt-rtx",
    show_default=True,
    help="tensorrt-rtx builds on any machine; tensorrt on the one whose GPU runs the engines.",
)
@option(
    "--length",
    type=click.Choice(["input", "mask"]),
    help="How attention gets the length of the valid context. Use mask if `packforcing verify` "
    "reports on your GPU that the denoiser reads beyond it.  "
    "[default: input; mask with TensorRT 10]",
)
@option(
    "--stream-weights",
    is_flag=True,
    help="Allow up to a tenth of the denoiser's weights to stay in host memory: as many as do not "
    "fit into the GPU memory that is free when a render starts.",
)
@json_option
def build(
    bundle: Path,
    target: tuple[str, ...] | None,
    backend: str,
    length: Length | None,
    stream_weights: bool,
    as_json: bool,
) -> None:
    """Build TensorRT engines for a bundle.

    With tensorrt-rtx, the default, this machine needs no GPU; with tensorrt it needs the one that
    is to run the engines. Engines are written to engines/ in the bundle, with the memory that each
    one takes. Engines that are up to date are not built again.

    Needs `pip install "packforcing[tensorrt-rtx]"` or `"packforcing[tensorrt]"`.

    \b
    Examples:
      packforcing build --bundle my-bundle
      packforcing build --bundle my-bundle --target sm89
    """
    import msgspec

    with optional_imports("building", backend):
        from packforcing.export.engines import build_engines
    with engine_meter(quiet=as_json) as (on_engine, on_step):
        records = build_engines(
            bundle,
            target and list(target),
            backend=backend,
            length=length,
            stream_weights=stream_weights,
            on_engine=on_engine,
            on_step=on_step,
        )
    if as_json:
        engines = msgspec.to_builtins(records)
        print_json({"path": str(bundle), "backend": backend, "engines": engines})
        return
    from packforcing.app.reports.tables import make_table

    rows = (
        (
            graph,
            format_file_size(record.file.bytes),
            format_memory(record.weights),
            format_memory(max(record.scratch.values())),
        )
        for graph, record in records.items()
    )
    print_tables(make_table(rows, ("graph", "engine", "weights", "scratch"), "lr"))
