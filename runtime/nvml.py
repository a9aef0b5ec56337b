"""The NVIDIA driver and its GPUs, asked through NVML.

Unlike CUDA, NVML needs no context for that: nothing is allocated on the card. GPUs are numbered
along the PCI bus, which is CUDA's order under CUDA_DEVICE_ORDER=PCI_BUS_ID.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from packforcing.errors import BackendError


class Driver(msgspec.Struct, frozen=True):
    """The installed driver."""

    version: str
    cuda: tuple[int, int]  # the newest CUDA that it runs


class Gpu(msgspec.Struct, frozen=True):
    """A card, with its memory in bytes as it is now."""

    index: int
    name: str
    target: str  # its compute capability, as engines for it are built for: sm89 is 8.9
    memory_total: int
    memory_free: int


def driver() -> Driver:
    """The driver's version; raises `BackendError` where there is none."""
    with _nvml() as nvml:
        cuda = nvml.nvmlSystemGetCudaDriverVersion()
        return Driver(nvml.nvmlSystemGetDriverVersion(), (cuda // 1000, cuda % 1000 // 10))


def gpus() -> list[Gpu]:
    """Every card of this machine, at least one; raises `BackendError` without driver or card."""
    with _nvml() as nvml:
        found = [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    if not found:
        raise BackendError(
            "the NVIDIA driver reports no GPU: check that the card is seated and powered, and "
            "passed through to this container or virtual machine"
        )
    return found


def _gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        total, free = memory.total, memory.free
    except nvml.NVMLError_NotSupported:  # it has none of its own: the host's is shared
        import psutil

        host = psutil.virtual_memory()
        total, free = host.total, host.available
    target = "sm{}{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(handle))
    return Gpu(index, nvml.nvmlDeviceGetName(handle), target, total, free)


@contextmanager
def _nvml() -> Iterator[Any]:
    """NVML, initialised; its own errors leave as `BackendError`."""
    try:
        import pynvml
    except ImportError as error:
        raise BackendError(f"cannot ask for GPUs: {error}; pip install nvidia-ml-py") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise BackendError(
            f"no NVIDIA driver answers ({error}): install one from nvidia.com/drivers; in a "
            "container, start it with --gpus all"
        ) from error
    try:
        yield pynvml
    except pynvml.NVMLError as error:
        raise BackendError(f"the NVIDIA driver does not answer: {error}; restart it") from error
    finally:
        pynvml.nvmlShutdown()
