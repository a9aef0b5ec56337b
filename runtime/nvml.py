"""Ask the NVIDIA driver for its version and GPUs, through NVML.

Unlike CUDA, NVML needs no context: nothing is allocated on the GPU. GPUs are numbered along the
PCI bus, which is CUDA's order under CUDA_DEVICE_ORDER=PCI_BUS_ID.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from packforcing.errors import BackendError
from packforcing.extras import optional_imports
from packforcing.machine import free_memory, total_memory

# Of GPUs that share the host's memory: Jetson Orin and Thor, GB10 of DGX Spark and its relatives
UNIFIED_TARGETS = ("sm87", "sm110", "sm121")


class Driver(msgspec.Struct, frozen=True):
    """The installed driver."""

    version: str
    cuda: tuple[int, int]  # the newest CUDA version that it supports


class Gpu(msgspec.Struct, frozen=True):
    """A GPU, with its memory in bytes as it is now."""

    index: int
    name: str
    target: str  # compute capability, as engines name it: sm89 is 8.9
    memory_total: int
    memory_free: int
    power_limit: float = 0  # watts; 0 where the driver does not say it


def driver() -> Driver:
    """Return the driver's version.

    Raises:
        BackendError: There is no driver, or it does not answer.
    """
    with _nvml() as nvml:
        cuda = nvml.nvmlSystemGetCudaDriverVersion()
        return Driver(nvml.nvmlSystemGetDriverVersion(), (cuda // 1000, cuda % 1000 // 10))


def gpus() -> list[Gpu]:
    """List the GPUs of this machine, at least one.

    Raises:
        BackendError: There is no driver or no GPU.
    """
    with _nvml() as nvml:
        devices = [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    if not devices:
        raise BackendError(
            "the NVIDIA driver reports no GPU: check that the GPU is seated and powered, and "
            "passed through to this container or virtual machine"
        )
    return devices


def _gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    target = "sm{}{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(handle))
    total_bytes, free_bytes = total_memory(), free_memory()
    if target not in UNIFIED_TARGETS:  # of those NVML does not know, or states a part of it
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        total_bytes, free_bytes = memory.total, memory.free
    try:
        power_limit = nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
    except nvml.NVMLError_NotSupported:
        power_limit = 0
    name = nvml.nvmlDeviceGetName(handle)
    return Gpu(index, name, target, total_bytes, free_bytes, power_limit)


@contextmanager
def _nvml() -> Iterator[Any]:
    """Initialize NVML; turn its errors into `BackendError`."""
    with optional_imports("listing GPUs"):
        import pynvml
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
