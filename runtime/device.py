"""Memory that graphs are bound to: the host's, or a GPU's with a view of it on the host.

Every array is allocated once and never moves. Host code reads and writes `Array.host` and nothing
else; `upload` and `download` copy between that view and the device. On the host, and on a GPU that
shares its memory, both are the same, so nothing is copied. Graphs, copies and fills of a device run
in the order of the calls.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from packforcing.errors import BackendError
from packforcing.extras import optional_imports
from packforcing.machine import free_memory, total_memory
from packforcing.runtime import dlpack
from packforcing.runtime.nvml import driver, gpus
from packforcing.units import format_gib


@dataclass(frozen=True, eq=False)
class Array:
    """A C-contiguous array, or a part of one, at a fixed address of a device's memory.

    The memory lives as long as an array that refers to it.

    Attributes:
        address: Where it begins in the device's memory.
        shape: Its shape.
        dtype: Its dtype.
        host_view: The host's view of it; None where host code never reads or writes it.
        owner: Keeps the allocation alive.
        device: DLPack's type and number of the device.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype
    host_view: np.ndarray | None
    owner: object = field(repr=False)
    device: tuple[int, int] = (dlpack.CPU, 0)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int | None = None, **_: object) -> object:
        """Lend the memory; it is ready, whatever stream the consumer works in."""
        return dlpack.capsule(self.address, self.shape, self.dtype, self.device, self.owner)

    @property
    def host(self) -> np.ndarray:
        """The host's view, of an array that was allocated with one."""
        assert self.host_view is not None, "this array stays on the device"
        return self.host_view

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def reshape(self, *shape: int) -> Array:
        """Return the same memory under another shape of the same size."""
        assert math.prod(shape) == math.prod(self.shape), (shape, self.shape)
        host_view = None if self.host_view is None else self.host_view.reshape(shape)
        return replace(self, shape=shape, host_view=host_view)

    def __getitem__(self, index: int | tuple[int, ...]) -> Array:
        """Return the part at leading indices: of [L, 2, ...], `array[layer, 1]` is [...]."""
        index = index if isinstance(index, tuple) else (index,)
        shape = self.shape[len(index) :]
        part_bytes = math.prod(shape) * self.dtype.itemsize
        position = int(np.ravel_multi_index(index, self.shape[: len(index)]))
        host_view = None if self.host_view is None else self.host_view[index]
        address = self.address + position * part_bytes
        return replace(self, address=address, shape=shape, host_view=host_view)

    def rows(self, first: int, stop: int) -> Array:
        """Return the part from one leading index to another: `array[first:stop]`."""
        row_bytes = self.nbytes // self.shape[0]
        return replace(
            self,
            address=self.address + first * row_bytes,
            shape=(stop - first, *self.shape[1:]),
            host_view=None if self.host_view is None else self.host_view[first:stop],
        )

    def on_host(self) -> Array:
        """Return the host's view as an array, for graphs that run on the host."""
        return replace(self, address=self.host.ctypes.data, device=(dlpack.CPU, 0))


class HostDevice:
    """The host's memory.

    Attributes:
        allocated: Bytes in use, by purpose.
    """

    def __init__(self) -> None:
        self.allocated: Counter[str] = Counter()

    @property
    def host(self) -> HostDevice:
        """The device for memory that only the host needs."""
        return self

    def use(self) -> None:
        """Make it the device of the calling thread."""

    def free_memory(self) -> tuple[int, int]:
        """Return the bytes of device memory that are free now, and all."""
        return free_memory(), total_memory()

    def require(self, needed_bytes: int, what: str) -> None:
        """Check that so much device memory is free.

        Args:
            needed_bytes: Bytes that will be allocated.
            what: The subject of the message, like "the demo model".

        Raises:
            BackendError: Less is free. The host's memory is checked with the request instead.
        """

    def allocate(
        self, purpose: str, shape: tuple[int, ...], dtype: Any, *, host: bool = False
    ) -> Array:
        """Allocate an array; its content is undefined.

        Args:
            purpose: What `allocated` counts it under.
            shape: Its shape.
            dtype: Its dtype, as NumPy knows it.
            host: Whether host code reads or writes it, so that it needs a view there.

        Raises:
            BackendError: The GPU has too little free memory.
        """
        memory = np.empty(shape, dtype)
        self._count(purpose, memory.nbytes, memory)
        return Array(memory.ctypes.data, shape, memory.dtype, memory if host else None, memory)

    def upload(self, *arrays: Array) -> None:
        """Copy the host's view of arrays to the device; it may be overwritten right after."""

    def download(self, *arrays: Array) -> None:
        """Copy arrays from the device to the host's view of them."""

    def zero(self, array: Array) -> None:
        """Fill an array with zeros on the device."""
        view(array)[...] = 0

    def read(self, array: Array) -> np.ndarray:
        """Return a copy of an array, which need not have a host view."""
        return view(array).copy()

    def write(self, array: Array, values: np.ndarray) -> None:
        """Overwrite an array, which need not have a host view."""
        view(array)[...] = values

    def copy_tokens(self, source: Array, target: Array, first: int) -> None:
        """Copy tokens on the device: target[..., first : first + n, :] = source.

        Args:
            source: [..., n, d].
            target: [..., tokens, d].
            first: The first token of the target that is overwritten.
        """
        view(target)[..., first : first + source.shape[-2], :] = view(source)

    def synchronize(self) -> None:
        """Wait until all work of the device is done."""

    def close(self) -> None:
        """Release what is not memory; memory is freed with the last array that refers to it."""

    def _count(self, purpose: str, size: int, owner: object) -> None:
        self.allocated[purpose] += size
        weakref.finalize(owner, self.allocated.subtract, {purpose: size})


class CudaDevice(HostDevice):
    """A visible NVIDIA GPU, with one stream; host views are pinned memory.

    An integrated GPU, as of Jetson and DGX Spark, has the host's memory. It reads and writes host
    views in place, uncached: they are small, and each is read once or a few times per call.

    Args:
        extra: The extra that installs CUDA's bindings for the backend in use.
        number: The GPU's, among the visible ones.

    Attributes:
        number: The GPU's.
        name: The GPU's name.
        integrated: Whether it has the host's memory.
        target: Its compute capability, as engines name it: sm89 is 8.9.
        stream: The stream's handle.

    Raises:
        BackendError: There is no GPU, no driver, or a driver too old for this CUDA.
        MissingDependency: CUDA's bindings are not installed.
    """

    def __init__(self, extra: str = "tensorrt-rtx", number: int = 0) -> None:
        super().__init__()
        self._cuda = cuda = _cuda_runtime(extra)
        count = self._call("cudaGetDeviceCount")
        if not 0 <= number < count:
            raise BackendError(f"there is no GPU {number}: the visible ones are 0 to {count - 1}")
        self._host, self.number = HostDevice(), number
        major, minor, integrated = (
            self._call("cudaDeviceGetAttribute", getattr(cuda.cudaDeviceAttr, name), number)
            for name in (
                "cudaDevAttrComputeCapabilityMajor",
                "cudaDevAttrComputeCapabilityMinor",
                "cudaDevAttrIntegrated",
            )
        )
        self.target, self.integrated = f"sm{major}{minor}", bool(integrated)
        self.name = self._call("cudaGetDeviceProperties", number).name.decode()
        self.use()
        self.stream = int(self._call("cudaStreamCreateWithFlags", cuda.cudaStreamNonBlocking))
        self._end = weakref.finalize(self, cuda.cudaStreamDestroy, self.stream)
        self._end.atexit = False

    @property
    def host(self) -> HostDevice:
        return self._host

    def use(self) -> None:
        self._call("cudaSetDevice", self.number)

    def free_memory(self) -> tuple[int, int]:
        free_bytes, total_bytes = self._call("cudaMemGetInfo")
        if self.integrated:  # CUDA counts cached files as used, which the system drops
            return free_memory(), min(total_bytes, total_memory())
        return free_bytes, total_bytes

    def require(self, needed_bytes: int, what: str) -> None:
        free_bytes, total_bytes = self.free_memory()
        if needed_bytes > free_bytes:
            shared = ", which it shares with the system" if self.integrated else ""
            raise BackendError(
                f"{what} needs {format_gib(needed_bytes)} GiB of GPU memory; {self.name} has "
                f"{format_gib(free_bytes)} of {format_gib(total_bytes)} GiB free{shared}: close "
                "other programs that use it, or find a bundle that fits with 'packforcing plan "
                "--budget'"
            )

    def allocate(
        self, purpose: str, shape: tuple[int, ...], dtype: Any, *, host: bool = False
    ) -> Array:
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        self.require(size, f"allocating '{purpose}'")
        place = (dlpack.CUDA, self.number)
        if host and self.integrated:
            shared = self._pinned(purpose, shape, dtype, self)
            return Array(shared.ctypes.data, shape, dtype, shared, shared, place)
        address = int(self._call("cudaMalloc", size))
        owner = _Allocation()
        weakref.finalize(owner, self._cuda.cudaFree, address).atexit = False
        self._count(purpose, size, owner)
        host_view = self._pinned(purpose, shape, dtype, self._host) if host else None
        return Array(address, shape, dtype, host_view, owner, place)

    def _pinned(
        self, purpose: str, shape: tuple[int, ...], dtype: np.dtype, device: HostDevice
    ) -> np.ndarray:
        """Allocate pinned host memory, which CUDA gives one address on the host and on the GPU.

        Copies to and from it run at full speed. It counts as memory of `device`.
        """
        size = math.prod(shape) * dtype.itemsize
        address = int(self._call("cudaHostAlloc", size, self._cuda.cudaHostAllocDefault))
        memory = (ctypes.c_byte * size).from_address(address)
        weakref.finalize(memory, self._cuda.cudaFreeHost, address).atexit = False
        device._count(purpose, size, memory)
        return np.ndarray(shape, dtype, memoryview(memory))

    def upload(self, *arrays: Array) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        for array in arrays:
            there, here = array.address, array.on_host().address
            if there != here:
                self._call("cudaMemcpyAsync", there, here, array.nbytes, kind, self.stream)
        self.synchronize()

    def download(self, *arrays: Array) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        for array in arrays:
            there, here = array.address, array.on_host().address
            if there != here:
                self._call("cudaMemcpyAsync", here, there, array.nbytes, kind, self.stream)
        self.synchronize()

    def read(self, array: Array) -> np.ndarray:
        staged = self._with_host_view(array)
        self.download(staged)
        return staged.host.copy()

    def write(self, array: Array, values: np.ndarray) -> None:
        staged = self._with_host_view(array)
        staged.host[...] = values
        self.upload(staged)

    def _with_host_view(self, array: Array) -> Array:
        """Return the array with a host view that lives as long as this copy of it."""
        view = self._pinned("copies", array.shape, array.dtype, self._host)
        return replace(array, host_view=view)

    def zero(self, array: Array) -> None:
        self._call("cudaMemsetAsync", array.address, 0, array.nbytes, self.stream)
        self._finish_in_place()

    def copy_tokens(self, source: Array, target: Array, first: int) -> None:
        token = source.shape[-1] * source.dtype.itemsize
        row, pitch = source.shape[-2] * token, target.shape[-2] * token
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call(
            "cudaMemcpy2DAsync", target.address + first * token, pitch, source.address, row,
            row, math.prod(source.shape[:-2]), kind, self.stream,
        )  # fmt: skip
        self._finish_in_place()

    def _finish_in_place(self) -> None:
        """Wait where host code might overwrite in place what the GPU has not read yet."""
        if self.integrated:
            self.synchronize()

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        self._end()

    def _call(self, name: str, *args: Any) -> Any:
        """Return a CUDA call's result; its failure is a `BackendError` with the call's name."""
        status, *result = getattr(self._cuda, name)(*args)
        if status != self._cuda.cudaError_t.cudaSuccess:
            text = self._cuda.cudaGetErrorString(status)[1].decode()
            raise BackendError(
                f"the GPU failed in {name}: {text} ({status.name}); if it happens again, restart "
                "the program, then the machine"
            )
        return result[0] if len(result) == 1 else tuple(result)


class _Allocation:
    """Stands for an allocation on the GPU, which is freed with it."""


def view(array: Array) -> np.ndarray:
    """Return device memory that lies on the host as a NumPy array, which keeps it alive."""
    memory = (ctypes.c_byte * array.nbytes).from_address(array.address)
    memory.owner = array.owner  # type: ignore[attr-defined]
    return np.ndarray(array.shape, array.dtype, memoryview(memory))


class VisibleGpu(NamedTuple):
    """A GPU that this process may use."""

    name: str
    target: str  # compute capability, as engines name it: sm89 is 8.9
    memory: int  # bytes


def list_gpus(extra: str) -> list[VisibleGpu]:
    """List the visible GPUs in CUDA's order, at least one. Nothing is allocated on them.

    Args:
        extra: The extra that installs CUDA's bindings for the backend in use.

    Raises:
        BackendError: There is no usable GPU.
        MissingDependency: CUDA's bindings are not installed.
    """
    cuda = _cuda_runtime(extra)
    visible = []
    for number in range(cuda.cudaGetDeviceCount()[1]):
        properties = cuda.cudaGetDeviceProperties(number)[1]
        name, target = properties.name, f"sm{properties.major}{properties.minor}"
        visible.append(VisibleGpu(name.decode(), target, properties.totalGlobalMem))
    return visible


def _cuda_runtime(extra: str) -> Any:
    """Import CUDA's runtime library and check that there is a driver and a GPU."""
    with optional_imports("using a GPU", extra):
        from cuda.bindings import runtime as cuda
    status, count = cuda.cudaGetDeviceCount()
    if status == cuda.cudaError_t.cudaSuccess and count:
        return cuda
    installed = driver()  # raises where there is none
    needed = cuda.cudaRuntimeGetVersion()[1]
    if status == cuda.cudaError_t.cudaErrorInsufficientDriver:
        raise BackendError(
            f"NVIDIA driver {installed.version} runs CUDA {'.'.join(map(str, installed.cuda))}, "
            f"this needs {needed // 1000}.0 or newer: update the driver, on a Jetson with JetPack"
        )
    gpus()  # raises where there is none
    raise BackendError(
        f"CUDA finds no usable GPU ({cuda.cudaGetErrorString(status)[1].decode()}): check that "
        "CUDA_VISIBLE_DEVICES does not hide it"
    )
