"""Memory plans for people: as text, and as a picture of what fills a budget."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from packforcing.app.reports.tables import make_table, plain_text
from packforcing.config import Config
from packforcing.errors import BackendError, MissingDependency, OutputError, PlanError
from packforcing.extras import optional_imports
from packforcing.files import write_file
from packforcing.presets import with_autoencoder
from packforcing.runtime.backends import ENGINE_BACKENDS
from packforcing.runtime.bundle import GPU_CALLS, GPU_GRAPHS, contract, read_manifest
from packforcing.runtime.engine_records import (
    EngineRecord,
    describe_kernels,
    graph_files,
    read_record,
)
from packforcing.runtime.estimate import seconds_per_block
from packforcing.runtime.gpus import GpuFigures, known_gpus
from packforcing.runtime.nvml import UNIFIED_TARGETS
from packforcing.runtime.plan import (
    CUDA_CONTEXT,
    SYSTEM,
    Plan,
    build_bytes,
    describe,
    estimates,
    further_video,
    make_plan,
    smallest,
    videos_at_once,
)
from packforcing.units import GIB, format_gib

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

Row = tuple[int | None, str, Plan | PlanError]  # budget, target, what fits or that nothing does

EXAMPLES = (
    "RTX 3060 12 GB", "RTX 3080 10 GB", "RTX 4060", "RTX 4090", "RTX 5060", "RTX 5090",
    "Jetson Orin Nano 8 GB MAXN SUPER", "Jetson AGX Orin 64 GB MAXN", "Jetson T5000 MAXN",
    "DGX Spark",
)  # fmt: skip

ROWS = {
    "weights.denoiser": "weights of the denoiser",
    "weights.compressor": "weights of the compressor",
    "weights.vae_decoder": "weights of the decoder",
    "scratch": "scratch, shared by all engines",
    "cache.sink": "cache, sink blocks",
    "cache.recent": "cache, recent blocks",
    "cache.mid": "cache, mid blocks",
    "staging.block": "staging, full block",
    "staging.compressed": "staging, compressed block",
    "cross_attention": "cross-attention keys and values",
    "autoencoder_state": "autoencoder state, twice",
    "inputs_outputs": "other inputs and outputs",
    "reserve": "reserve",
    "graphs": "weights of graphs that run there",
    "copies": "pinned copies, and arrays of the host",
    "archive": "archive of compressed blocks",
    "checkpoint": "a checkpoint, while it is made",
    "streamed_weights": "weights, to stream from",
}
# What the picture shows as one part, from left to right
PARTS = {
    "weights": ("weights.denoiser", "weights.compressor", "weights.vae_decoder"),
    "sink blocks": ("cache.sink",),
    "recent blocks": ("cache.recent",),
    "mid blocks": ("cache.mid",),
    "staging": ("staging.block", "staging.compressed"),
    "scratch": ("scratch",),
    "text, state and other buffers": ("cross_attention", "autoencoder_state", "inputs_outputs"),
    "reserve": ("reserve",),
}
COLORS = ("#2b4a6f", "#c2571a", "#e0955a", "#f0c9a0", "#8f7aa8", "#5b8c5a", "#a9b6bf", "#e3e6e8")


class Measured(NamedTuple):
    """Bytes that the engines of a bundle take, by the names of `runtime.plan.estimates`."""

    built: dict[str, int]  # by the builder's log; empty where they are not built
    loaded: dict[str, int]  # on the GPU of this machine
    not_loaded: str  # why there is nothing in `loaded`
    targets: tuple[str, ...] = ()  # that they were built for
    kernels: Mapping[str, str] = {}  # by call, what runs in which dtypes


def read_built_records(directory: Path) -> tuple[str, list[EngineRecord]]:
    """Return the first backend with engines of a bundle's graphs, and their records.

    Raises:
        BundleError: The bundle cannot be read.
        BackendError: A record is damaged.
    """
    manifest = read_manifest(directory)
    for backend in ENGINE_BACKENDS:
        records = [read_record(directory, backend, graph) for graph in GPU_GRAPHS]
        current = [
            record
            for graph, record in zip(GPU_GRAPHS, records)
            if record and record.key.graph == graph_files(manifest, graph)
        ]
        if current:
            return backend, current
    return "", []


def kernel_lines(records: Iterable[EngineRecord]) -> dict[str, str]:
    """Describe by call what engines run in which dtypes, as the builder lists it.

    Records made before kernels were listed have none.
    """
    return {
        call: describe_kernels(entry for entry in record.kernels if entry.call == call)
        for record in records
        for call in record.scratch
        if record.kernels
    }


def read_engine_sizes(directory: Path, *, load: bool = True) -> Measured:
    """Read the sizes of a bundle's engines.

    Args:
        directory: The bundle.
        load: Load them as well, where there is a GPU for them.

    Raises:
        BundleError: The bundle cannot be read.
    """
    manifest = read_manifest(directory)
    backend, records = read_built_records(directory)
    if not records:
        return Measured({}, {}, "no engines are built: run 'packforcing build'")
    built = {name: size for record in records for name, size in record.figures.items()}
    targets, kernels = records[0].key.targets, kernel_lines(records)
    if not load:
        return Measured(built, {}, "", targets, kernels)
    try:
        loaded = load_figures(backend, directory, manifest.config)
        return Measured(built, loaded, "", targets, kernels)
    except (BackendError, MissingDependency) as error:
        return Measured(built, {}, f"not loaded here: {error}", targets, kernels)


def load_figures(backend: str, directory: Path, config: Config) -> dict[str, int]:
    """Load engines and return the bytes of scratch per call on the GPU of this machine.

    Raises:
        BackendError: There is no GPU, or an engine cannot be loaded.
    """
    from packforcing.runtime.backends.tensorrt import Engines

    engines = Engines(backend, directory, config)
    try:
        loaded = engines.load(contract(config))
        return {
            f"scratch.{call}": size
            for graph, engine in loaded.items()
            for call, size in zip(
                (call for call, name in GPU_CALLS.items() if name == graph), engine.scratch()
            )
        }
    finally:
        engines.close()


def bundle_text(directory: Path, target: str, seconds: float) -> str:
    """Return what `packforcing plan --bundle` prints, without engines being loaded for it.

    Raises:
        BundleError: The bundle cannot be read.
        ConfigError: The target is unknown, or `seconds` is out of range.
    """
    config, engines = read_manifest(directory).config, read_engine_sizes(directory, load=False)
    plan = make_plan(config, target, seconds=seconds, built=engines.built)
    return plain_text(*detail(None, plan, seconds, engines, examples(target)))


def detail(
    budget: int | None,
    plan: Plan,
    seconds: float,
    engines: Measured | None,
    gpus: Sequence[GpuFigures],
) -> Iterator[RenderableType]:
    """Lay out every allocation of a plan.

    Args:
        budget: Bytes of device memory that the plan was made for, or None.
        plan: The plan.
        seconds: Length of the video that the archive is for.
        engines: Sizes of the bundle's engines, where the plan is for a bundle.
        gpus: To predict times for.
    """
    yield f"{title(plan.config)}, on {plan.target}: {describe(plan)}"
    if (missing := needs(plan)) and engines is None:  # a bundle has it
        yield f"It needs {missing}."
    device, host = sum(plan.device.values()), sum(plan.host.values())
    rows, totals = [*_rows(plan.device), _row("total", device)], []
    if budget is not None:
        totals.append(_row("budget", budget))
        if engines is None and plan.config.wan_latents:
            larger = with_autoencoder(plan.config, "wan")
            if larger != plan.config:
                total = make_plan(larger, plan.target, seconds=seconds).total
                totals.append(_row("total with Wan's autoencoder", total))
    totals.append(_row("each further video at once", further_video(plan)))
    if budget is not None and (videos := videos_at_once(plan, budget)) > 1:
        totals.append((f"videos at once within the budget: {videos}", "", ""))
    totals.append(_row("beside it, the CUDA context (prediction)", CUDA_CONTEXT))
    host_rows = [*_rows(plan.host), _row("total", host)]
    host_heads = (f"host memory, for {seconds:g} s of video", "bytes", "GiB")
    yield ""
    if plan.shared:
        yield "The GPU has the host's memory: both sides are planned as one."
        yield ""
        yield make_table(rows, ("on the GPU", "bytes", "GiB"), "lr")
        yield ""
        yield make_table(host_rows, ("beside it, " + host_heads[0], *host_heads[1:]), "lr")
        pool = [_row("on the GPU", device), _row("beside it", host), _row("total", plan.total)]
        totals.append(_row("beside it, system and Python (prediction)", SYSTEM))
        yield ""
        yield make_table([*pool, *totals], ("memory of both", "bytes", "GiB"), "lr")
        yield ""
        yield from _engine_table(plan.config, engines)
        building = ((graph, build_bytes(plan.config, graph)) for graph in GPU_GRAPHS)
        yield ""
        yield make_table(
            (_row(graph, size) for graph, size in building),
            ("to build on the device, one at a time (prediction)", "bytes", "GiB"), "lr",
        )  # fmt: skip
        yield ""
        yield from predictions(plan.config, gpus)
        return
    yield make_table([*rows, *totals], ("device memory", "bytes", "GiB"), "lr")
    yield ""
    yield from _engine_table(plan.config, engines)
    yield ""
    yield make_table(host_rows, host_heads, "lr")
    loading = (
        _row("device, as later", plan.total),
        _row("host, with the largest engine's file", plan.host_loading),
    )
    yield ""
    yield make_table(loading, ("at most while loading", "bytes", "GiB"), "lr")
    yield ""
    yield from predictions(plan.config, gpus)


def _engine_table(config: Config, engines: Measured | None) -> Iterator[RenderableType]:
    """Lay out the sizes of engines: estimated, built and loaded. The largest scratch counts."""
    sources = (engines.built, engines.loaded) if engines else ()
    rows = (
        (name, f"{size:,}", *(f"{sizes[name]:,}" if name in sizes else "-" for sizes in sources))
        for name, size in estimates(config).items()
    )
    heads = ("estimated", "built", "loaded")[: 1 + len(sources)]
    yield make_table(rows, ("engines, and scratch of their calls", *heads), "lr")
    if engines and engines.not_loaded:
        yield f"({' '.join(engines.not_loaded.split())})"
    if engines and engines.kernels:
        yield ""
        yield make_table(engines.kernels.items(), ("kernels of calls, as built", "operands"))


def table(
    rows: Sequence[Row], config: Config, free: bool, gpus: Sequence[GpuFigures]
) -> Iterator[RenderableType]:
    """Lay out a row per budget and target.

    Args:
        rows: Budgets, targets and plans.
        config: The model as configured.
        free: Plans could give up precision: show the least that the whole history takes.
        gpus: To predict times for.
    """
    shared = sorted({target for _, target, _ in rows} & {*UNIFIED_TARGETS})
    both = f"; of GPU and host together on {', '.join(shared)}" if shared else ""
    yield f"{title(config)}; GiB of device memory, without the CUDA context{both}"
    yield ""
    heads = ("budget", "target", "sink + mid + recent", "weights", "cache", "streamed", "total",
             "autoencoder", "needs")  # fmt: skip
    yield make_table((_cells(*row) for row in rows), heads, "rllllrrl")
    targets = list(dict.fromkeys(target for _, target, _ in rows))
    if free:
        yield ""
        yield f"the smallest budget for {_history(config)} blocks, nothing streamed"
        yield make_table((_smallest_cells(config, target) for target in targets), indent=2)
    yield ""
    yield from predictions(config, gpus)


def _cells(budget: int | None, target: str, plan: Plan | PlanError) -> tuple[str, ...]:
    label = "-" if budget is None else format_gib(budget)
    if isinstance(plan, PlanError):
        return label, target, f"nothing fits below {format_gib(plan.smallest, round_up=True)}"
    precision = plan.config.precision
    return (
        label, target, _history(plan.config), precision.weights, precision.cache,
        format_gib(plan.streamed) if plan.streamed else "-", format_gib(plan.total),
        plan.config.vae, needs(plan) or "-",
    )  # fmt: skip


def _smallest_cells(config: Config, target: str) -> tuple[str, ...]:
    whole, least = smallest(config, target)
    precision = least.config.precision
    return (
        target,
        f"{format_gib(least.total, round_up=True)} with {precision}",
        f"{format_gib(whole.total, round_up=True)} if the decoder ran on whole frames",
    )


def plans_json(
    rows: Sequence[Row], config: Config, engines: Measured | None = None
) -> dict[str, Any]:
    """Describe plans for programs; sizes in bytes."""
    targets = list(dict.fromkeys(target for _, target, _ in rows))
    return {
        "cuda_context": CUDA_CONTEXT,
        "engines": engines and engines._asdict(),
        "plans": [
            {
                "budget": budget,
                "target": target,
                **(_plan_json(plan) if isinstance(plan, Plan) else {"smallest": plan.smallest}),
            }
            for budget, target, plan in rows
        ],
        "smallest": {
            target: {"as_configured": least.total, "decoder_on_whole_frames": whole.total}
            for target in targets
            for whole, least in [smallest(config, target)]
        },
    }


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "config": msgspec.to_builtins(plan.config),
        "device": plan.device,
        "total": plan.total,
        "shared_memory": plan.shared,
        "estimates": estimates(plan.config),
        "host": plan.host,
        "loading": {"device": sum(plan.device.values()), "host": plan.host_loading},
        "streamed": plan.streamed,
        "needs": needs(plan),
        "predicted_seconds_per_block": {
            name: seconds_per_block(plan.config, gpu)
            for name, gpu in known_gpus().items()
            if gpu.target == plan.target
        },
    }


def title(config: Config) -> str:
    """Return one line: the model, its frame size and its block."""
    return (
        f"{config.name} at {config.width}x{config.height}, "
        f"blocks of {config.block_frames} latent frames"
    )


def needs(plan: Plan) -> str:
    """Name what a plan needs beyond a plain export and build; "" for nothing."""
    precision = plan.config.precision
    if precision.compute == "fp32":
        return "an export in fp16 (for attention)"
    if {precision.weights, precision.cache} != {precision.compute} or precision.attention:
        return "packforcing quantize"
    return "engines built with --stream-weights" if plan.streamed else ""


def predictions(config: Config, gpus: Sequence[GpuFigures]) -> Iterator[RenderableType]:
    """Lay out lower bounds of the time per block on GPUs."""
    playing = config.block_pixel_frames / config.fps
    yield f"seconds per block, which plays for {playing:g} s: predicted, at 100% of the GPU's peak"
    rows = []
    for gpu in gpus:
        seconds = seconds_per_block(config, gpu)
        rows.append(
            (
                f"{gpu.name} ({gpu.target})",
                f"at least {seconds:.3g}",
                f"at most {config.block_pixel_frames / seconds:.3g} fps",
            )
        )
    yield make_table(rows, indent=2)


def examples(*targets: str) -> list[GpuFigures]:
    """Return the GPUs of these targets that stand for all where none is named."""
    return [gpu for name in EXAMPLES if (gpu := known_gpus()[name]).target in targets]


def _rows(sizes: dict[str, int]) -> Iterator[tuple[str, str, str]]:
    return (_row(ROWS[name], size) for name, size in sizes.items())


def _row(name: str, size: int) -> tuple[str, str, str]:
    return name, f"{size:,}", format_gib(size)


def draw(rows: Sequence[Row], config: Config, path: Path) -> None:
    """Write the picture of plans as PNG.

    Raises:
        MissingDependency: matplotlib is not installed.
        OutputError: Nothing fits, or the file cannot be written.
    """
    if not any(isinstance(plan, Plan) for _, _, plan in rows):
        raise OutputError(f"no picture {path}: nothing fits any of the budgets")
    stream = io.BytesIO()
    plan_figure(rows, config).savefig(stream, dpi=110, format="png")
    write_file(path, stream.getvalue())


def plan_figure(rows: Sequence[Row], config: Config) -> Figure:
    """Draw a bar per plan, its parts side by side, and a mark where its budget ends.

    Plans that differ in nothing but the target share a bar.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    with optional_imports("a picture", "plot"):
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    bars: dict[str, tuple[int | None, Plan, list[str]]] = {}
    for budget, target, plan in rows:
        if isinstance(plan, Plan):
            bar = bars.setdefault(f"{budget} {describe(plan)}", (budget, plan, []))
            bar[2].append(target)
    figure = Figure(figsize=(11, 1.9 + 0.75 * len(bars)), layout="constrained")
    axes = figure.subplots()
    labels = []
    for row, (budget, plan, targets) in enumerate(bars.values()):
        left = 0.0
        for (part, names), color in zip(PARTS.items(), COLORS):
            width = sum(plan.device[name] for name in names) / GIB
            axes.barh(row, width, 0.62, left, color=color, label=None if row else part)
            left += width
        total = f"{plan.total / GIB:.2f}" + ("" if budget is None else f" of {budget / GIB:g}")
        end = max(plan.total, budget or 0) / GIB
        axes.annotate(f"{total} GiB", (end, row), (6, 0), textcoords="offset points", va="center",
                      annotation_clip=False)  # fmt: skip
        if budget is not None:
            axes.plot([budget / GIB] * 2, [row - 0.42, row + 0.42], color=rcParams["text.color"],
                      lw=2, label=None if row else "budget")  # fmt: skip
        labels.append(f"{', '.join(targets)}\n{_short(plan)}")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("GiB of device memory, without the CUDA context")
    axes.set_title(f"{title(config)}; history as sink + mid + recent blocks", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


def _short(plan: Plan) -> str:
    precision = plan.config.precision
    return f"{_history(plan.config)} blocks, {precision}"


def _history(config: Config) -> str:
    return f"{config.policy.sink} + {config.policy.mid} + {config.policy.recent}"
