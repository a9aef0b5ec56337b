"""What runs the graphs: a device and, by name, something to bind to its arrays and call.

Everything above this file is the same for every backend. Those here are ONNX Runtime's; engines
are in `tensorrt.py`. On a GPU, the graphs that run once per prompt or start clip stay on the
host: their weights would take device memory for nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from packforcing.config import Config
from packforcing.errors import BackendError, BundleError
from packforcing.runtime.attention_mask import with_mask
from packforcing.runtime.buffers import Arrays
from packforcing.runtime.bundle import (
    DTYPES,
    GraphSpec,
    Manifest,
    check_files,
    contract,
    graph_file,
)
from packforcing.runtime.device import CudaDevice, HostDevice
from packforcing.runtime.engine_records import shapes
from packforcing.runtime.estimate import CARD
from packforcing.runtime.plan import memory

PROVIDERS = {
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
    "onnxruntime-rtx": "NvTensorRTRTXExecutionProvider",
}
ENGINES = ("tensorrt-rtx", "tensorrt")
BACKENDS = ("onnxruntime", *PROVIDERS, *ENGINES)
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

    def load(graph: str, provider: Provider | None = None) -> Graph:
        calls = list(shapes(config, graph).values()) if provider else []
        return Graph(directory / graph_file(graph), specs[graph], threads, provider, calls)

    if name in ENGINES:
        from packforcing.runtime.backends.tensorrt import Engines

        device: HostDevice
        engines = Engines(name, directory, config)
        device, close = engines.device, engines.close
    else:
        if name == "onnxruntime-rtx" and config.context_tokens != manifest.config.context_tokens:
            raise BackendError(  # others take a history as long as a video
                f"{name} fixes its shapes when it loads, and {directory} was exported for "
                f"{manifest.config.context_tokens:,} tokens of context; this policy reads "
                f"{config.context_tokens:,}: export a bundle with it (--policy)"
            )
        device, provider = _provider(name, directory, config)
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
    opened = Backend(device, {**on_host, **on_device}, close)
    if isinstance(device, CudaDevice):
        opened.identity = engines.identity if name in ENGINES else device.name
    return opened


class Graph:
    """A graph in ONNX Runtime: on the CPU, or on the device of a provider.

    calls: for a provider, the sizes of the axes that the graph leaves open, in each of its uses.
    model: on the CPU, what is loaded in place of the file; its weights are beside that.
    """

    def __init__(
        self,
        path: Path,
        spec: GraphSpec,
        threads: int | None,
        provider: Provider | None = None,
        calls: Sequence[Mapping[str, int]] = (),
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
        where: dict[str, Any] = {"providers": ["CPUExecutionProvider"]}
        options.add_session_config_entry(BESIDE, str(path.parent))
        source: Path | bytes = model or path
        if provider:
            # what the provider cannot run is an error, not something for the CPU
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            where = provider.place(options, spec, calls)
            source = provider.graph(path, spec)
        self._device, self._provider = "cuda" if provider else "cpu", provider
        try:
            self._session = ort.InferenceSession(source, options, enable_fallback=0, **where)
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


class Provider:
    """An ONNX Runtime provider for a GPU, working in the device's own order of things."""

    def __init__(self, name: str, device: CudaDevice) -> None:
        self.name = name
        stream = {"has_user_compute_stream": "1", "user_compute_stream": str(device.stream)}
        self.options = {"device_id": "0", **stream}

    def place(
        self, options: Any, spec: GraphSpec, calls: Sequence[Mapping[str, int]]
    ) -> dict[str, Any]:
        """Arguments of a session on this provider; the plugin goes into the session's options."""
        if self.name == PROVIDERS["onnxruntime-rtx"]:
            devices = [d for d in _onnxruntime().get_ep_devices() if d.ep_name == self.name]
            # scratch is taken once, not anew in every run
            fixed = {**self.options, **profile(spec, calls), "nv_persistent_context_memory": "1"}
            options.add_provider_for_devices(devices[:1], fixed)
            return {}
        chain = [(self.name, self.options)]
        if self.name == PROVIDERS["onnxruntime-tensorrt"]:
            # TensorRT's parser drops the length of attention's context without an error
            excluded = {**self.options, "trt_op_types_to_exclude": "Attention"}
            chain = [(self.name, excluded), (PROVIDERS["onnxruntime-cuda"], self.options)]
        return {"providers": chain}

    def graph(self, path: Path, spec: GraphSpec) -> Path | bytes:
        """What the session loads: the file, or the graph with a mask where the parser would drop
        the length."""
        told = any(tensor.name == "kv_len" for tensor in spec.inputs)
        if self.name != PROVIDERS["onnxruntime-rtx"] or not told:
            return path
        return with_mask(path)


def profile(spec: GraphSpec, calls: Sequence[Mapping[str, int]]) -> dict[str, str]:
    """The plugin's options for a graph with open axes: the least and largest of its uses."""

    def sizes(least: bool) -> str:
        choose = min if least else max
        return ",".join(
            f"{tensor.name}:"
            + "x".join(
                str(choose(call[n] for call in calls) if isinstance(n, str) else n)
                for n in tensor.shape
            )
            for tensor in spec.inputs
            if any(isinstance(n, str) for n in tensor.shape)
        )

    names = ("nv_profile_min_shapes", "nv_profile_opt_shapes", "nv_profile_max_shapes")
    return {name: sizes(least=name == names[0]) for name in names if sizes(least=True)}


def _provider(name: str, directory: Path, config: Config) -> tuple[HostDevice, Provider | None]:
    """The device of an ONNX Runtime backend, known to be there, and the provider for it."""
    ort = _onnxruntime()
    if name == "onnxruntime":
        return HostDevice(), None
    provider = PROVIDERS[name]
    if name == "onnxruntime-rtx":
        plugin = _rtx_plugin(config)
    elif provider not in ort.get_available_providers():
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
    if name == "onnxruntime-rtx":
        _register(ort, plugin, device)
    return device, Provider(provider, device)


def _rtx_plugin(config: Config) -> Any:
    if config.precision.compute == "fp32":
        raise BackendError(
            f"{config.name} computes in fp32, which TensorRT-RTX has no attention for; "
            "export it with --precision fp16"
        )
    try:
        import onnxruntime_ep_nv_tensorrt_rtx as plugin
    except ImportError as error:
        raise BackendError(
            f"ONNX Runtime's TensorRT-RTX plugin does not load ({error}): "
            "pip install onnxruntime-ep-nv-tensorrt-rtx"
        ) from error
    return plugin


def _register(ort: Any, plugin: Any, device: CudaDevice) -> None:
    """Makes the plugin's provider known to the library, once per process."""
    name = plugin.get_ep_name()
    if not any(found.ep_name == name for found in ort.get_ep_devices()):
        try:
            ort.register_execution_provider_library(name, plugin.get_library_path())
        except Exception as error:  # the library raises its own unrelated types
            raise BackendError(
                f"ONNX Runtime cannot use its TensorRT-RTX plugin: {error}; install the plugin's "
                "version that belongs to this onnxruntime"
            ) from error
    if not any(found.ep_name == name for found in ort.get_ep_devices()):
        raise BackendError(
            f"ONNX Runtime's TensorRT-RTX plugin does not take {device.name} ({device.target}): "
            "choose another backend"
        )


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
