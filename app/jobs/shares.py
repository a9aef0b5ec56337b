"""What a worker takes of a machine, by the plan's bytes, and how many fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from packforcing.config import Policy
from packforcing.errors import BackendError
from packforcing.runtime.backends import ENGINE_BACKENDS
from packforcing.runtime.bundle import read_manifest
from packforcing.runtime.device import VisibleGpu
from packforcing.runtime.engine_records import current_records
from packforcing.runtime.plan import CUDA_CONTEXT, RESERVE, make_plan
from packforcing.units import format_gib

LIBRARIES = 512 << 20  # host memory of Python and its libraries, with Ray's, and room
_EVERY_DTYPE = "sm89"  # a target that has all: on the CPU the plan is of bytes alone


class Needs(NamedTuple):
    """Bytes that a worker takes."""

    device: int  # of GPU memory, with the CUDA context
    host: int


class Videos(NamedTuple):
    """What a worker renders with one bundle."""

    bundle: Path
    policy: Policy | None  # None: the bundle's
    seconds: float  # of the longest


def worker_needs(videos: Iterable[Videos], backend: str, target: str | None) -> Needs:
    """Return what a worker takes that renders one of several videos at a time.

    On the CPU, host memory has what the plan of a GPU has on both sides.

    Args:
        videos: What is rendered.
        backend: Runs the graphs.
        target: Architecture of the GPU, like "sm89"; None: the CPU.

    Raises:
        BackendError: Engines are missing.
        ConfigError: The target lacks a dtype.
    """
    device_bytes = host_bytes = 0
    for bundle, policy, seconds in videos:
        config = read_manifest(bundle).config
        built: dict[str, int] = {}
        if backend in ENGINE_BACKENDS:
            for record in current_records(bundle, backend).values():
                built |= record.figures
        else:
            blocks = config.blocks(config.frames(seconds))
            policy = (policy or config.policy).fit_to_video(blocks, config.policy)
            config = msgspec.structs.replace(config, policy=policy)
        plan = make_plan(config, target or _EVERY_DTYPE, seconds=seconds, built=built)
        on_host = max(sum(plan.host.values()), plan.host_loading)
        if target is None:
            on_host += plan.total - RESERVE
        device_bytes = max(device_bytes, plan.total + CUDA_CONTEXT)
        host_bytes = max(host_bytes, on_host + LIBRARIES)
    return Needs(device_bytes, host_bytes)


def gpu_part(count: int) -> float:
    """Return the part of a GPU with which Ray places so many workers on one, and no more."""
    return 10_000 // count / 10_000  # Ray divides a GPU into so many parts


def check_per_gpu(count: int, device_bytes: int, gpu: VisibleGpu) -> None:
    """Refuse workers of one GPU whose bytes do not fit into it together.

    Args:
        count: Workers on the GPU; a single one checks itself what is free.
        device_bytes: Of each, as in `Needs`.
        gpu: The GPU.

    Raises:
        BackendError: They do not fit.
    """
    if count > 1 and count * device_bytes > gpu.memory:
        raise BackendError(
            f"{count} workers of {format_gib(device_bytes, round_up=True)} GiB do not fit into "
            f"{gpu.name} with {format_gib(gpu.memory)} GiB: "
            f"{max(1, gpu.memory // device_bytes)} on each GPU is the most"
        )


def cpu_share(cores: Sequence[float], workers: int) -> int:
    """Return the most CPU cores that each of several workers can have, at least 1.

    Args:
        cores: Of each machine; no worker spans two.
        workers: How many there are.
    """
    shares = range(int(max(cores, default=1)), 1, -1)
    return next((n for n in shares if sum(int(each // n) for each in cores) >= workers), 1)
