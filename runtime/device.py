"""Memory that graphs are bound to: the host's own, or a GPU's with a view of it on the host.

Every array is allocated once and never moves. Host code reads and writes `Array.host` and nothing
else; `upload` and `download` say where data crosses to the device and back. On the host both
memories are one, so they do nothing. All work of a device runs in one order: graphs, copies and
fills follow each other as they were called.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from packforcing.errors import BackendError
from packforcing.runtime.nvml import driver, gpus
from packforcing.units import format_gib


@dataclass(frozen=True, eq=False)
class Array:
    """Fixed device memory of one C-contiguous array, or of a part of one.

    The memory lives as long as an array that refers to it.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype
    seen: np.ndarray | None  # the host's view, if it has one
    owner: object = field(repr=False)

    @property
    def host(self) -> np.ndarray:
        """What host code reads and writes, of arrays that were allocated for that."""
        assert self.seen is not None, "this array stays on the device"
        return self.seen

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def reshape(self, *shape: int) -> Array:
        """The same memory under another shape of the same size."""
        assert math.prod(shape) == math.prod(self.shape), (shape, self.shape)
        seen = None if self.seen is None else self.seen.reshape(shape)
        return replace(self, shape=shape, seen=seen)

    def __getitem__(self, index: int | tuple[int, ...]) -> Array:
        """The part at leading indices: of [L, 2, ...], `array[layer, 1]` is [...]."""
        index = index if isinstance(index, tuple) else (index,)
        shape = self.shape[len(index) :]
        step = math.prod(shape) * self.dtype.itemsize
        position = int(np.ravel_multi_index(index, self.shape[: len(index)]))
        seen = None if self.seen is None else self.seen[index]
        return replace(self, address=self.address + position * step, shape=shape, seen=seen)

    def on_host(self) -> Array:
        """The host's view as an array of its own: what graphs that run on the host are bound to."""
        return replace(self, address=self.host.ctypes.data)


class HostDevice:
    """The host's memory. `allocated` counts live bytes by purpose."""

    def __init__(self) -> None:
        self.allocated: Counter[str] = Counter()

    @property
    def host(self) -> HostDevice:
        """Where memory that no device needs is allocated."""
        return self

    def allocate(
        self, purpose: str, shape: tuple[int, ...], dtype: Any, *, host: bool = False
    ) -> Array:
        """Memory with whatever is in it; `host`: host code reads or writes it too."""
        memory = np.empty(shape, dtype)
        self._count(purpose, memory.nbytes, memory)
        return Array(memory.ctypes.data, shape, memory.dtype, memory if host else None, memory)

    def upload(self, *arrays: Array) -> None:
        """Brings the host's view of arrays to the device; the view may be written right after."""

    def download(self, *arrays: Array) -> None:
        """Brings arrays from the device to the host's view."""

    def zero(self, array: Array) -> None:
        """Fills an array with zeros on the device."""
        view(array)[...] = 0

    def read(self, array: Array) -> np.ndarray:
        """A copy on the host of an array that need not have a view there."""
        return view(array).copy()

    def write(self, array: Array, values: np.ndarray) -> None:
        """Overwrites an array that need not have a view on the host."""
        view(array)[...] = values

    def copy_tokens(self, source: Array, target: Array, first: int) -> None:
        """target[..., first : first + n, :] = source, on the device; source is [..., n, d]."""
        view(target)[..., first : first + source.shape[-2], :] = view(source)

    def synchronize(self) -> None:
        """Waits until everything that was begun is done."""

    def close(self) -> None:
        """Gives back what is not memory; memory goes with the last array that refers to it."""

    def _count(self, purpose: str, size: int, owner: object) -> None:
        self.allocated[purpose] += size
        weakref.finalize(owner, self.allocated.subtract, {purpose: size})


class CudaDevice(HostDevice):
    """The first visible NVIDIA GPU, one stream; host views are page-locked.

    Raises `BackendError` where there is no GPU, no driver or one too old for this CUDA.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cuda = cuda = _cuda_runtime()
        self._host = HostDevice()
        major, minor = (
            self._call("cudaDeviceGetAttribute", getattr(cuda.cudaDeviceAttr, name), 0)
            for name in ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor")
        )
        self.target = f"sm{major}{minor}"
        self.name = self._call("cudaGetDeviceProperties", 0).name.decode()
        self._call("cudaSetDevice", 0)
        self.stream = int(self._call("cudaStreamCreateWithFlags", cuda.cudaStreamNonBlocking))
        self._end = weakref.finalize(self, cuda.cudaStreamDestroy, self.stream)
        self._end.atexit = False

    @property
    def host(self) -> HostDevice:
        return self._host

    def free_memory(self) -> tuple[int, int]:
        """Bytes of device memory that are free now, and in all."""
        free, total = self._call("cudaMemGetInfo")
        return free, total

    def require(self, size: int, what: str) -> None:
        """Raises `BackendError` unless so many bytes are free."""
        free, total = self.free_memory()
        if size > free:
            raise BackendError(
                f"{what} needs {format_gib(size)} GiB of GPU memory; {self.name} has "
                f"{format_gib(free)} of {format_gib(total)} GiB free: close other "
                "programs that use it, or look with 'packforcing plan --budget' for a bundle that "
                "fits"
            )

    def allocate(
        self, purpose: str, shape: tuple[int, ...], dtype: Any, *, host: bool = False
    ) -> Array:
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        self.require(size, f"allocating '{purpose}'")
        address = int(self._call("cudaMalloc", size))
        owner = _Memory()
        weakref.finalize(owner, self._cuda.cudaFree, address).atexit = False
        self._count(purpose, size, owner)
        seen = self._locked(purpose, shape, dtype) if host else None
        return Array(address, shape, dtype, seen, owner)

    def _locked(self, purpose: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Page-locked host memory: copies to and from it run at full speed."""
        size = math.prod(shape) * dtype.itemsize
        address = int(self._call("cudaHostAlloc", size, self._cuda.cudaHostAllocDefault))
        memory = (ctypes.c_byte * size).from_address(address)
        weakref.finalize(memory, self._cuda.cudaFreeHost, address).atexit = False
        self._host._count(purpose, size, memory)
        return np.ndarray(shape, dtype, memoryview(memory))

    def upload(self, *arrays: Array) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        for array in arrays:
            there, here = array.address, array.on_host().address
            self._call("cudaMemcpyAsync", there, here, array.nbytes, kind, self.stream)
        self.synchronize()

    def download(self, *arrays: Array) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        for array in arrays:
            there, here = array.address, array.on_host().address
            self._call("cudaMemcpyAsync", here, there, array.nbytes, kind, self.stream)
        self.synchronize()

    def read(self, array: Array) -> np.ndarray:
        passing = self._passing(array)
        self.download(passing)
        return passing.host.copy()

    def write(self, array: Array, values: np.ndarray) -> None:
        passing = self._passing(array)
        passing.host[...] = values
        self.upload(passing)

    def _passing(self, array: Array) -> Array:
        """The array with a view on the host, for as long as it takes to copy it."""
        return replace(array, seen=self._locked("passing", array.shape, array.dtype))

    def zero(self, array: Array) -> None:
        self._call("cudaMemsetAsync", array.address, 0, array.nbytes, self.stream)

    def copy_tokens(self, source: Array, target: Array, first: int) -> None:
        token = source.shape[-1] * source.dtype.itemsize
        row, pitch = source.shape[-2] * token, target.shape[-2] * token
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call(
            "cudaMemcpy2DAsync", target.address + first * token, pitch, source.address, row,
            row, math.prod(source.shape[:-2]), kind, self.stream,
        )  # fmt: skip

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        self._end()

    def _call(self, name: str, *args: Any) -> Any:
        """A CUDA call's result, or `BackendError` with its name and what CUDA says."""
        status, *result = getattr(self._cuda, name)(*args)
        if status != self._cuda.cudaError_t.cudaSuccess:
            text = self._cuda.cudaGetErrorString(status)[1].decode()
            raise BackendError(
                f"the GPU failed in {name}: {text} ({status.name}); if it happens again, restart "
                "the program, then the machine"
            )
        return result[0] if len(result) == 1 else tuple(result)


class _Memory:
    """Stands for an allocation on the GPU, which ends with it."""


def view(array: Array) -> np.ndarray:
    """Device memory that lies on the host, as numpy sees it; it lives as long as the view."""
    memory = (ctypes.c_byte * array.nbytes).from_address(array.address)
    memory.owner = array.owner  # type: ignore[attr-defined]
    return np.ndarray(array.shape, array.dtype, memoryview(memory))


def _cuda_runtime() -> Any:
    """CUDA's runtime library, once driver and GPU are known to be there."""
    try:
        from cuda.bindings import runtime as cuda
    except ImportError as error:
        raise BackendError(f"cannot use a GPU: {error}; pip install cuda-bindings") from error
    status, count = cuda.cudaGetDeviceCount()
    if status == cuda.cudaError_t.cudaSuccess and count:
        return cuda
    installed = driver()  # says so if there is none
    needed = cuda.cudaRuntimeGetVersion()[1]
    if status == cuda.cudaError_t.cudaErrorInsufficientDriver:
        raise BackendError(
            f"NVIDIA driver {installed.version} runs CUDA {'.'.join(map(str, installed.cuda))}, "
            f"this needs {needed // 1000}.0 or newer: update the driver"
        )
    gpus()  # says so if there is none
    raise BackendError(
        f"CUDA finds no usable GPU ({cuda.cudaGetErrorString(status)[1].decode()}): check that "
        "CUDA_VISIBLE_DEVICES does not hide it"
    )
