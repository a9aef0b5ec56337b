"""Run graphs in ONNX Runtime: on the CPU, or on a GPU with its CUDA provider."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from packforcing.config import Config
from packforcing.errors import BackendError, BundleError, MissingDependency
from packforcing.extras import install_command
from packforcing.machine import cpu_cores
from packforcing.runtime.allocations import memory_by_purpose
from packforcing.runtime.buffers import Arrays
from packforcing.runtime.bundle import DTYPES, GPU_GRAPHS, GraphSpec, graph_file
from packforcing.runtime.device import CudaDevice

CUDA_PROVIDER = "CUDAExecutionProvider"
TYPES = {  # the library's names of the contract's dtypes
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int8": "tensor(int8)",
    "int64": "tensor(int64)",
    DTYPES["fp8"]: "tensor(float8e4m3fn)",
}
FP8 = 17  # ONNX's number for fp8: the library does not know NumPy's dtype of it
# the folder of a graph's weights, for a graph that is not loaded from a file
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class OnnxGraph:
    """A graph in ONNX Runtime; `seconds` adds up the time spent in its calls.

    Args:
        path: The ONNX file. Weights may lie in files beside it.
        spec: The inputs and outputs that the graph must have.
        threads: CPU threads; None: one for each core of this process.
        device: A GPU, on whose stream the graph runs; None: the CPU.
        model: An ONNX model to load in place of the file.

    Raises:
        BackendError: The library cannot load the graph.
        BundleError: The graph has other inputs or outputs.
        MissingDependency: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        path: Path,
        spec: GraphSpec,
        threads: int | None,
        device: CudaDevice | None = None,
        model: bytes | None = None,
    ) -> None:
        library = import_onnxruntime()
        cores = cpu_cores()
        options = library.SessionOptions()
        options.intra_op_num_threads = threads or cores
        if threads and threads > cores:  # a thread that spins keeps the core from the others
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        # graphs take turns: one must not spin on the cores that the next one needs
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # multiply quantized weights in the activations' own dtype, not rounded to int8
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if model:
            options.add_session_config_entry(WEIGHTS_FOLDER, str(path.parent))
        if device:
            # an operator without a GPU kernel is an error, not work for the CPU
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        providers = [(CUDA_PROVIDER, cuda_options(device))] if device else ["CPUExecutionProvider"]
        self._place = ("cuda", device.number) if device else ("cpu", 0)
        try:
            self._session = library.InferenceSession(
                model or path, options, enable_fallback=0, providers=providers
            )
        except Exception as error:  # the library raises its own unrelated types
            raise BackendError(f"ONNX Runtime cannot load {path}: {error}") from error
        self.spec, self.seconds = spec, 0.0
        loaded = (self._session.get_inputs(), self._session.get_outputs())
        for tensors, expected in zip(loaded, (spec.inputs, spec.outputs)):
            if [(tensor.name, tuple(tensor.shape), tensor.type) for tensor in tensors] != [
                (tensor.name, tensor.shape, TYPES.get(tensor.dtype)) for tensor in expected
            ]:
                raise BundleError(f"{path} does not have the tensors its manifest lists")

    def bind(self, arrays: Arrays) -> Callable[[], None]:
        """Fix inputs and outputs to arrays for good; return the call that runs the graph."""
        binding = self._session.io_binding()
        for tensors, bind in (
            (self.spec.inputs, binding.bind_input),
            (self.spec.outputs, binding.bind_output),
        ):
            for tensor in tensors:
                array = arrays[tensor.name]
                assert array.dtype == tensor.dtype, tensor.name
                dtype = FP8 if tensor.dtype == DTYPES["fp8"] else array.dtype
                bind(tensor.name, *self._place, dtype, array.shape, array.address)
        run_bound = self._session.run_with_iobinding

        def call(keep_alive: Arrays = arrays) -> None:
            start = time.perf_counter()
            run_bound(binding)  # returns when the graph is done
            self.seconds += time.perf_counter() - start

        return call


def cuda_options(device: CudaDevice) -> dict[str, str]:
    """Options of the CUDA provider: it runs in the device's own stream."""
    return {
        "device_id": str(device.number),
        "has_user_compute_stream": "1",
        "user_compute_stream": str(device.stream),
    }


def open_cuda_device(directory: Path, config: Config, number: int = 0) -> CudaDevice:
    """Open the GPU for the CUDA provider.

    Args:
        directory: The bundle.
        config: The bundle's config, with the policy to run.
        number: The GPU, among the visible ones.

    Raises:
        BackendError: The installed ONNX Runtime has no CUDA provider, there is no GPU, or it has
            too little free memory for weights and buffers.
        MissingDependency: A package is not installed.
    """
    if CUDA_PROVIDER not in import_onnxruntime().get_available_providers():
        raise BackendError(
            f"this ONNX Runtime has no {CUDA_PROVIDER}: pip uninstall onnxruntime, then "
            f"{install_command('gpu')} (onnxruntime and onnxruntime-gpu are one module)"
        )
    device = CudaDevice("gpu", number)
    weights = sum(
        file.stat().st_size
        for graph in GPU_GRAPHS
        for file in directory.glob(f"{graph_file(graph)}*")
    )
    buffers = memory_by_purpose(config)
    device.require(
        weights + sum(buffers.values()) - buffers["archive_per_block"],
        f"{config.name} with onnxruntime-cuda",
    )
    return device


def import_onnxruntime() -> Any:
    """Import ONNX Runtime, which then reports nothing.

    The environment variable that `packforcing` sets turns off the uploader of Linux and macOS, but
    not the trace events of Windows, nor what a program began that imported ONNX Runtime first.

    Raises:
        BackendError: It is installed but does not load.
        MissingDependency: It is not installed.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"running a bundle needs onnxruntime, which is not installed: {install_command('cpu')}"
            f", or for the backend onnxruntime-cuda {install_command('gpu')}; install one of the "
            "two, they are one module"
        ) from error
    except ImportError as error:
        raise BackendError(f"ONNX Runtime is installed but does not load: {error}") from error
    onnxruntime.disable_telemetry_events()
    return onnxruntime
