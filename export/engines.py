"""Build the engines of a bundle, on any machine: decide what to build, run a child, keep the files.

1. Check what is cheap to check, take the lock of the bundle, and state for each engine why it is
   built or that it is up to date (`runtime/engine_records.py` has the key that decides).
2. Start `packforcing.export.builder`, which alone loads TensorRT, with a `BuildJob` on its standard
   input. The pipe stays open: the child ends when it closes, so no child outlives a killed parent.
3. Read the child's messages: `Progress`, then `Built` or `Failed`. TensorRT's log goes into a file.
   The engine is written under a hidden partial name.
4. Delete the old record, give the engine its name, write the new record.

TensorRT-RTX builds without a GPU. TensorRT has the same interface under another name, but needs the
GPU that it builds for; no engine of it has been built by this project.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec
import psutil

from packforcing.config import Config
from packforcing.errors import (
    BackendError,
    BundleError,
    ConfigError,
    ExportError,
    MissingDependency,
    OutputError,
)
from packforcing.export.builder import BuildJob, Built, Failed, Progress
from packforcing.export.kernels import KernelTypes
from packforcing.extras import install_command, installed_version, optional_imports
from packforcing.files import new_file, require_disk_space, sweep, write_file
from packforcing.geometry import layer_matrices
from packforcing.machine import free_memory
from packforcing.runtime.backends.tensorrt import MODULES, STREAMING
from packforcing.runtime.bundle import (
    ENGINE_FOLDER,
    GPU_GRAPHS,
    Manifest,
    check_files,
    contract,
    graph_file,
    read_manifest,
)
from packforcing.runtime.device import CudaDevice
from packforcing.runtime.engine_records import (
    EngineRecord,
    Key,
    Length,
    check_engine,
    differences,
    encode_record,
    engine_file,
    graph_files,
    read_record,
    record_file,
    shapes,
)
from packforcing.runtime.nvml import UNIFIED_TARGETS
from packforcing.runtime.plan import (
    BUILDER_MEMORY,
    JETSON_TARGETS,
    TARGETS,
    build_bytes,
    check_target,
)
from packforcing.runtime.tensorrt_releases import find_release
from packforcing.units import format_memory

RTX_TARGETS = ("sm86", "sm89", "sm120")  # RTX 30, 40 and 50: the default
LOCK = ".lock"
MEMORY = BUILDER_MEMORY
# Likewise of the disk: 2.58 GB of engine by the same test.
DISK = (1.05, 32 << 20)
# dtypes by their names in ONNX: of every target, and those that `TARGETS` lists
COMMON_DTYPES = {"FLOAT", "FLOAT16", "INT32", "INT64", "BOOL"}
QUANTIZED_DTYPES = {"INT8": "int8", "INT4": "int4", "FLOAT8E4M3FN": "fp8", "UINT4": "nvfp4"}

OnEngine = Callable[[str, str], None]  # graph, what happens with its engine and why
OnStep = Callable[[str, str, float], None]  # graph, phase of the builder, share done


def build_engines(
    directory: str | Path,
    targets: Sequence[str] | None = None,
    *,
    backend: str = "tensorrt-rtx",
    length: Length | None = None,
    stream_weights: bool = False,
    on_engine: OnEngine = lambda graph, text: None,
    on_step: OnStep = lambda graph, phase, done: None,
) -> dict[str, EngineRecord]:
    """Build the engines of a bundle that are missing, damaged or of another key.

    Args:
        directory: The bundle.
        targets: GPU architectures like "sm89". None: those of RTX 30, 40 and 50, or with the
            backend `tensorrt` that of this machine's GPU.
        backend: "tensorrt-rtx" or "tensorrt".
        length: How attention gets the valid length of its context: as an input, or as a mask
            that the network computes. The mask is for a GPU on which `packforcing verify` says
            that the denoiser reads beyond `kv_len`. None: as an input, where the library's release
            takes that.
        stream_weights: Let a part of the denoiser's weights stay in host memory.
        on_engine: Called per engine with its graph and what happens with it.
        on_step: Called with the graph, the builder's phase and the share that is done, 0 to 1.

    Returns:
        The record of each engine, by graph.

    Raises:
        ConfigError: A target is unknown or lacks a dtype of the bundle.
        MissingDependency: The backend's library is not installed.
        BackendError: The library is too old or refuses a graph, or memory is missing.
        ExportError: A layer of the denoiser's attention does not read `kv_len`.
        BundleError: The bundle is damaged.
        OutputError: The engines cannot be written, or another process is building them.
    """
    from filelock import FileLock, Timeout

    directory = Path(directory).resolve()
    manifest = read_manifest(directory)
    tool = _tool(backend)
    length = _length(tool, length)
    targets = resolve_targets(manifest.config, backend, targets)
    for graph in GPU_GRAPHS:
        check_graph(directory / graph_file(graph), graph, manifest.config, targets)
    folder = directory / ENGINE_FOLDER
    try:
        folder.joinpath(backend).mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK, blocking=False):
            check_files(directory, manifest)
            records = {}
            for graph in GPU_GRAPHS:
                sweep(engine_file(directory, backend, graph))  # where it is not built again too
                key = Key(
                    graph=graph_files(manifest, graph),
                    tool=tool,
                    targets=targets,
                    shapes=shapes(manifest.config, graph),
                    length=length if graph == "denoiser" else None,
                    flags=(STREAMING,) if stream_weights and graph == "denoiser" else (),
                )
                reason, record = _rebuild_reason(directory, backend, graph, key)
                if record is None:
                    on_engine(graph, f"building ({reason})")
                    record = _build(
                        directory, manifest, backend, graph, key, partial(on_step, graph)
                    )
                    on_engine(graph, "built")
                else:
                    on_engine(graph, "up to date")
                records[graph] = record
            return records
    except Timeout as error:
        raise OutputError(
            f"another process is building the engines of {directory}; wait until it is done"
        ) from error
    except OSError as error:
        raise OutputError(f"cannot write engines into {folder}: {error}") from error


def resolve_targets(
    config: Config, backend: str, targets: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Return the targets to build for, in the order of `TARGETS`.

    Args:
        config: The model, whose dtypes each target needs.
        backend: "tensorrt-rtx" or "tensorrt".
        targets: GPU architectures. None: the default of `build_engines`.

    Raises:
        ConfigError: A target is unknown, lacks a dtype, or is not this machine's GPU where the
            backend builds for no other.
    """
    if backend == "tensorrt":
        device = CudaDevice(backend)  # the device that the builder takes as well
        device.close()
        own_target = device.target
        if targets and {*targets} != {own_target}:
            raise ConfigError(
                f"tensorrt builds for the GPU of this machine, {own_target}, and no other; "
                "use the backend tensorrt-rtx"
            )
        targets = [own_target]
    chosen = {*(targets or RTX_TARGETS)}
    for target in sorted(chosen):
        check_target(config.precision, target)
        if backend == "tensorrt-rtx" and target in JETSON_TARGETS:
            raise ConfigError(
                f"tensorrt-rtx builds nothing for {target}: copy the bundle to the Jetson and run "
                "'packforcing build --backend tensorrt' there"
            )
    if config.precision.compute == "fp32":
        raise ConfigError(
            f"{config.name} computes in fp32, which {backend} has no attention for; "
            "export it with --precision fp16"
        )
    return tuple(target for target in TARGETS if target in chosen)


def check_graph(path: Path, graph: str, config: Config, targets: Sequence[str]) -> None:
    """Check that targets have a graph's dtypes, and that the denoiser's attention has its length.

    Args:
        path: The ONNX file; weights in files beside it are not read.
        graph: Its name in the contract.
        config: The model.
        targets: GPU architectures.

    Raises:
        ConfigError: A target lacks a dtype that the graph has.
        ExportError: A layer of the denoiser's attention does not read `kv_len`.
        BundleError: The file cannot be read.
    """
    with optional_imports("building engines", "tensorrt-rtx"):
        import onnx_ir as ir

        from packforcing.export.attention import context_attentions
    try:
        nodes = ir.load(path).graph
    except Exception as error:  # as varied as the ways to damage a file
        raise BundleError(f"cannot read {path}: {error}") from error
    dtypes = {value.dtype for value in (*nodes.inputs, *nodes.initializers.values())}
    dtypes |= {value.dtype for node in nodes for value in node.outputs}
    dtypes |= {
        ir.DataType(node.attributes["to"].as_int()) for node in nodes if node.op_type == "Cast"
    }
    special_dtypes = sorted({dtype.name for dtype in dtypes if dtype is not None} - COMMON_DTYPES)
    for target in targets:
        for dtype in special_dtypes:
            name = QUANTIZED_DTYPES.get(dtype, dtype.lower())
            if name not in TARGETS[target]:
                raise ConfigError(
                    f"{path} holds {name}, which {target} lacks; it has "
                    f"{', '.join(('fp32', 'fp16', *TARGETS[target]))}"
                )
    limited_layers = len(context_attentions(nodes))
    if graph == "denoiser" and limited_layers != config.layers:
        raise ExportError(
            f"{path}: attention reads kv_len in {limited_layers} of {config.layers} layers; the "
            "others would read context that was never written: export the bundle again"
        )


def _tool(backend: str) -> str:
    """Return name and version of the installed library, without loading it."""
    if backend not in MODULES:
        raise BackendError(f"unknown backend '{backend}'; engines are for {' and '.join(MODULES)}")
    version = installed_version(backend)
    if version is None:
        raise MissingDependency(
            f"building engines needs {backend}, which is not installed: {install_command(backend)}"
        )
    find_release(backend, version)
    return f"{backend} {version}"


def _length(tool: str, length: Length | None) -> Length:
    """Return how attention gets its length, if the library's release takes it.

    Raises:
        ConfigError: It does not.
    """
    backend, _, version = tool.partition(" ")
    lengths = find_release(backend, version).lengths
    if length is not None and length not in lengths:
        raise ConfigError(f"{tool} has no length of attention: use --length {' or '.join(lengths)}")
    return length or lengths[0]


def _rebuild_reason(
    directory: Path, backend: str, graph: str, key: Key
) -> tuple[str, EngineRecord | None]:
    """Return the record of an engine that is up to date, or why it has to be built."""
    try:
        record = read_record(directory, backend, graph)
        if record is None:
            return "not built yet", None
        changes = differences(record.key, key)
        if changes:
            return "; ".join(changes), None
        check_engine(directory, backend, graph, record)
    except BackendError:
        return "the present one is damaged", None
    return "", record


def _build(
    directory: Path,
    manifest: Manifest,
    backend: str,
    graph: str,
    key: Key,
    on_progress: Callable[[str, float], None],
) -> EngineRecord:
    """Build one engine in a child process; give its file, then its record, their names."""
    engine, record_path = (path(directory, backend, graph) for path in (engine_file, record_file))
    shared = manifest.config if {*key.targets} & {*UNIFIED_TARGETS} else None
    require_resources(directory / graph_file(graph), shared if backend == "tensorrt" else None)
    start = time.perf_counter()
    with new_file(engine) as unfinished:
        job = build_job(manifest, backend, graph, key, unfinished.relative_to(directory))
        built = _run_child(directory, job, engine.with_suffix(".log"), on_progress)
        record = EngineRecord(
            key=key,
            file=built.file,
            weights=built.weights,
            scratch=dict(zip(key.shapes, built.scratch, strict=True)),
            seconds=time.perf_counter() - start,
            peak_memory=built.peak_memory,
            kernels=built.kernels,
        )
        record_path.unlink(missing_ok=True)  # from here on, no engine counts
    write_file(record_path, encode_record(record))
    return record


def build_job(manifest: Manifest, backend: str, graph: str, key: Key, engine: Path) -> BuildJob:
    """Return what a child process needs to know to build an engine.

    Args:
        manifest: The bundle's.
        backend: "tensorrt-rtx" or "tensorrt".
        graph: Its name in the contract.
        key: What the engine is built from.
        engine: The file to write, relative to the bundle.
    """
    profiles = tuple(
        {
            tensor.name: tuple(axes[n] if isinstance(n, str) else n for n in tensor.shape)
            for tensor in contract(manifest.config)[graph].inputs
            if any(isinstance(n, str) for n in tensor.shape)
        }
        for axes in key.shapes.values()
    )
    return BuildJob(
        backend=backend,
        graph=graph_file(graph),
        engine=str(engine),
        targets=key.targets,
        calls=tuple(key.shapes),
        profiles=profiles,
        attentions=manifest.config.layers if key.length else 0,
        length=key.length,
        softmax=manifest.config.precision.attention if key.length else None,
        flags=key.flags,
        kernel_types=kernel_types(manifest.config) if graph == "denoiser" else (),
    )


def kernel_types(config: Config) -> tuple[KernelTypes, ...]:
    """Return the dtypes beside the compute dtype that the denoiser's kernels have to run in.

    Products in such a dtype are those of the quantized layers' matrices; attention in one is that
    over the context.
    """
    precision, types = config.precision, []
    if precision.attention_products != precision.compute:
        types.append(KernelTypes("attention", precision.attention_products, config.layers))
    if precision.products != precision.compute:
        weights = sum(inputs * outputs for inputs, outputs in layer_matrices(config))
        quantized_layers = max(0, config.layers - 2)
        types.append(KernelTypes("product", precision.products, weights * quantized_layers))
    return tuple(types)


def required_bytes(graph: Path) -> tuple[int, int]:
    """Estimate what building a graph needs.

    Args:
        graph: The ONNX file; files that hold its weights lie beside it.

    Returns:
        Bytes of host memory and of disk space.
    """
    memory, disk = (int(factor * _size(graph)) + base for factor, base in (MEMORY, DISK))
    return memory, disk


def _size(graph: Path) -> int:
    return sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*"))


def require_resources(graph: Path, shared: Config | None) -> None:
    """Check that memory and disk suffice for a build.

    Args:
        graph: The ONNX file.
        shared: The model, where TensorRT builds on a GPU that has the host's memory.

    Raises:
        BackendError: Memory does not suffice.
        OutputError: The disk does not.
    """
    memory, disk = required_bytes(graph)
    free_bytes = free_memory()
    if shared is not None:
        whole, swap = build_bytes(shared, graph.stem, _size(graph)), psutil.swap_memory().free
        if free_bytes + min(swap, memory) < whole:  # what the GPU uses cannot be swapped
            raise BackendError(
                f"building {graph.stem} on this device needs {format_memory(whole)} of the memory "
                f"that GPU and host share; {format_memory(free_bytes)} of it and "
                f"{format_memory(swap)} of swap are free: close other programs, add swap "
                "(docs/jetson.md), or quantize the weights (--weight-dtype int4)"
            )
    elif free_bytes < memory:
        raise BackendError(
            f"building {graph.stem} needs {format_memory(memory)} of memory and "
            f"{format_memory(free_bytes)} is free: close other programs, or build on a larger "
            "machine and copy the bundle"
        )
    require_disk_space(graph.parent, disk, f"building {graph.stem}", "make room there")


def _run_child(
    directory: Path, job: BuildJob, log: Path, on_progress: Callable[[str, float], None]
) -> Built:
    """Run the builder in the bundle's folder until it answers."""
    with (
        log.open("wb") as log_file,
        subprocess.Popen(
            # without -P, Python would look for modules in the bundle
            [sys.executable, "-P", "-m", "packforcing.export.builder"],
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log_file,
            start_new_session=True,  # Ctrl-C is for the parent to handle
        ) as child,
    ):
        assert child.stdin and child.stdout
        try:
            with suppress(BrokenPipeError):  # it ended already, and the log says why
                child.stdin.write(msgspec.json.encode(job) + b"\n")
                child.stdin.flush()
            for line in child.stdout:
                message = msgspec.json.decode(line, type=Progress | Built | Failed)
                if isinstance(message, Progress):
                    on_progress(message.phase, message.done)
                elif isinstance(message, Built):
                    return message
                else:
                    raise BackendError(
                        f"{job.backend} builds no engine of {log.stem}: {message.reason}"
                    )
        except BaseException:
            child.kill()
            raise
    last_line = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    raise BackendError(
        f"the process that built {log.stem} ended early, with exit code {child.returncode}"
        f"{' (out of memory?)' if child.returncode == -9 else ''}; "
        f"{log} ends with: {last_line or 'nothing'}"
    )
