"""Engines on a GPU: TensorRT-RTX and TensorRT are one interface under two names.

What can be known without loading an engine is checked first, so that a mistake costs no time:
library, driver, GPU, what the engines were built from and for, and whether they fit. Then they
are loaded one by one. They take turns, so they share one scratch memory, and every binding is
an execution context of its own, with shapes and addresses set once.

TensorRT-RTX compiles kernels when a context is made. What it compiled is kept beside the
engines, and read on the next start by the same GPU, driver and library.
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
from packforcing.errors import BackendError
from packforcing.runtime.buffers import Arrays
from packforcing.runtime.bundle import GraphSpec
from packforcing.runtime.device import Array, CudaDevice
from packforcing.runtime.engine_records import (
    Key,
    check_engine,
    current_records,
    engine_file,
    shapes,
)
from packforcing.runtime.plan import RESERVE, Plan, make_plan, stream
from packforcing.units import format_gib

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
RUNTIME_CACHE = "runtime.cache"
STREAMING = "WEIGHT_STREAMING"  # the builder's flag that lets weights stay on the host
ALIGNMENT = 256  # bytes, of every address an engine is given
# how the libraries call the number formats of the contract
TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "int8": "INT8",
    "float8_e4m3fn": "FP8",
    "int64": "INT64",
}
REASONS = {  # why TensorRT-RTX refuses an engine, and what helps
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

    Making one checks everything that needs no engine loaded. Raises `BackendError`.
    """

    def __init__(self, name: str, directory: Path, config: Config) -> None:
        self.name, self._directory = name, directory
        self._trt = trt = _library(name)
        self.device = CudaDevice()
        self._log = _logger(trt)
        self._runtime = trt.Runtime(self._log)
        self._records = current_records(directory, name)
        for graph, record in self._records.items():
            path = engine_file(directory, name, graph)
            check_key(path, record.key, shapes(config, graph), trt.__version__, self.device)
            self._check_validity(path)
        self._plan = self._fitting(config)
        for graph, record in self._records.items():
            check_engine(directory, name, graph, record)
        self._scratch: Array | None = None
        self._cache: Any = None
        self._cached = b""

    @property
    def identity(self) -> str:
        """The card, the library's version and the engines' SHA-256, cut short."""
        files = ", ".join(
            f"{graph} {record.file.sha256[:16]}" for graph, record in self._records.items()
        )
        return f"{self.device.name} with {self.name} {self._trt.__version__} ({files})"

    def load(self, specs: dict[str, GraphSpec]) -> dict[str, Engine]:
        """Loads weights and allocates the scratch; raises `BackendError`."""
        loaded = {}
        for graph in self._records:
            loaded[graph] = engine = self._load(engine_file(self._directory, self.name, graph))
            if graph == "denoiser" and self._plan.streamed:  # before the next one needs the room
                kept = engine.streamable_weights_size - self._plan.streamed
                engine.weight_streaming_budget_v2 = kept
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
        """An execution context on the shared scratch."""
        trt, scratch = self._trt, self._scratch
        assert scratch is not None
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self.name == "tensorrt-rtx":
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            # shapes are fixed: the final kernels from the first call on, not in the background,
            # where they would change results and take memory later
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
        """An error with the library's own words."""
        return BackendError(
            f"{self.name} {what}: {next(iter(self._log.errors), 'no reason given')}"
        )

    def close(self) -> None:
        """Keeps what was compiled for the next start, and gives the GPU back."""
        self._keep_cache()
        self._scratch = None  # but not the cache, which contexts refer to as long as they live
        self.device.close()

    def _fitting(self, config: Config) -> Plan:
        """The plan that these engines follow, streaming weights if it must; all of it fits."""
        figures = {name: size for r in self._records.values() for name, size in r.figures.items()}
        free, _ = self.device.free_memory()
        plan = stream(make_plan(config, self.device.target, built=figures), free)
        self.device.require(plan.total, config.name)
        if plan.streamed and STREAMING not in self._records["denoiser"].key.flags:
            raise BackendError(
                "the GPU has too little free memory for all weights of the denoiser, and its "
                "engine was built to hold them: run 'packforcing build --stream-weights'"
            )
        return plan

    def _check_validity(self, path: Path) -> None:
        """Asks TensorRT-RTX whether it could run an engine here, by the engine's header."""
        if self.name != "tensorrt-rtx":
            return  # TensorRT only finds out by loading
        with path.open("rb") as file:
            header = file.read(self._runtime.engine_header_size)
        validity, found = self._runtime.get_engine_validity(header)
        if validity == self._trt.EngineValidity.INVALID:
            reasons = self._trt.EngineInvalidityDiagnostics.__members__
            named = [
                REASONS.get(name, name) for name, bit in reasons.items() if int(bit) & int(found)
            ]
            if not named:
                raise self.error(f"cannot run {path}")
            raise BackendError(f"{self.name} cannot run {path}: {'; '.join(named)}")

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
        """One cache of compiled kernels for all contexts, with what the last start left."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with suppress(OSError):  # none yet
                self._cached = self._cache_path.read_bytes()
                self._cache.deserialize(self._cached)  # of another GPU or driver: stays empty
        return self._cache

    def _keep_cache(self) -> None:
        if self._cache is None:
            return
        compiled = bytes(self._cache.serialize())
        if compiled == self._cached:
            return
        beside = self._cache_path.with_suffix(".partial")
        try:
            beside.write_bytes(compiled)
            beside.replace(self._cache_path)
        except OSError as error:
            logging.getLogger(__name__).warning(
                "cannot keep compiled kernels in %s (%s): the next start compiles them again",
                self._cache_path, error.strerror,
            )  # fmt: skip


class Engine:
    """A loaded engine; `seconds` adds up the time spent inside it."""

    def __init__(self, engines: Engines, engine: Any, spec: GraphSpec) -> None:
        self._engines, self._engine = engines, engine
        self.spec, self.seconds = spec, 0.0
        tensors = (*spec.inputs, *spec.outputs)
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        want = {tensor.name: TYPES[tensor.dtype] for tensor in tensors}
        have = {name: engine.get_tensor_dtype(name).name for name in names}
        if have != want:
            wrong = sorted(name for name in have.keys() | want if have.get(name) != want.get(name))
            raise BackendError(
                f"the engine of {engines.name} differs from its graph in {', '.join(wrong)}: run "
                "'packforcing build' again"
            )

    def scratch(self) -> list[int]:
        """Bytes of scratch memory on this GPU, per optimization profile."""
        count = self._engine.num_optimization_profiles
        return [self._engine.get_device_memory_size_for_profile_v2(i) for i in range(count)]

    def bind(self, arrays: Arrays) -> Callable[[], None]:
        """Fixes inputs and outputs to these arrays for good; returns the call that runs it."""
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
                    f"{self._engines.name} takes {tensor.name} at multiples of {ALIGNMENT} bytes "
                    "alone: with this size of video, use an onnxruntime backend"
                )
        device.synchronize()

        def call(keep_alive: Arrays = arrays) -> None:
            began = time.perf_counter()
            if not context.execute_async_v3(device.stream):
                raise self._engines.error("failed to run")
            device.synchronize()
            self.seconds += time.perf_counter() - began

        return call

    def _profile(self, arrays: Arrays) -> int:
        """The optimization profile for these shapes; profiles are for one shape each.

        Only inputs whose graph leaves an axis open differ between profiles.
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


def check_key(
    path: Path, key: Key, wanted: dict[str, dict[str, int]], version: str, device: CudaDevice
) -> None:
    """Raises `BackendError` unless an engine was built by this version of the library, for this
    device and for these shapes (per call, the sizes of N and C)."""
    build = f"packforcing build {path.parents[2]}"
    if key.tool.split()[-1] != version:
        raise BackendError(f"{path} was built by {key.tool}, installed is {version}: run '{build}'")
    if device.target not in key.targets:
        raise BackendError(
            f"{path} was built for {', '.join(key.targets)}; {device.name} is {device.target}: "
            f"run '{build} --targets {device.target}'"
        )
    if key.shapes != wanted:
        context = [f"{call['C']:,}" for call in (*key.shapes.values(), *wanted.values())]
        raise BackendError(
            f"{path} was built to read {context[0]} tokens of context, this policy reads "
            f"{context[-1]}: use the policy that the bundle was exported with"
        )


def _library(name: str) -> Any:
    """The library of a backend, imported."""
    try:
        return importlib.import_module(MODULES[name])
    except ModuleNotFoundError as error:
        raise BackendError(
            f"{name} is not installed: pip install '.[{name}]' in the checkout"
        ) from error
    except Exception as error:  # a broken install raises anything
        raise BackendError(
            f"{name} is installed but does not load ({error}): pip uninstall {name}, then pip "
            f"install '.[{name}]' in the checkout"
        ) from error


def _logger(trt: Any) -> Any:
    """Keeps the library's errors, for messages; it prints nothing."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.Logger.ERROR, trt.Logger.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()
