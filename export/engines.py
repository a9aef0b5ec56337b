"""Engines from a bundle's graphs, each built in a process of its own, on any machine.

The parent decides and keeps the files, the child holds the library and builds one engine:

1. The parent checks what is cheap, takes the bundle's lock, and says for each engine why it is
   built or that it is up to date (`runtime/engine_records.py` has the key that decides).
2. It starts `python -m packforcing.export.engines`, gives it a `Job` as a line of JSON and keeps
   that pipe open: the child ends when it closes, so none outlives a parent that was killed.
3. The child answers with lines of JSON, `Step` by step, then `Built` or `Failed`. What the
   library prints goes to the engine's log. The engine is written into `.partial`.
4. The parent takes the old record away, moves the engine to its place, writes the new record.

The length of the valid context crosses over by hand, because TensorRT's ONNX parser drops
`Attention`'s `nonpad_kv_seqlen` with a mere warning: `carry_length`. No engine is taken from a
builder that warns of anything unused.

TensorRT-RTX builds without a GPU. TensorRT 11 is the same code under another name, but builds for
the GPU of the machine; it has not been run by us.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import msgspec

from packforcing.config import Config
from packforcing.errors import BackendError, BundleError, ConfigError, ExportError, OutputError
from packforcing.files import FileRecord
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
    graph_files,
    read_record,
    shapes,
)
from packforcing.runtime.plan import TARGETS, check_target
from packforcing.units import format_gib

RTX_TARGETS = ("sm86", "sm89", "sm120")  # RTX 30, 40 and 50: built for where none is named
PARTIAL, LOCK = ".partial", ".lock"
# What a build takes: so many times the bytes of graph and weights, and so much besides. Measured
# by the full-size test of tests/export/test_engines.py, 2.54 GB of weights: 6.81 GB resident
# (graph and copy each once, the rest the builder's own), 2.58 GB of engine.
MEMORY = (2.6, 512 << 20)
DISK = (1.05, 32 << 20)
# Number formats by their name in ONNX; those of every target have no entry in `TARGETS`
EVERYWHERE = {"FLOAT", "FLOAT16", "INT32", "INT64", "BOOL"}
FORMATS = {"INT8": "int8", "INT4": "int4", "FLOAT8E4M3FN": "fp8"}
DEPTH = 4  # of the builder's phases within phases that are told; those below are very many
UNUSED = re.compile(r"unused", re.IGNORECASE)  # in a warning: the builder left something out

OnStep = Callable[[str, str, float], None]  # graph, phase of the builder, part that is done
OnEngine = Callable[[str, str], None]  # graph, what happens with it and why


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a child builds."""

    backend: str
    graph: str  # file
    engine: str  # file to write
    targets: tuple[str, ...]
    profiles: tuple[dict[str, tuple[int, ...]], ...]  # per call, shapes of inputs with open axes
    attentions: int  # layers whose attention must be told the length
    length: Length | None
    flags: tuple[str, ...]


class Step(msgspec.Struct, frozen=True, tag=True):
    """How far a builder is."""

    phase: str
    done: float


class Built(msgspec.Struct, frozen=True, tag=True):
    """A finished engine; `scratch` in the order of the job's profiles."""

    file: FileRecord
    weights: int
    scratch: tuple[int, ...]
    peak_memory: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Why there is no engine."""

    reason: str


# The parent


def build_engines(
    directory: str | Path,
    targets: Sequence[str] | None = None,
    *,
    backend: str = "tensorrt-rtx",
    length: Length = "input",
    stream_weights: bool = False,
    on_engine: OnEngine = lambda graph, text: None,
    on_step: OnStep = lambda graph, phase, done: None,
) -> dict[str, EngineRecord]:
    """Builds the engines of a bundle that are missing, damaged or of another key.

    targets: RTX 30, 40 and 50 by default; for `tensorrt`, this machine's GPU. length: how
    attention is told the valid part of its context, as an input or as a mask that the network
    makes of it. stream_weights: the denoiser's weights may stay on the host in part.

    Raises `ConfigError` for a target that is unknown or lacks a number format, `BackendError` if
    the library is missing, refuses a graph or lacks memory, `ExportError` for a graph that does
    not read the length, `BundleError` for a damaged bundle, `OutputError` if the engines cannot
    be written or another process is building them.
    """
    from filelock import FileLock, Timeout

    directory = Path(directory).resolve()
    manifest = read_manifest(directory)
    tool = _tool(backend)
    targets = check_targets(manifest.config, backend, targets)
    for graph in GPU_GRAPHS:
        check_graph(directory / graph_file(graph), graph, manifest.config, targets)
    folder = directory / ENGINE_FOLDER
    try:
        folder.joinpath(backend).mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK, blocking=False):
            shutil.rmtree(folder / backend / PARTIAL, ignore_errors=True)  # of a killed build
            check_files(directory, manifest)
            records = {}
            for graph in GPU_GRAPHS:
                key = Key(
                    graph=graph_files(manifest, graph),
                    tool=tool,
                    targets=targets,
                    shapes=shapes(manifest.config, graph),
                    length=length if graph == "denoiser" else None,
                    flags=(STREAMING,) if stream_weights and graph == "denoiser" else (),
                )
                reason, record = _reason(directory, backend, graph, key)
                if record is None:
                    on_engine(graph, f"building ({reason})")
                    job = _job(manifest, backend, graph, key)
                    record = _build(directory, job, key, partial(on_step, graph))
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


def check_targets(
    config: Config, backend: str, targets: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The targets to build for, sorted; see `build_engines` for what is raised."""
    if backend == "tensorrt":
        device = CudaDevice()  # the one that the builder takes too
        device.close()
        here = device.target
        if targets and {*targets} != {here}:
            raise ConfigError(
                f"tensorrt builds for the GPU of this machine, {here}, and no other; "
                "use the backend tensorrt-rtx"
            )
        targets = [here]
    chosen = {*(targets or RTX_TARGETS)}
    for target in sorted(chosen):
        check_target(config.precision, target)
    if config.precision.compute == "fp32":
        raise ConfigError(
            f"{config.name} computes in fp32, which {backend} has no attention for; "
            "export it with --precision fp16"
        )
    return tuple(target for target in TARGETS if target in chosen)


def check_graph(path: Path, graph: str, config: Config, targets: Sequence[str]) -> None:
    """Raises `ConfigError` for a number format in a graph that a target lacks, and `ExportError`
    if the denoiser's attention does not read `kv_len` in every layer."""
    try:
        import onnx_ir as ir
    except ModuleNotFoundError as error:
        raise BackendError(
            "building needs onnx-ir, which is not installed: "
            "pip install '.[tensorrt-rtx]' in the checkout"
        ) from error
    try:
        nodes = ir.load(path).graph  # weights beside it are not read
    except Exception as error:  # as varied as the ways to damage a file
        raise BundleError(f"cannot read {path}: {error}") from error
    used = {value.dtype for value in (*nodes.inputs, *nodes.initializers.values())}
    used |= {value.dtype for node in nodes for value in node.outputs}
    used |= {
        ir.DataType(node.attributes["to"].as_int()) for node in nodes if node.op_type == "Cast"
    }
    formats = {kind.name for kind in used if kind is not None} - EVERYWHERE
    for target in targets:
        for kind in sorted(formats):
            if FORMATS.get(kind) not in TARGETS[target]:
                raise ConfigError(
                    f"{path} holds {FORMATS.get(kind, kind.lower())}, which {target} lacks; it has "
                    f"{', '.join(('fp32', 'fp16', *TARGETS[target]))}"
                )
    reading = sum(
        node.op_type == "Attention" and len(node.inputs) > 6 and _name(node.inputs[6]) == "kv_len"
        for node in nodes
    )
    if graph == "denoiser" and reading != config.layers:
        raise ExportError(
            f"{path}: attention reads kv_len in {reading} of {config.layers} layers; the others "
            "would read context that was never written: export the bundle anew"
        )


def _name(value: Any) -> str:
    return "" if value is None else value.name


def _tool(backend: str) -> str:
    """Name and version of the installed library; it is not loaded."""
    if backend not in MODULES:
        raise BackendError(f"unknown backend '{backend}'; engines are for {' and '.join(MODULES)}")
    try:
        return f"{backend} {importlib.metadata.version(backend)}"
    except importlib.metadata.PackageNotFoundError as error:
        raise BackendError(
            f"{backend} is not installed: pip install '.[{backend}]' in the checkout"
        ) from error


def _reason(directory: Path, backend: str, graph: str, key: Key) -> tuple[str, EngineRecord | None]:
    """The record of an engine that is as it should be, or why it has to be built."""
    try:
        record = read_record(directory, backend, graph)
        if record is None:
            return "not built yet", None
        changed = differences(record.key, key)
        if changed:
            return "; ".join(changed), None
        check_engine(directory, backend, graph, record)
    except BackendError:
        return "the one that is there is damaged", None
    return "", record


def _job(manifest: Manifest, backend: str, graph: str, key: Key) -> Job:
    profiles = tuple(
        {
            tensor.name: tuple(axes[n] if isinstance(n, str) else n for n in tensor.shape)
            for tensor in contract(manifest.config)[graph].inputs
            if any(isinstance(n, str) for n in tensor.shape)
        }
        for axes in key.shapes.values()
    )
    return Job(
        backend=backend,
        graph=graph_file(graph),
        engine=f"{ENGINE_FOLDER}/{backend}/{PARTIAL}/{graph}.engine",
        targets=key.targets,
        profiles=profiles,
        attentions=manifest.config.layers if key.length else 0,
        length=key.length,
        flags=key.flags,
    )


def _build(
    directory: Path, job: Job, key: Key, on_step: Callable[[str, float], None]
) -> EngineRecord:
    """Builds one engine in a child and puts it, then its record, in place."""
    unfinished = directory / job.engine
    folder = unfinished.parent
    engine = folder.parent / unfinished.name
    written = engine.with_suffix(".json")
    _check_room(directory / job.graph)
    folder.mkdir()
    began = time.perf_counter()
    try:
        built = _run_child(directory, job, engine.with_suffix(".log"), on_step)
        record = EngineRecord(
            key=key,
            file=built.file,
            weights=built.weights,
            scratch=dict(zip(key.shapes, built.scratch, strict=True)),
            seconds=time.perf_counter() - began,
            peak_memory=built.peak_memory,
        )
        written.unlink(missing_ok=True)  # from here on, no engine counts
        unfinished.replace(engine)
        with (folder / written.name).open("wb") as file:
            file.write(encode_record(record))
            _sync(file)
        (folder / written.name).replace(written)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return record


def room(graph: Path) -> tuple[int, int]:
    """Bytes of memory and of disk that building a graph takes."""
    size = sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*"))
    memory, disk = (int(factor * size) + base for factor, base in (MEMORY, DISK))
    return memory, disk


def _check_room(graph: Path) -> None:
    """Raises `BackendError` or `OutputError` if memory or disk will not do for a build."""
    import psutil

    memory, disk = room(graph)
    free = psutil.virtual_memory().available
    if free < memory:
        raise BackendError(
            f"building {graph.stem} takes {format_gib(memory)} GiB of memory, "
            f"{format_gib(free)} GiB is free: close other programs, or build on a "
            "larger machine and copy the bundle"
        )
    free = shutil.disk_usage(graph.parent).free
    if free < disk:
        raise OutputError(
            f"building {graph.stem} takes {format_gib(disk)} GiB of disk, "
            f"{format_gib(free)} GiB is free in {graph.parent}: make room there"
        )


def _run_child(
    directory: Path, job: Job, log: Path, on_step: Callable[[str, float], None]
) -> Built:
    with (
        log.open("wb") as said,
        subprocess.Popen(
            # without -P, Python would look for modules in the bundle
            [sys.executable, "-P", "-m", "packforcing.export.engines"],
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,  # Ctrl-C is the parent's to handle
        ) as child,
    ):
        assert child.stdin and child.stdout
        try:
            with suppress(BrokenPipeError):  # it ended already, and the log says why
                child.stdin.write(msgspec.json.encode(job) + b"\n")
                child.stdin.flush()
            for line in child.stdout:
                event = msgspec.json.decode(line, type=Step | Built | Failed)
                if isinstance(event, Step):
                    on_step(event.phase, event.done)
                elif isinstance(event, Built):
                    return event
                else:
                    raise BackendError(
                        f"{job.backend} builds no engine of {log.stem}: {event.reason}"
                    )
        except BaseException:
            child.kill()
            raise
    last = log.read_text(errors="replace").strip().rpartition("\n")[2]
    raise BackendError(
        f"the process that built {log.stem} ended early, with exit code {child.returncode}"
        f"{' (out of memory?)' if child.returncode == -9 else ''}; "
        f"{log} ends with: {last or 'nothing'}"
    )


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


# The child


def main() -> None:
    """Builds the job that stands on the first line of the input; see the module's docstring."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what the library prints belongs to the log

    def tell(event: Step | Built | Failed) -> None:
        answers.write(msgspec.json.encode(event) + b"\n")

    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        tell(build_engine(job, tell))
    except BackendError as error:
        tell(Failed(str(error)))


def _end_with_parent() -> None:
    os.read(0, 1)  # comes back when the pipe closes
    os._exit(1)


def build_engine(job: Job, tell: Callable[[Step], None] = lambda step: None) -> Built:
    """Builds an engine in this process and writes it to `job.engine`.

    Raises `BackendError` if the library refuses the graph, leaves an input out or cannot write.
    """
    trt = importlib.import_module(MODULES[job.backend])
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job.graph):
        raise log.refusal()
    if job.length:
        carry_length(trt, network, job)
    config = builder.create_builder_config()
    for flag in job.flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if job.backend == "tensorrt-rtx":  # TensorRT has no choice but the GPU that is there
        config.num_compute_capabilities = len(job.targets)
        for number, target in enumerate(job.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), number)
    for sizes in filter(None, job.profiles):
        profile = builder.create_optimization_profile()
        for name, shape in sizes.items():
            profile.set_shape(name, shape, shape, shape)
        config.add_optimization_profile(profile)
    monitor = _monitor(trt, tell)
    config.progress_monitor = monitor
    with open(job.engine, "wb") as file:
        writer = _writer(trt, file)
        done = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.error:
            raise BackendError(f"cannot write {job.engine}: {writer.error}")
        _sync(file)
    warned = [text for text in log.warnings if UNUSED.search(text)]
    if warned:
        raise BackendError(f"it would leave an input out: {'; '.join(warned)}")
    if not done:
        raise log.refusal()
    weights, scratch = log.figures(len(job.profiles))
    return Built(
        FileRecord(writer.digest.hexdigest(), writer.size), weights, scratch, _peak_memory()
    )


def carry_length(trt: Any, network: Any, job: Job) -> None:
    """Tells every attention over the context how much of it is valid.

    As the length of its keys, or as a mask [1, 1, 1, N + C] that the network makes of it. Raises
    `BackendError` unless there are as many such layers as the job says.
    """
    lengths = [network.get_input(i) for i in range(network.num_inputs)]
    (kv_len,) = (tensor for tensor in lengths if tensor.name == "kv_len")
    length = network.add_cast(kv_len, trt.int32).get_output(0)
    told, mask = 0, None
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type != trt.LayerType.ATTENTION_INPUT:
            continue
        layer.__class__ = trt.IAttentionInputLayer  # the binding hands out its base class
        attention = layer.attention
        keys = attention.get_input(1)
        if keys.shape[2] != -1:  # cross-attention: the text, all of it
            continue
        if job.length == "input":
            attention.key_value_lengths = length
        else:
            mask = mask or _mask(trt, network, keys, length)
            attention.mask = mask
        told += 1
    if told != job.attentions:
        raise BackendError(
            f"{told} of {job.attentions} layers have an attention that takes the context's length"
        )


def _mask(trt: Any, network: Any, keys: Any, length: Any) -> Any:
    """Whether a key's place is below the length: bool [1, 1, 1, keys]."""
    import numpy as np

    def constant(*values: int, dtype: Any = np.int64) -> Any:
        shape = (len(values),) if values else ()
        return network.add_constant(shape, np.array(values, dtype)).get_output(0)

    count = network.add_slice(network.add_shape(keys).get_output(0), (2,), (1,), (1,))
    shape = network.add_concatenation([constant(1, 1, 1), count.get_output(0)])
    places = network.add_fill((1, 1, 1, 1), trt.FillOperation.LINSPACE, trt.int32)
    places.set_input(0, shape.get_output(0))
    places.set_input(1, network.add_constant((), np.array(0, np.int32)).get_output(0))
    places.set_input(2, constant(0, 0, 0, 1, dtype=np.int32))
    limit = network.add_shuffle(length)
    limit.reshape_dims = (1, 1, 1, 1)
    below = trt.ElementWiseOperation.LESS
    return network.add_elementwise(places.get_output(0), limit.get_output(0), below).get_output(0)


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):
        """Prints what the builder says, into the log, and keeps what decides."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.sizes: dict[str, list[int]] = {"Weights": [], "Activation": []}

        def log(self, severity: Any, text: str) -> None:
            if severity == trt.ILogger.VERBOSE:
                return
            print(severity.name, text, file=sys.stderr, flush=True)
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(text)
            if severity == trt.ILogger.WARNING:
                self.warnings.append(text)
            if found := re.search(r"Total (Weights|Activation) Memory: (\d+) bytes", text):
                self.sizes[found[1]].append(int(found[2]))

        def refusal(self) -> BackendError:
            return BackendError(f"it says: {'; '.join(self.errors) or 'nothing'}")

        def figures(self, profiles: int) -> tuple[int, tuple[int, ...]]:
            """Bytes of weights, and of scratch per profile."""
            weights, scratch = self.sizes["Weights"], self.sizes["Activation"]
            if (len(weights), len(scratch)) != (1, profiles):
                raise BackendError(
                    f"it states {len(weights)} figures for weights and {len(scratch)} for scratch, "
                    f"not 1 and {profiles}: this version speaks differently, use another"
                )
            return weights[0], tuple(scratch)

    return Log()


def _monitor(trt: Any, tell: Callable[[Step], None]) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Phases lie in each other; a step of one ends where its parts end."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: list[tuple[str, int]] = []  # name and steps, the outermost first
            self.done: list[int] = []
            self.most = 0.0  # some phases start anew, what was told stays

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases.append((name, max(1, steps)))
            self.done.append(0)
            if len(self.phases) <= DEPTH:  # the longest phases have one step
                tell(Step(name, self.most))

        def phase_finish(self, name: str) -> None:
            self.phases.pop()
            self.done.pop()

        def step_complete(self, name: str, step: int) -> bool:
            self.done[[phase for phase, _ in self.phases].index(name)] = step + 1
            part = 0.0
            for (_, steps), done in zip(reversed(self.phases), reversed(self.done)):
                part = min(1.0, (done + part) / steps)
            if part >= self.most + 0.01:
                self.most = part
                tell(Step(name, part))
            return True

    return Monitor()


def _writer(trt: Any, file: IO[bytes]) -> Any:
    class Writer(trt.IStreamWriter):
        """Writes an engine as it comes, so that no second copy is in memory."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.digest, self.size = hashlib.sha256(), 0
            self.error: OSError | None = None

        def write(self, data: Any) -> int:
            part = memoryview(data)
            try:
                file.write(part)
            except OSError as error:  # must not pass through the library
                self.error = error
                return 0
            self.digest.update(part)
            self.size += part.nbytes
            return part.nbytes

    return Writer()


def _peak_memory() -> int:
    """The most resident memory that this process has had, in bytes."""
    import psutil

    now = psutil.Process().memory_info()
    if hasattr(now, "peak_wset"):  # Windows
        return now.peak_wset
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else now.rss


if __name__ == "__main__":
    main()
