"""What runs the graphs: a device and, by name, something to bind to its arrays and call.

Everything above this file is the same for every backend. Those here are ONNX Runtime's; engines
are in `tensorrt.py`. On a GPU, the graphs that run once per prompt or start clip stay on the
host: their weights would take device memory for nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from packforcing.config import Config
from packforcing.errors import BackendError, BundleError
from packforcing.runtime.buffers import Arrays
from packforcing.runtime.bundle import (
    DTYPES,
    GPU_GRAPHS,
    GraphSpec,
    Manifest,
    check_files,
    contract,
    graph_file,
)
from packforcing.runtime.device import CudaDevice, HostDevice
from packforcing.runtime.plan import memory

CUDA_PROVIDER = "CUDAExecutionProvider"
ENGINES = ("tensorrt-rtx", "tensorrt")
BACKENDS = ("onnxruntime", "onnxruntime-cuda", *ENGINES)
TYPES = {  # as the library names them
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int8": "tensor(int8)",
    "int64": "tensor(int64)",
    DTYPES["fp8"]: "tensor(float8e4m3fn)",
}
FP8 = 17  # ONNX's number for fp8, which the library does not know by NumPy's type
# where the weights of a graph lie that is not loaded from a file
BESIDE = "session.model_external_initializers_file_folder_path"


class Bindable(Protocol):
    """A loaded graph or engine; `seconds` adds up the time spent inside it."""

    seconds: float

    def bind(self, arrays: Arrays) -> Callable[[], None]:
        """Fixes inputs and outputs to these arrays for good; returns the call that runs it."""


@dataclass
class Backend:
    """An opened backend. `close` comes after the last call of what was bound."""

    device: HostDevice
    graphs: dict[str, Bindable]
    close: Callable[[], None]
    identity: str = "the CPU"  # what decides about its results beside the bundle: card and engines


def open_backend(
    name: str, directory: Path, manifest: Manifest, config: Config, threads: int | None
) -> Backend:
    """Checks machine and bundle, cheap checks first, and loads its graphs.

    config: the manifest's, with the policy to run. threads: of each graph on the CPU, all cores
    by default. Raises `BackendError` and `BundleError`.
    """
    if name not in BACKENDS:
        raise BackendError(f"unknown backend '{name}'; known backends: {', '.join(BACKENDS)}")
    specs = contract(config)
    _onnxruntime()  # needed in any case, for what stays on the host

    def load(graph: str, device: CudaDevice | None = None) -> Graph:
        return Graph(directory / graph_file(graph), specs[graph], threads, device)

    if name in ENGINES:
        from packforcing.runtime.backends.tensorrt import Engines

        device: HostDevice
        engines = Engines(name, directory, config)
        device, close = engines.device, engines.close
    else:
        device = cuda_device(directory, config) if name == "onnxruntime-cuda" else HostDevice()
        close = device.close
    try:
        check_files(directory, manifest)
        on_device: Mapping[str, Bindable] = (
            engines.load(specs)
            if name in ENGINES
            else {
                graph: load(graph, device if isinstance(device, CudaDevice) else None)
                for graph in GPU_GRAPHS
            }
        )
        on_host = {graph: load(graph) for graph in specs if graph not in GPU_GRAPHS}
    except BaseException:
        close()
        raise
    where = "the CPU"
    if isinstance(device, CudaDevice):
        where = engines.identity if name in ENGINES else device.name
    identity = f"{name}, {threads or os.cpu_count()} threads, {where}"
    return Backend(device, {**on_host, **on_device}, close, identity)


class Graph:
    """A graph in ONNX Runtime: on the CPU, or on a GPU, in the order of the device's stream.

    model: what is loaded in place of the file; its weights are beside that.
    """

    def __init__(
        self,
        path: Path,
        spec: GraphSpec,
        threads: int | None,
        device: CudaDevice | None = None,
        model: bytes | None = None,
    ) -> None:
        ort = _onnxruntime()
        cores = os.cpu_count() or 1
        options = ort.SessionOptions()
        options.intra_op_num_threads = min(threads or cores, cores)
        options.log_severity_level = 3
        # graphs take turns: one must not spin on the cores that the next one needs
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # products with quantised weights in the activations' own precision, not rounded to int8
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        options.add_session_config_entry(BESIDE, str(path.parent))
        if device:
            # what the GPU cannot run is an error, not something for the CPU
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        self._device = "cuda" if device else "cpu"
        providers = [(CUDA_PROVIDER, cuda_options(device))] if device else ["CPUExecutionProvider"]
        try:
            self._session = ort.InferenceSession(
                model or path, options, enable_fallback=0, providers=providers
            )
        except Exception as error:  # the library raises its own unrelated types
            raise BackendError(f"ONNX Runtime cannot load {path}: {error}") from error
        self.spec, self.seconds = spec, 0.0
        loaded = (self._session.get_inputs(), self._session.get_outputs())
        for found, wanted in zip(loaded, (spec.inputs, spec.outputs)):
            have = [(tensor.name, tuple(tensor.shape), tensor.type) for tensor in found]
            want = [(tensor.name, tensor.shape, TYPES.get(tensor.dtype)) for tensor in wanted]
            if have != want:
                raise BundleError(f"{path} does not have the tensors its manifest lists")

    def bind(self, arrays: Arrays) -> Callable[[], None]:
        """Fixes inputs and outputs to these arrays for good; returns the call that runs it."""
        binding = self._session.io_binding()
        for tensors, bind in (
            (self.spec.inputs, binding.bind_input),
            (self.spec.outputs, binding.bind_output),
        ):
            for tensor in tensors:
                array = arrays[tensor.name]
                assert array.dtype == tensor.dtype, tensor.name
                kind = FP8 if tensor.dtype == DTYPES["fp8"] else array.dtype
                bind(tensor.name, self._device, 0, kind, array.shape, array.address)
        run = self._session.run_with_iobinding

        def call(keep_alive: Arrays = arrays) -> None:
            began = time.perf_counter()
            run(binding)  # comes back when the graph is done
            self.seconds += time.perf_counter() - began

        return call


def cuda_options(device: CudaDevice) -> dict[str, str]:
    """Options of ONNX Runtime's CUDA provider: it works in the device's own stream."""
    return {
        "device_id": "0",
        "has_user_compute_stream": "1",
        "user_compute_stream": str(device.stream),
    }


def cuda_device(directory: Path, config: Config) -> CudaDevice:
    """The GPU for ONNX Runtime's CUDA provider, with room for weights and buffers."""
    if CUDA_PROVIDER not in _onnxruntime().get_available_providers():
        raise BackendError(
            f"this ONNX Runtime has no {CUDA_PROVIDER}: pip uninstall onnxruntime, then pip "
            "install onnxruntime-gpu (both are one module: install exactly one)"
        )
    device = CudaDevice()
    weights = sum(
        file.stat().st_size
        for graph in GPU_GRAPHS
        for file in directory.glob(f"{graph_file(graph)}*")
    )
    buffers = memory(config)
    device.require(
        weights + sum(buffers.values()) - buffers["archive_per_block"],
        f"{config.name} with onnxruntime-cuda",
    )
    return device


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise BackendError(
            "ONNX Runtime is not installed: pip install onnxruntime "
            "(or onnxruntime-gpu; install exactly one of the two)"
        ) from error
    except ImportError as error:
        raise BackendError(f"ONNX Runtime is installed but does not load: {error}") from error
    return onnxruntime
