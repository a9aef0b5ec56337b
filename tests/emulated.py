"""A GPU for machines without one: the calls of CUDA and TensorRT-RTX that the runtime makes.

`on_gpu(backend, Cuda())` puts a backend's graphs on an emulated GPU. `TensorRT(Cuda())` stands for
the module `tensorrt_rtx`, and loads the engines that `build_engines` writes. The runtime's own
device and engines work on them unchanged; graphs run in ONNX Runtime on the emulated memory.

The emulation is stricter than a GPU:
- Memory begins as NaN, so a missing upload, download or fill shows in the results.
- Copies wait until the stream is synchronized or a graph runs, so a host view that is overwritten
  too early shows as well.
- An integrated one may use pinned host memory in place, and calls cached files used.
- An access outside of an allocation fails, and so does a graph that is bound to host memory.
- `Cuda.log` has every allocation, load, copy, fill, binding and call, in order.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from weakref import WeakValueDictionary

import numpy as np

from packforcing.files import file_record
from packforcing.runtime.backends import Backend
from packforcing.runtime.backends.onnxruntime import OnnxGraph
from packforcing.runtime.bundle import GPU_GRAPHS, contract, graph_file, read_manifest
from packforcing.runtime.device import Array, CudaDevice, view
from packforcing.runtime.engine_records import (
    EngineRecord,
    Key,
    encode_record,
    engine_file,
    graph_files,
    record_file,
    shapes,
)
from packforcing.runtime.session import Session

STREAM = 7


class Status(Enum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2


class Kind(Enum):
    cudaMemcpyHostToDevice = ("device", "host")
    cudaMemcpyDeviceToHost = ("host", "device")
    cudaMemcpyDeviceToDevice = ("device", "device")


class Cuda:
    """CUDA's runtime library, on a GPU with `total` bytes of memory.

    An integrated one shares them with the host, whose cached files take `cached` bytes.
    """

    cudaError_t, cudaMemcpyKind = Status, Kind
    cudaStreamNonBlocking, cudaHostAllocDefault = 1, 0

    def __init__(self, total: int = 1 << 30, *, target=(8, 9), integrated=False, cached=0):
        self.total, self.integrated, self.cached = total, integrated, cached
        self.cudaDeviceAttr = SimpleNamespace(
            cudaDevAttrComputeCapabilityMajor=target[0],
            cudaDevAttrComputeCapabilityMinor=target[1],
            cudaDevAttrIntegrated=int(integrated),
        )
        self.memory: dict[str, dict[int, np.ndarray]] = {"device": {}, "host": {}}
        self.log: list[tuple] = []
        self._waiting: list = []

    def used(self, where):
        return sum(memory.nbytes for memory in self.memory[where].values())

    def place(self, where, address, size):
        """Return the memory at an address; fail where it is in no allocation."""
        shared = self.memory["host"] if self.integrated else {}
        for start, memory in (self.memory[where] | shared).items():
            if start <= address and address + size <= start + memory.nbytes:
                return memory[address - start : address - start + size]
        raise AssertionError(f"no {size} bytes of {where} memory at {address:#x}")

    def flush(self):
        for action in self._waiting:
            action()
        self._waiting.clear()

    def cudaMalloc(self, size):
        if self.used("device") + size > self.total:
            return Status.cudaErrorMemoryAllocation, None
        return self._allocate("device", size)

    def cudaHostAlloc(self, size, flags):
        return self._allocate("host", size)

    def _allocate(self, where, size):
        memory = np.full(size + 256, 0xFF, np.uint8)
        memory = memory[-memory.ctypes.data % 256 :][:size]  # aligned, as CUDA's is
        self.memory[where][memory.ctypes.data] = memory
        self.log.append(("allocate", where, memory.ctypes.data, size))
        return Status.cudaSuccess, memory.ctypes.data

    def cudaFree(self, address):
        del self.memory["device"][address]
        return (Status.cudaSuccess,)

    def cudaFreeHost(self, address):
        del self.memory["host"][address]
        return (Status.cudaSuccess,)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        return self.cudaMemcpy2DAsync(target, size, source, size, size, 1, kind, stream)

    def cudaMemcpy2DAsync(self, target, pitch, source, source_pitch, width, rows, kind, stream):
        assert stream == STREAM and width <= min(pitch, source_pitch)
        sides = [
            np.lib.stride_tricks.as_strided(
                self.place(where, address, (rows - 1) * step + width), (rows, width), (step, 1)
            )
            for where, address, step in zip(kind.value, (target, source), (pitch, source_pitch))
        ]
        self._waiting.append(lambda: np.copyto(*sides))
        self.log.append(("copy", source, target, width * rows))
        return (Status.cudaSuccess,)

    def cudaMemsetAsync(self, address, value, size, stream):
        assert stream == STREAM
        memory = self.place("device", address, size)
        self._waiting.append(lambda: memory.fill(value))
        self.log.append(("fill", address, size))
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream):
        assert stream == STREAM
        self.flush()
        return (Status.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags):
        return Status.cudaSuccess, STREAM

    def cudaStreamDestroy(self, stream):
        return (Status.cudaSuccess,)

    def cudaGetDeviceCount(self):
        return Status.cudaSuccess, 1

    def cudaSetDevice(self, number):
        return (Status.cudaSuccess,)

    def cudaMemGetInfo(self):
        used = self.used("device") + (self.used("host") if self.integrated else 0)
        return Status.cudaSuccess, self.total - used - self.cached, self.total

    def cudaDeviceGetAttribute(self, attribute, number):
        return Status.cudaSuccess, attribute

    def cudaGetDeviceProperties(self, number):
        return Status.cudaSuccess, SimpleNamespace(name=b"NVIDIA Nothing")

    def cudaGetErrorString(self, status):
        return Status.cudaSuccess, b"out of memory"


class OnDevice:
    """A graph that has to be bound to device memory, and runs after the copies before it."""

    def __init__(self, cuda: Cuda, name: str, graph):
        self.cuda, self.name, self.graph = cuda, name, graph

    @property
    def seconds(self):
        return self.graph.seconds

    def bind(self, arrays):
        for array in arrays.values():
            self.cuda.place("device", array.address, array.nbytes)
        addresses = tuple(array.address for array in arrays.values())
        self.cuda.log.append(("bind", self.name, addresses))
        bound = self.graph.bind(arrays)

        def call():
            self.cuda.flush()
            self.cuda.log.append(("call", self.name, addresses))
            for tensor in self.graph.spec.inputs:
                assert np.isfinite(view(arrays[tensor.name])).all(), f"{tensor.name} was not set"
            bound()

        return call


def cuda_device(cuda: Cuda, number: int = 0) -> CudaDevice:
    """Make the runtime's own device on this CUDA."""
    with mock.patch("packforcing.runtime.device._cuda_runtime", lambda extra: cuda):
        return CudaDevice(number=number)


def gpu_session(session: Session, cuda: Cuda | None = None) -> Session:
    """The same bundle's session on this CUDA."""
    return Session(session.manifest, on_gpu(session.backend, cuda or Cuda()))


def on_gpu(backend: Backend, cuda: Cuda) -> Backend:
    """Put a backend's graphs on this CUDA, except those that run on the host."""
    device = cuda_device(cuda)
    graphs = {
        name: OnDevice(cuda, name, graph) if name in GPU_GRAPHS else graph
        for name, graph in backend.graphs.items()
    }
    identity = backend.identity.replace("the CPU", device.name)
    return Backend(device, graphs, device.close, identity)


SCRATCH = 4096  # bytes that every emulated engine needs


def build_engines(
    bundle: Path, weights: int = 1000, scratch: int = SCRATCH, backend="tensorrt-rtx", **changes
) -> None:
    """Write engines with records, as a build does.

    `TensorRT` loads them: it runs the graph that they name in ONNX Runtime.

    Args:
        bundle: The bundle to add them to.
        weights: What the builder reports, in bytes.
        scratch: What the builder reports, in bytes.
        backend: Whose engines they are.
        changes: Parts of the engines' keys that differ from those of the bundle.
    """
    manifest = read_manifest(bundle)
    for graph in GPU_GRAPHS:
        calls = shapes(manifest.config, graph)
        path = engine_file(bundle, backend, graph)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(bundle / graph_file(graph)))
        key = {
            "graph": graph_files(manifest, graph),
            "tool": f"tensorrt-rtx {TensorRT.__version__}",
            "targets": ("sm86", "sm89"),
            "shapes": calls,
        }
        record = EngineRecord(
            key=Key(**{**key, **changes}), file=file_record(path), weights=weights,
            scratch=dict.fromkeys(calls, scratch), seconds=1, peak_memory=1, kernels=(),
        )  # fmt: skip
        record_file(bundle, backend, graph).write_bytes(encode_record(record))


class TensorRT:
    """The module `tensorrt_rtx`, as far as the runtime calls it."""

    __version__ = "1.7.1.116"

    class ILogger:
        pass

    class Logger:
        ERROR, INTERNAL_ERROR = "error", "internal error"

    class EngineValidity(Enum):
        VALID, SUBOPTIMAL, INVALID = range(3)

    class EngineInvalidityDiagnostics(IntEnum):
        VERSION_MISMATCH, UNSUPPORTED_CC, OLD_CUDA_DRIVER = 1, 2, 4

    class ExecutionContextAllocationStrategy(Enum):
        STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)

    class CudaGraphStrategy(Enum):
        DISABLED, WHOLE_GRAPH_CAPTURE = range(2)

    class DynamicShapesKernelSpecializationStrategy(Enum):
        LAZY, EAGER, NONE = range(3)

    def __init__(self, cuda: Cuda):
        self.cuda, self.validity, self.scratch = cuda, (self.EngineValidity.VALID, 0), SCRATCH
        self.loaded: WeakValueDictionary = WeakValueDictionary()  # engines by graph

    def Runtime(self, logger):
        return Runtime(self, logger)


class Runtime:
    engine_header_size = 64

    def __init__(self, trt, logger):
        self.trt, self.logger = trt, logger

    def get_engine_validity(self, header):
        assert len(header) <= self.engine_header_size
        return self.trt.validity

    def deserialize_cuda_engine(self, blob):
        path = Path(bytes(blob).decode())
        if not path.exists():
            self.logger.log("error", "not an engine")
            return None
        self.trt.cuda.log.append(("load", path.stem))
        self.trt.loaded[path.stem] = engine = ICudaEngine(self.trt, path)
        return engine


class ICudaEngine:
    streamable_weights_size, weight_streaming_budget_v2 = 1000, None

    def __init__(self, trt, path):
        self.trt = trt
        self.config = read_manifest(path.parent).config
        self.spec = contract(self.config)[path.stem]
        self.graph = OnnxGraph(path, self.spec, threads=1)
        self.tensors = {t.name: t for t in (*self.spec.inputs, *self.spec.outputs)}
        self.profiles = list(shapes(self.config, path.stem).values())
        self.num_io_tensors, self.num_optimization_profiles = len(self.tensors), len(self.profiles)
        self.device_memory_size_v2 = trt.scratch

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name):
        names = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64"}
        return SimpleNamespace(name=names[self.tensors[name].dtype])

    def get_tensor_profile_shape(self, name, profile):
        axes = self.profiles[profile]
        return 3 * [tuple(axes.get(n, n) for n in self.tensors[name].shape)]

    def get_device_memory_size_for_profile_v2(self, profile):
        return self.trt.scratch - profile

    def create_runtime_config(self):
        return IRuntimeConfig()

    def create_execution_context(self, config):
        assert config.strategy == self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        eager = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
        assert config.dynamic_shapes_kernel_specialization_strategy == eager
        config.cache.kernels.add(id(self.trt))
        return IExecutionContext(self)


class IRuntimeConfig:
    strategy = cache = cuda_graph_strategy = None
    dynamic_shapes_kernel_specialization_strategy = None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return IRuntimeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


class IRuntimeCache:
    def __init__(self):
        self.kernels = set()

    def deserialize(self, blob):
        self.kernels.add("read")
        return blob == b"compiled kernels"

    def serialize(self):
        return b"compiled kernels"


class IExecutionContext:
    def __init__(self, engine):
        self.engine, self.profile, self.bound = engine, None, None
        self.shapes, self.addresses, self.memory = {}, {}, (0, 0)

    def set_device_memory(self, address, size):
        assert size >= self.engine.device_memory_size_v2
        self.engine.trt.cuda.place("device", address, size)
        self.memory = address, size

    def set_optimization_profile_async(self, profile, stream):
        assert stream == STREAM
        self.profile = profile
        return profile < self.engine.num_optimization_profiles

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return tuple(shape) == self.engine.get_tensor_profile_shape(name, self.profile)[1]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return name in self.engine.tensors and address % 256 == 0

    def execute_async_v3(self, stream):
        assert stream == STREAM and self.memory[1]
        assert self.shapes.keys() == {tensor.name for tensor in self.engine.spec.inputs}
        if self.bound is None:
            arrays = {}
            for name, tensor in self.engine.tensors.items():
                shape = self.engine.get_tensor_profile_shape(name, self.profile)[1]
                array = Array(self.addresses[name], shape, np.dtype(tensor.dtype), None, None)
                self.engine.trt.cuda.place("device", array.address, array.nbytes)
                arrays[name] = array
            self.bound = self.engine.graph.bind(arrays)
        self.engine.trt.cuda.flush()
        self.bound()
        return True
