"""What runs the graphs: a device and, by name, something to bind to its arrays and call.

Everything above this file is the same for every backend. Those here are ONNX Runtime's; engines
are in `packforcing.runtime.tensorrt`. On a GPU, the graphs that run once per prompt or start clip
stay on the host: their weights would take device memory for nothing.
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
from packforcing.runtime.bundle import GraphSpec, Manifest, check_files, contract, graph_file
from packforcing.runtime.device import CudaDevice, HostDevice
from packforcing.runtime.estimate import CARD
from packforcing.runtime.plan import memory

PROVIDERS = {
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}
ENGINES = ("tensorrt-rtx", "tensorrt")
BACKENDS = ("onnxruntime", *PROVIDERS, *ENGINES)
TYPES = {  # as the library names them
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int8": "tensor(int8)",
    "int64": "tensor(int64)",
}


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


def open_backend(
    name: str, directory: Path, manifest: Manifest, config: Config, threads: int | None
) -> Backend:
    """Checks machine and bundle, cheap checks first, and loads its graphs.

    config: the manifest's, with the policy to run. threads: of each graph on the CPU, all cores
    by default. Raises `BackendError` and `BundleError`.
    """
    if name == "onnxruntime-rtx":
        raise BackendError(
            "onnxruntime-rtx would read context that was never written: the plugin drops the "
            "length that attention is given, without an error; use tensorrt-rtx"
        )
    if name not in BACKENDS:
        raise BackendError(f"unknown backend '{name}'; known backends: {', '.join(BACKENDS)}")
    specs = contract(config)
    _onnxruntime()  # needed in any case, for what stays on the host

    def load(graph: str, provider: Provider | None = None) -> Graph:
        return Graph(directory / graph_file(graph), specs[graph], threads, provider)

    if name in ENGINES:
        from packforcing.runtime.tensorrt import Engines

        device: HostDevice
        engines = Engines(name, directory, config)
        device, close = engines.device, engines.close
    else:
        device, provider = _provider(name, directory, manifest.config)
        close = device.close
    try:
        check_files(directory, manifest)
        on_device: Mapping[str, Bindable] = (
            engines.load(specs)
            if name in ENGINES
            else {graph: load(graph, provider) for graph in CARD}
        )
        on_host = {graph: load(graph) for graph in specs if graph not in CARD}
    except BaseException:
        close()
        raise
    return Backend(device, {**on_host, **on_device}, close)


class Graph:
    """A graph in ONNX Runtime: on the CPU, or on the device of a provider."""

    def __init__(
        self, path: Path, spec: GraphSpec, threads: int | None, provider: Provider | None = None
    ) -> None:
        ort = _onnxruntime()
        cores = os.cpu_count() or 1
        options = ort.SessionOptions()
        options.intra_op_num_threads = min(threads or cores, cores)
        options.log_severity_level = 3
        # graphs take turns: one must not spin on the cores that the next one needs
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers: list[Any] = ["CPUExecutionProvider"]
        if provider:
            # what the provider cannot run is an error, not something for the CPU
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            providers = provider.chain()
        self._device, self._provider = "cuda" if provider else "cpu", provider
        try:
            self._session = ort.InferenceSession(path, options, providers, enable_fallback=0)
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
                bind(tensor.name, self._device, 0, array.dtype, array.shape, array.address)
        run = self._session.run_with_iobinding

        def call(keep_alive: Arrays = arrays) -> None:
            began = time.perf_counter()
            run(binding)  # comes back when the graph is done
            self.seconds += time.perf_counter() - began

        return call


class Provider:
    """An ONNX Runtime provider for a GPU, working in the device's own order of things."""

    def __init__(self, name: str, device: CudaDevice) -> None:
        self.name = name
        self.options = {"device_id": "0", "user_compute_stream": str(device.stream)}

    def chain(self) -> list[tuple[str, dict[str, str]]]:
        """This provider and what it hands over to, with their options."""
        chain = [(self.name, self.options)]
        if self.name == PROVIDERS["onnxruntime-tensorrt"]:
            # TensorRT's parser drops the length of attention's context without an error
            excluded = {**self.options, "trt_op_types_to_exclude": "Attention"}
            chain = [(self.name, excluded), (PROVIDERS["onnxruntime-cuda"], self.options)]
        return chain


def _provider(name: str, directory: Path, config: Config) -> tuple[HostDevice, Provider | None]:
    """The device of an ONNX Runtime backend, known to be there, and the provider for it."""
    ort = _onnxruntime()
    if name == "onnxruntime":
        return HostDevice(), None
    provider = PROVIDERS[name]
    if provider not in ort.get_available_providers():
        raise BackendError(
            f"this ONNX Runtime has no {provider}: pip uninstall onnxruntime, then pip install "
            "onnxruntime-gpu (both are one module: install exactly one)"
        )
    device = CudaDevice()
    weights = sum(
        file.stat().st_size for graph in CARD for file in directory.glob(f"{graph_file(graph)}*")
    )
    buffers = memory(config)
    device.require(
        weights + sum(buffers.values()) - buffers["archive_per_block"], f"{config.name} with {name}"
    )
    return device, Provider(provider, device)


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
