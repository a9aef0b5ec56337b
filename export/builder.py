"""Build one engine in this process; the only module that loads TensorRT to build.

`python -m packforcing.export.builder` is the child process of `packforcing.export.engines`. It
reads a `BuildJob` as one line of JSON from standard input, and answers on standard output with
lines of JSON: `Progress` messages, then `Built` or `Failed`. What TensorRT prints goes to standard
error, which is the engine's log. The process ends when its standard input closes.

TensorRT's ONNX parser drops `Attention`'s input `nonpad_kv_seqlen` with a mere warning. So
`set_context_length` sets the length on the parsed network, and a build in which TensorRT warns of
anything unused fails. It does not even warn where it has no kernel for a type and takes another:
`packforcing.export.kernels` reads what it lists. What differs between releases is in
`packforcing.runtime.tensorrt_releases`.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import msgspec

from packforcing.errors import BackendError
from packforcing.export.kernels import LIST, KernelTypes, check_kernels, read_kernels
from packforcing.files import FileRecord
from packforcing.runtime.backends.tensorrt import MODULES
from packforcing.runtime.engine_records import Kernels, Length
from packforcing.runtime.tensorrt_releases import find_release

PHASE_DEPTH = 4  # nested builder phases that are reported; there are very many deeper ones
UNUSED = re.compile(r"unused", re.IGNORECASE)  # in a warning: TensorRT left something out


class BuildJob(msgspec.Struct, frozen=True, kw_only=True):
    """What a child process builds; paths are relative to its working directory."""

    backend: str
    graph: str  # ONNX file
    engine: str  # file to write
    targets: tuple[str, ...]
    calls: tuple[str, ...]
    profiles: tuple[dict[str, tuple[int, ...]], ...]  # per call, shapes of inputs with open axes
    attentions: int  # layers whose attention needs the length of the context
    length: Length | None  # how it gets that length
    softmax: str | None  # dtype that this attention's softmax is quantized to
    flags: tuple[str, ...]  # names of TensorRT builder flags
    kernel_types: tuple[KernelTypes, ...]  # that the recipe names


class Progress(msgspec.Struct, frozen=True, tag=True):
    """A phase of the builder, and the share of the build that is done, 0 to 1."""

    phase: str
    done: float


class Built(msgspec.Struct, frozen=True, tag=True):
    """A finished engine. Sizes in bytes; `scratch` in the order of the job's profiles."""

    file: FileRecord
    weights: int
    scratch: tuple[int, ...]
    kernels: tuple[Kernels, ...]
    peak_memory: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Why there is no engine."""

    reason: str


def main() -> None:
    """Build the job on the first line of standard input."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # TensorRT prints to standard output, which belongs into the log

    def send(message: Progress | Built | Failed) -> None:
        answers.write(msgspec.json.encode(message) + b"\n")

    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=BuildJob)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        send(build_engine(job, send))
    except BackendError as error:
        send(Failed(str(error)))


def _exit_with_parent() -> None:
    os.read(0, 1)  # returns when the pipe closes
    os._exit(1)


def build_engine(
    job: BuildJob, on_progress: Callable[[Progress], None] = lambda progress: None
) -> Built:
    """Build an engine in this process and write it to `job.engine`.

    Args:
        job: What to build.
        on_progress: Called when a phase begins and when another hundredth is done.

    Returns:
        The engine's file, and the sizes that TensorRT stated for it.

    Raises:
        BackendError: TensorRT refuses the graph, leaves an input out, runs attention or products
            in another type than the recipe's, or the file cannot be written.
    """
    from packforcing.export.nvfp4 import tensorrt_model  # imports ONNX

    trt = importlib.import_module(MODULES[job.backend])
    release = find_release(job.backend, trt.__version__)
    log = _logger(trt)
    builder = trt.Builder(log)
    flags = (getattr(trt.NetworkDefinitionCreationFlag, name) for name in release.network_flags)
    network = builder.create_network(sum(1 << int(flag) for flag in flags))
    parser = trt.OnnxParser(network, log)
    without_length = bool(job.length) and not release.reads_length
    model = tensorrt_model(Path(job.graph), without_length=without_length)
    if not (parser.parse(model, job.graph) if model else parser.parse_from_file(job.graph)):
        raise log.refusal()
    if job.length:
        set_context_length(trt, network, job)
    if job.softmax:
        quantize_softmax(trt, network, job.softmax)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # lists the types of kernels
    for flag in job.flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if job.backend == "tensorrt-rtx":  # TensorRT builds for the GPU of this machine alone
        config.num_compute_capabilities = len(job.targets)
        for index, target in enumerate(job.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    for shapes in filter(None, job.profiles):
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape, shape, shape)
        config.add_optimization_profile(profile)
    monitor = _monitor(trt, on_progress)
    config.progress_monitor = monitor
    with open(job.engine, "wb") as file:
        writer = _writer(trt, file)
        succeeded = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.error:
            raise BackendError(f"cannot write {job.engine}: {writer.error}")
        file.flush()
        os.fsync(file.fileno())
    unused = [text for text in log.warnings if UNUSED.search(text)]
    if unused:
        raise BackendError(f"it would leave an input out: {'; '.join(unused)}")
    if not succeeded:
        raise log.refusal()
    if release.states_sizes:
        weights, scratch = log.memory_sizes(len(job.profiles))
    else:
        del builder, network, parser, config  # their memory, before the engine takes its own
        weights = max(log.sizes["Weights"], default=0)
        log.layers, scratch = _ask_engine(trt, log, Path(job.engine))
    kernels = read_kernels(log.layers, job.calls)
    check_kernels(kernels, job.kernel_types, job.calls)
    file_written = FileRecord(writer.digest.hexdigest(), writer.size)
    return Built(file_written, weights, scratch, kernels, peak_memory())


def _ask_engine(trt: Any, log: Any, path: Path) -> tuple[str, tuple[int, ...]]:
    """Load an engine on the GPU that it was built on, for what TensorRT's log does not tell.

    Returns:
        Its layer list, and the bytes of scratch by optimization profile.

    Raises:
        BackendError: It does not load.
    """
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise log.refusal()
    profiles = range(engine.num_optimization_profiles)
    scratch = tuple(engine.get_device_memory_size_for_profile_v2(index) for index in profiles)
    inspector = engine.create_engine_inspector()
    return inspector.get_engine_information(trt.LayerInformationFormat.ONELINE), scratch


def set_context_length(trt: Any, network: Any, job: BuildJob) -> None:
    """Limit every attention over the context to its valid part, whose end `kv_len` states.

    Args:
        trt: TensorRT's module.
        network: The parsed denoiser, `INetworkDefinition`.
        job: With the length "input", attention takes `kv_len` as the length of its keys. With
            "mask", it takes a mask, bool [1, 1, 1, N + C], that the network computes of it: for
            a GPU that disagrees about the length.

    Raises:
        BackendError: The number of such attention layers is not `job.attentions`.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    kv_len = next((tensor for tensor in inputs if tensor.name == "kv_len"), None)
    if kv_len is None:  # a parser may leave out what no node reads
        kv_len = network.add_input("kv_len", trt.int64, (1,))
    length = network.add_cast(kv_len, trt.int32).get_output(0)
    limited_layers, mask = 0, None
    for attention in _context_attentions(trt, network):
        if job.length == "input":
            attention.key_value_lengths = length
        else:
            mask = mask or _context_mask(trt, network, attention.get_input(1), length)
            attention.mask = mask
        limited_layers += 1
    if limited_layers != job.attentions:
        raise BackendError(
            f"{limited_layers} of {job.attentions} layers have an attention that takes the "
            "context's length"
        )


def quantize_softmax(trt: Any, network: Any, dtype: str) -> None:
    """Quantize the softmax of every attention over the context, which ONNX cannot say.

    Without it the builder takes a kernel in the compute dtype, and says nothing. The scale is that
    of a range that ends at 1.

    Args:
        trt: TensorRT's module.
        network: The parsed denoiser, `INetworkDefinition`.
        dtype: "fp8", which queries, keys and values are quantized to as well.
    """
    import ml_dtypes
    import numpy as np

    largest = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
    scale = network.add_constant((), np.array(1 / largest, np.float16)).get_output(0)
    for attention in _context_attentions(trt, network):
        attention.normalization_quantize_to_type = getattr(trt, dtype)
        attention.normalization_quantize_scale = scale


def _context_attentions(trt: Any, network: Any) -> Iterator[Any]:
    """Yield every `IAttention` over the context; cross-attention is over all of the text."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the binding returns the base class
            if layer.attention.get_input(1).shape[2] == -1:
                yield layer.attention


def _context_mask(trt: Any, network: Any, keys: Any, length: Any) -> Any:
    """Compute whether a key's index is below the length, bool [1, 1, 1, keys]."""
    import numpy as np

    def constant(*values: int, dtype: Any = np.int64) -> Any:
        shape = (len(values),) if values else ()
        return network.add_constant(shape, np.array(values, dtype)).get_output(0)

    count = network.add_slice(network.add_shape(keys).get_output(0), (2,), (1,), (1,))
    shape = network.add_concatenation([constant(1, 1, 1), count.get_output(0)])
    indices = network.add_fill((1, 1, 1, 1), trt.FillOperation.LINSPACE, trt.int32)
    indices.set_input(0, shape.get_output(0))
    indices.set_input(1, network.add_constant((), np.array(0, np.int32)).get_output(0))
    indices.set_input(2, constant(0, 0, 0, 1, dtype=np.int32))
    limit = network.add_shuffle(length)
    limit.reshape_dims = (1, 1, 1, 1)
    less = trt.ElementWiseOperation.LESS
    return network.add_elementwise(indices.get_output(0), limit.get_output(0), less).get_output(0)


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):
        """Prints what TensorRT says, and stores what decides about the build."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.layers = ""
            self.sizes: dict[str, list[int]] = {"Weights": [], "Activation": []}

        def log(self, severity: Any, text: str) -> None:
            if severity == trt.ILogger.VERBOSE:
                if text.startswith(LIST):
                    self.layers += text
                return
            print(severity.name, text, file=sys.stderr, flush=True)
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(text)
            if severity == trt.ILogger.WARNING:
                self.warnings.append(text)
            if total := re.search(r"Total (Weights|Activation) Memory: (\d+) bytes", text):
                self.sizes[total[1]].append(int(total[2]))

        def refusal(self) -> BackendError:
            return BackendError(f"it says: {'; '.join(self.errors) or 'nothing'}")

        def memory_sizes(self, profiles: int) -> tuple[int, tuple[int, ...]]:
            """Return the bytes of weights, and of scratch per profile."""
            weights, scratch = self.sizes["Weights"], self.sizes["Activation"]
            if (len(weights), len(scratch)) != (1, profiles):
                raise BackendError(
                    f"it states {len(weights)} sizes of weights and {len(scratch)} of scratch, "
                    f"not 1 and {profiles}: this version prints another log, use a version that "
                    "pyproject.toml allows"
                )
            return weights[0], tuple(scratch)

    return Log()


def _monitor(trt: Any, on_progress: Callable[[Progress], None]) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Phases are nested: a step of one is complete when the phases in it are."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: list[tuple[str, int]] = []  # name and number of steps, outermost first
            self.steps_done: list[int] = []
            self.reported = 0.0  # never falls, though some phases start again

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases.append((name, max(1, steps)))
            self.steps_done.append(0)
            if len(self.phases) <= PHASE_DEPTH:  # the longest phases have one step
                on_progress(Progress(name, self.reported))

        def phase_finish(self, name: str) -> None:
            self.phases.pop()
            self.steps_done.pop()

        def step_complete(self, name: str, step: int) -> bool:
            self.steps_done[[phase for phase, _ in self.phases].index(name)] = step + 1
            share = 0.0
            for (_, steps), done in zip(reversed(self.phases), reversed(self.steps_done)):
                share = min(1.0, (done + share) / steps)
            if share >= self.reported + 0.01:
                self.reported = share
                on_progress(Progress(name, share))
            return True

    return Monitor()


def _writer(trt: Any, file: IO[bytes]) -> Any:
    class Writer(trt.IStreamWriter):
        """Writes an engine as it is serialized, so that no second copy is in memory."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.digest, self.size = hashlib.sha256(), 0
            self.error: OSError | None = None

        def write(self, data: Any) -> int:
            chunk = memoryview(data)
            try:
                file.write(chunk)
            except OSError as error:  # must not pass through the library
                self.error = error
                return 0
            self.digest.update(chunk)
            self.size += chunk.nbytes
            return chunk.nbytes

    return Writer()


def peak_memory() -> int:
    """Return the largest resident memory that this process has had, in bytes."""
    with suppress(OSError):  # Linux, where ru_maxrss counts the parent's memory at the fork too
        peak = re.search(
            r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8")
        )
        if peak:
            return int(peak[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
