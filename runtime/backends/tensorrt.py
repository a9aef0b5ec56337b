"""Run engines on a GPU: TensorRT-RTX and TensorRT are one interface under two names.

What can be known without loading an engine is checked first, so that a mistake costs no time:
library, driver, GPU, what the engines were built from and for, and whether they fit. Then they
are loaded one by one. They take turns, so they share one scratch memory. Every binding is an
execution context of its own, with shapes and addresses set once.

TensorRT-RTX compiles kernels when a context is made. The compiled kernels are stored beside the
engines, and the next start reads them with the same GPU, driver and library.
"""

from __future__ import annotations

import importlib
import logging
import mmap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from packforcing.config import Config
from packforcing.errors import BackendError, MissingDependency, OutputError
from packforcing.extras import install_command, optional_imports
from packforcing.files import write_file
from packforcing.runtime.buffers import Arrays
from packforcing.runtime.bundle import GraphSpec
from packforcing.runtime.device import Array, CudaDevice
from packforcing.runtime.engine_records import (
    EngineRecord,
    Key,
    check_engine,
    current_records,
    engine_file,
    shapes,
)
from packforcing.runtime.plan import RESERVE, Plan, make_plan, stream
from packforcing.runtime.tensorrt_releases import find_release
from packforcing.units import format_gib

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
RUNTIME_CACHE = "runtime.cache"
STREAMING = "WEIGHT_STREAMING"  # the builder's flag that lets weights stay on the host
ALIGNMENT = 256  # bytes, of every address of an input or output
# the libraries' names of the contract's dtypes
TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "int8": "INT8",
    "float8_e4m3fn": "FP8",
    "int64": "INT64",
}
REASONS = {  # why TensorRT-RTX refuses an engine, and the remedy
    "VERSION_MISMATCH": "another version built it: run 'packforcing build' again",
    "UNSUPPORTED_CC": "it was built for other GPUs: run 'packforcing build' for this one",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old: update it",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old: update tensorrt-rtx",
    "INSUFFICIENT_GPU_MEMORY": "too little GPU memory is free: close other programs that use it",
    "MALFORMED_ENGINE": "the file is damaged: run 'packforcing build' again",
    "CUDA_ERROR": "CUDA fails: restart the program, then the machine",
}


class Engines:
    """The engines of a bundle on one GPU, and the scratch memory they share.

    The constructor checks everything that needs no engine loaded.

    Args:
        name: "tensorrt-rtx" or "tensorrt".
        directory: The bundle.
        config: The bundle's config, with the policy to run.
        device: The GPU, among the visible ones.

    Attributes:
        device: The GPU.

    Raises:
        BackendError: The library, the GPU or an engine cannot be used.
        MissingDependency: The library is not installed.
    """

    def __init__(self, name: str, directory: Path, config: Config, device: int = 0) -> None:
        self.name, self._directory = name, directory
        self._trt = trt = _library(name)
        find_release(name, trt.__version__)
        self.device = CudaDevice(name, device)
        self._log = _logger(trt)
        self._runtime = trt.Runtime(self._log)
        self._records = matching_records(name, directory, config, self.device)
        for graph in self._records:
            self._check_validity(engine_file(directory, name, graph))
        self._plan = self._fitting(config)
        for graph, record in self._records.items():
            check_engine(directory, name, graph, record)
        self._scratch: Array | None = None
        self._cache: Any = None
        self._stored_kernels = b""

    @property
    def identity(self) -> str:
        """The GPU, the library's version and the engines' SHA-256, cut short."""
        files = ", ".join(
            f"{graph} {record.file.sha256[:16]}" for graph, record in self._records.items()
        )
        return f"{self.device.name} with {self.name} {self._trt.__version__} ({files})"

    def load(self, specs: dict[str, GraphSpec]) -> dict[str, Engine]:
        """Load the engines and allocate their scratch memory.

        Args:
            specs: The contract's graphs.

        Returns:
            The engines, by graph.

        Raises:
            BackendError: An engine does not load, or needs more scratch than was planned.
        """
        loaded = {}
        for graph in self._records:
            loaded[graph] = engine = self._load(engine_file(self._directory, self.name, graph))
            if graph == "denoiser" and self._plan.streamed:  # before the next one needs the room
                resident_bytes = engine.streamable_weights_size - self._plan.streamed
                engine.weight_streaming_budget_v2 = resident_bytes
        scratch = max(engine.device_memory_size_v2 for engine in loaded.values())
        planned = self._plan.device["scratch"]
        if scratch > planned + RESERVE:
            raise BackendError(
                f"the engines want {format_gib(scratch)} GiB of scratch memory on "
                f"{self.device.name}, {format_gib(planned)} GiB was planned: report "
                f"this, with what 'packforcing plan {self._directory}' prints"
            )
        self._scratch = self.device.allocate("scratch", (scratch,), "uint8")
        return {graph: Engine(self, engine, specs[graph]) for graph, engine in loaded.items()}

    def context(self, engine: Any) -> Any:
        """Make an execution context on the shared scratch memory."""
        trt, scratch = self._trt, self._scratch
        assert scratch is not None
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self.name == "tensorrt-rtx":
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            # Shapes are fixed, so the final kernels are compiled now. Compiled in the background,
            # they would change results and take memory later.
            config.dynamic_shapes_kernel_specialization_strategy = (
                trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            config.set_runtime_cache(self._runtime_cache(config))
        context = engine.create_execution_context(config)
        if context is None:
            raise self.error("cannot make an execution context")
        context.set_device_memory(scratch.address, scratch.nbytes)
        return context

    def error(self, what: str) -> BackendError:
        """Return an error that ends with the library's own message."""
        message = next(iter(self._log.errors), "no reason given")
        return BackendError(f"{self.name} {what}: {message}")

    def close(self) -> None:
        """Store the compiled kernels for the next start, and release the GPU."""
        self._store_kernels()
        self._scratch = None  # but not the cache, which contexts refer to as long as they live
        self.device.close()

    def _fitting(self, config: Config) -> Plan:
        """Make the plan that these engines follow, with as little streaming as fits."""
        figures = {name: size for r in self._records.values() for name, size in r.figures.items()}
        free_bytes, _ = self.device.free_memory()
        plan = stream(make_plan(config, self.device.target, built=figures), free_bytes)
        self.device.require(plan.at_start, config.name)
        if plan.streamed and STREAMING not in self._records["denoiser"].key.flags:
            raise BackendError(
                "the GPU has too little free memory for all weights of the denoiser, whose "
                "engine was built without streaming: run 'packforcing build --stream-weights'"
            )
        return plan

    def _check_validity(self, path: Path) -> None:
        """Ask TensorRT-RTX, by the engine's header, whether it could run the engine here."""
        if self.name != "tensorrt-rtx":
            return  # TensorRT has to load the engine for that
        with path.open("rb") as file:
            header = file.read(self._runtime.engine_header_size)
        validity, diagnostics = self._runtime.get_engine_validity(header)
        if validity == self._trt.EngineValidity.INVALID:
            reasons = self._trt.EngineInvalidityDiagnostics.__members__
            messages = [
                REASONS.get(name, name)
                for name, bit in reasons.items()
                if int(bit) & int(diagnostics)
            ]
            if not messages:
                raise self.error(f"cannot run {path}")
            raise BackendError(f"{self.name} cannot run {path}: {'; '.join(messages)}")

    def _load(self, path: Path) -> Any:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self.error(f"cannot load {path}")
        return engine

    @property
    def _cache_path(self) -> Path:
        return engine_file(self._directory, self.name, "denoiser").parent / RUNTIME_CACHE

    def _runtime_cache(self, config: Any) -> Any:
        """Return the cache of compiled kernels for all contexts, filled by the last start."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with suppress(OSError):  # none yet
                self._stored_kernels = self._cache_path.read_bytes()
                self._cache.deserialize(self._stored_kernels)  # another GPU's: stays empty
        return self._cache

    def _store_kernels(self) -> None:
        if self._cache is None:
            return
        kernels = bytes(self._cache.serialize())
        if kernels == self._stored_kernels:
            return
        try:
            write_file(self._cache_path, kernels)
        except OutputError as error:
            logging.getLogger(__name__).warning(
                "%s: the next start compiles the GPU's kernels again", error
            )


class Engine:
    """A loaded engine; `seconds` adds up the time spent in its calls."""

    def __init__(self, engines: Engines, engine: Any, spec: GraphSpec) -> None:
        self._engines, self._engine = engines, engine
        self.spec, self.seconds = spec, 0.0
        tensors = (*spec.inputs, *spec.outputs)
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        expected = {tensor.name: TYPES[tensor.dtype] for tensor in tensors}
        dtypes = {name: engine.get_tensor_dtype(name).name for name in names}
        if dtypes != expected:
            wrong = [n for n in dtypes.keys() | expected if dtypes.get(n) != expected.get(n)]
            raise BackendError(
                f"the engine of {engines.name} differs from its graph in "
                f"{', '.join(sorted(wrong))}: run 'packforcing build' again"
            )

    def scratch(self) -> list[int]:
        """Return the bytes of scratch memory on this GPU, per optimization profile."""
        count = self._engine.num_optimization_profiles
        return [self._engine.get_device_memory_size_for_profile_v2(i) for i in range(count)]

    def bind(self, arrays: Arrays) -> Callable[[], None]:
        """Fix inputs and outputs to arrays for good; return the call that runs the engine."""
        device, context = self._engines.device, self._engines.context(self._engine)
        if not context.set_optimization_profile_async(self._profile(arrays), device.stream):
            raise self._engines.error("refuses an optimization profile")
        for tensor in self.spec.inputs:
            if not context.set_input_shape(tensor.name, arrays[tensor.name].shape):
                raise self._engines.error(f"refuses the shape of {tensor.name}")
        for tensor in (*self.spec.inputs, *self.spec.outputs):
            address = arrays[tensor.name].address
            if address % ALIGNMENT or not context.set_tensor_address(tensor.name, address):
                raise BackendError(
                    f"{self._engines.name} takes {tensor.name} only at addresses that are "
                    f"multiples of {ALIGNMENT}: for this video size use an onnxruntime backend"
                )
        device.synchronize()

        def call(keep_alive: Arrays = arrays) -> None:
            start = time.perf_counter()
            if not context.execute_async_v3(device.stream):
                raise self._engines.error("failed to run")
            device.synchronize()
            self.seconds += time.perf_counter() - start

        return call

    def _profile(self, arrays: Arrays) -> int:
        """Return the optimization profile for the shapes of these arrays.

        Each profile is for one shape of the inputs whose graph leaves an axis open.
        """
        shapes = {
            tensor.name: tuple(arrays[tensor.name].shape)
            for tensor in self.spec.inputs
            if any(isinstance(n, str) for n in tensor.shape)
        }
        for profile in range(self._engine.num_optimization_profiles):
            if all(
                tuple(self._engine.get_tensor_profile_shape(name, profile)[1]) == shape
                for name, shape in shapes.items()
            ):
                return profile
        raise BackendError(
            f"an engine of {self._engines.name} has no profile for these shapes: run 'packforcing "
            "build' again"
        )


def matching_records(
    name: str, directory: Path, config: Config, device: CudaDevice
) -> dict[str, EngineRecord]:
    """Read the records of engines, which are small, and check that the engines can run here.

    Args:
        name: "tensorrt-rtx" or "tensorrt".
        directory: The bundle; the engines themselves need not be there.
        config: The bundle's config, with the policy to run.
        device: The GPU.

    Raises:
        BackendError: They cannot.
        MissingDependency: The library is not installed.
    """
    version = _library(name).__version__
    records = current_records(directory, name)
    for graph, record in records.items():
        path = engine_file(directory, name, graph)
        check_key(path, record.key, shapes(config, graph), version, device)
    return records


def check_key(
    path: Path, key: Key, shapes: dict[str, dict[str, int]], version: str, device: CudaDevice
) -> None:
    """Check that an engine was built by this version of the library, for this device and shapes.

    Args:
        path: The engine, for the message.
        key: The key in its record.
        shapes: Per call, the sizes of the axes N and C.
        version: The installed library's version.
        device: The GPU.

    Raises:
        BackendError: It was not.
    """
    build = f"packforcing build {path.parents[2]}"
    if key.tool.split()[-1] != version:
        raise BackendError(f"{path} was built by {key.tool}, installed is {version}: run '{build}'")
    if device.target not in key.targets:
        raise BackendError(
            f"{path} was built for {', '.join(key.targets)}; {device.name} is {device.target}: "
            f"run '{build} --targets {device.target}'"
        )
    if key.shapes != shapes:
        context = [f"{call['C']:,}" for call in (*key.shapes.values(), *shapes.values())]
        raise BackendError(
            f"{path} was built to read {context[0]} tokens of context, this policy reads "
            f"{context[-1]}: use the policy that the bundle was exported with"
        )


def _library(name: str) -> Any:
    """Import the library of a backend."""
    try:
        with optional_imports(f"the backend {name}", name):
            return importlib.import_module(MODULES[name])
    except MissingDependency:
        raise
    except Exception as error:  # a broken installation raises anything
        raise BackendError(
            f"{name} is installed but does not load ({error}): pip uninstall {name}, then "
            f"{install_command(name)}"
        ) from error


def _logger(trt: Any) -> Any:
    """Make a logger that collects the library's errors for messages and prints nothing."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.Logger.ERROR, trt.Logger.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()
