"""Backends: what runs the graphs of a bundle.

    onnxruntime             the CPU                        backends/onnxruntime.py
    onnxruntime-cuda        ONNX Runtime's CUDA provider   backends/onnxruntime.py
    tensorrt-rtx, tensorrt  engines built from the graphs  backends/tensorrt.py

Everything above this package is the same for every backend: it binds loaded graphs to arrays of
the backend's device and calls them. The graphs that run once per prompt or start clip stay on the
CPU under every backend, where they take no device memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from packforcing.config import Config
from packforcing.errors import BackendError
from packforcing.machine import cpu_cores
from packforcing.runtime.backends.onnxruntime import OnnxGraph, import_onnxruntime, open_cuda_device
from packforcing.runtime.backends.tensorrt import Engines, matching_records
from packforcing.runtime.buffers import Arrays
from packforcing.runtime.bundle import GPU_GRAPHS, Manifest, check_files, contract, graph_file
from packforcing.runtime.device import CudaDevice, HostDevice, VisibleGpu, list_gpus
from packforcing.runtime.turns import CPU_TURNS, Turns

MAX_THREADS = 1024
ENGINE_BACKENDS = ("tensorrt-rtx", "tensorrt")
BACKENDS = ("onnxruntime", "onnxruntime-cuda", *ENGINE_BACKENDS)


class LoadedGraph(Protocol):
    """A graph or engine that is ready to be bound."""

    @property
    def seconds(self) -> float:
        """The time in its calls so far."""

    def bind(self, arrays: Arrays) -> Callable[[], None]:
        """Fix inputs and outputs to arrays for good; return the call that runs the graph."""


def _nothing_to_close() -> None:
    pass


@dataclass
class Backend:
    """A device and the graphs of a bundle, loaded for it.

    Attributes:
        device: Where the arrays are allocated that graphs are bound to.
        graphs: The loaded graphs, by the names of the contract.
        close: Release what is not memory, after the last call of what was bound.
        identity: What the results depend on besides the bundle: the backend's name, CPU threads,
            the GPU and the engines.
        threads: CPU threads of each graph.
        turns: Videos of this backend make their blocks in turns.
        any_policy: Whether the graphs run under every policy; engines fit one.
    """

    device: HostDevice
    graphs: dict[str, LoadedGraph] = field(default_factory=dict)
    close: Callable[[], None] = _nothing_to_close
    identity: str = ""
    threads: int = 1
    turns: Turns = field(default_factory=Turns)
    any_policy: bool = True


def check_backend(name: str) -> None:
    """Raise `BackendError` unless there is a backend of this name."""
    if name not in BACKENDS:
        raise BackendError(f"unknown backend '{name}'; known backends: {', '.join(BACKENDS)}")


def check_engine_records(name: str, directory: Path, config: Config, device: int) -> None:
    """Check by their records alone that the engines of a backend can run here, if it has any.

    Raises:
        BackendError: They cannot.
        MissingDependency: A package is not installed.
    """
    if name in ENGINE_BACKENDS:
        matching_records(name, directory, config, CudaDevice(name, device))


def open_backend(
    name: str,
    directory: Path,
    manifest: Manifest,
    config: Config,
    threads: int | None,
    device: int = 0,
) -> Backend:
    """Check machine and bundle, the cheap checks first, and load the graphs.

    Args:
        name: One of `BACKENDS`.
        directory: The bundle.
        manifest: The bundle's manifest.
        config: The manifest's config, with the policy to run.
        threads: CPU threads of each graph; None: one for each core of this process, used in turns
            with other sessions.
        device: The GPU, among the visible ones.

    Raises:
        BackendError: No such backend; a library, the GPU or an engine cannot be used.
        BundleError: A file of the bundle is damaged.
        MissingDependency: A package is not installed.
    """
    check_backend(name)
    specs = contract(config)
    import_onnxruntime()  # every backend runs some graphs in it

    turns = CPU_TURNS if threads is None else Turns()
    threads = threads or cpu_cores()
    host = f"{name}, {threads} threads"
    gpu = None  # of ONNX Runtime; engines have their own
    if name == "onnxruntime":
        opened = Backend(HostDevice(), identity=f"{host}, the CPU", turns=turns)
    elif name == "onnxruntime-cuda":
        gpu = open_cuda_device(directory, config, device)
        opened = Backend(gpu, close=gpu.close, identity=f"{host}, {gpu.name}")
    else:
        engines = Engines(name, directory, config, device)
        identity = f"{host}, {engines.identity}"
        opened = Backend(engines.device, close=engines.close, identity=identity, any_policy=False)
    opened.threads = threads
    try:
        check_files(directory, manifest)
        if name in ENGINE_BACKENDS:
            opened.graphs.update(engines.load(specs))
        for graph in [graph for graph in specs if graph not in opened.graphs]:
            place = gpu if graph in GPU_GRAPHS else None
            path = directory / graph_file(graph)
            opened.graphs[graph] = OnnxGraph(path, specs[graph], threads, place)
    except BaseException:
        opened.close()
        raise
    return opened


def visible_gpus(name: str) -> list[VisibleGpu]:
    """List the GPUs that a backend can use; none for one that runs on the CPU.

    Raises:
        BackendError: No such backend, or it needs a GPU and there is none.
        MissingDependency: A package is not installed.
    """
    check_backend(name)
    if name == "onnxruntime":
        return []
    return list_gpus("gpu" if name == "onnxruntime-cuda" else name)


def threads_of(identity: str) -> int | None:
    """Return the CPU threads that a backend's identity names, or None for another text."""
    match = re.search(r", (\d{1,4}) threads", identity)
    return int(match[1]) if match and 0 < int(match[1]) <= MAX_THREADS else None
