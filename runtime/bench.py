"""Time a bundle on this machine: its calls, a video from end to end, memory, and the roofline.

A video is made and encoded as `packforcing render` does it, block after block. Blocks before every
partition of the history is full are a warm-up, which takes the initialization of libraries and
kernels with it. Everything after that is counted, as median and quartiles.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import psutil

from packforcing.config import Config
from packforcing.errors import ConfigError
from packforcing.extras import installed_version
from packforcing.geometry import operations
from packforcing.machine import cpu_cores, processor_name, total_memory
from packforcing.runtime.allocations import memory_by_purpose
from packforcing.runtime.backends import LoadedGraph
from packforcing.runtime.buffers import Arrays
from packforcing.runtime.bundle import GPU_CALLS, GPU_GRAPHS
from packforcing.runtime.device import CudaDevice
from packforcing.runtime.engine_records import read_record
from packforcing.runtime.estimate import calls_per_block, seconds_per_block
from packforcing.runtime.gpus import find_gpu
from packforcing.runtime.plan import make_plan
from packforcing.runtime.session import Session
from packforcing.runtime.video_files import open_video

PROMPT = "a red star over navy stripes"  # of models that read words
LIBRARIES = ("numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx", "tensorrt", "av")
LONGEST_CONTEXT = 64  # blocks; a policy that reads more is timed before its context is full
# rows of a plan that the runtime does not allocate: the library does, and nobody
OTHER_ROWS = (*(f"weights.{graph}" for graph in GPU_GRAPHS), "reserve")
_ROOF_SIZE = 1024  # of the square matrices whose product is the CPU's roof
_ROOF = """
import sys, time, numpy
size, best = int(sys.argv[1]), 0
a = numpy.ones((size, size), numpy.float32)
for _ in range(8):
    began = time.perf_counter()
    a @ a
    best = max(best, 2 * size**3 / (time.perf_counter() - began))
print(best)
"""


class Spread(msgspec.Struct, frozen=True):
    """Median and quartiles of one quantity over the counted blocks or calls."""

    low: float
    median: float
    high: float


class CallTimes(msgspec.Struct, frozen=True):
    """One call of a block.

    Attributes:
        times: How often it runs for a block.
        milliseconds: Of one call.
        operations: Of one call with a full context, by `packforcing.geometry.operations`.
        rate: Operations per second at the median.
    """

    times: float
    milliseconds: Spread
    operations: int
    rate: float


class Memory(msgspec.Struct, frozen=True):
    """Bytes by plan and as measured.

    Attributes:
        kind: What was measured, in words.
        planned: By plan; None where there is none.
        peak: The most that was measured, between two blocks.
    """

    kind: str
    planned: int | None
    peak: int


class Roof(msgspec.Struct, frozen=True):
    """The least time of a block's products on this machine.

    Attributes:
        source: Where the rate is from, in words.
        milliseconds: Of a block.
        share: Part of the time inside the graphs that these are.
    """

    source: str
    milliseconds: float
    share: float


class Benchmark(msgspec.Struct, frozen=True):
    """What `run_benchmark` measured. Times are in milliseconds but for those named seconds."""

    model: str
    size: tuple[int, int]  # width, height
    policy: str
    precision: str
    steps: int
    runs_on: str
    machine: str
    versions: dict[str, str]
    warm_up: int  # blocks
    blocks: int  # counted after them
    load_seconds: float
    first_frame_seconds: float
    calls: dict[str, CallTimes]
    outside: Spread  # of a block, between the calls
    making: Spread  # a block
    encoding: Spread  # a block, as H.264
    fps: Spread  # of the video, made and encoded
    real_time: float  # times real time, at the median
    memory: list[Memory]
    roof: Roof | None
    not_measured: list[str]


class _TimedGraph:
    """A graph that notes the time of each of its calls."""

    def __init__(self, name: str, graph: LoadedGraph, config: Config) -> None:
        self._name, self._graph, self._config = name, graph, config
        self.calls: dict[str, list[float]] = defaultdict(list)

    @property
    def seconds(self) -> float:
        return self._graph.seconds

    def bind(self, arrays: Arrays) -> Callable[[], None]:
        call, name = self._graph.bind(arrays), self._name
        if name == "denoiser":
            is_block = arrays["tokens"].shape[1] == self._config.block_tokens
            name = "denoiser.block" if is_block else "denoiser.compressed"
        seconds = self.calls[name]

        def timed_call() -> None:
            before = self._graph.seconds
            call()
            seconds.append(self._graph.seconds - before)

        return timed_call


def run_benchmark(
    directory: Path,
    open_session: Callable[[], Session],
    *,
    blocks: int = 20,
    on_block: Callable[[int, int], None] | None = None,
) -> Benchmark:
    """Make a video of a bundle and measure it.

    Args:
        directory: The bundle.
        open_session: Opens its session; the time that it takes is the time of loading.
        blocks: Blocks to count, after the warm-up.
        on_block: Called with the number of blocks that are made and that of all blocks.

    Raises:
        PackForcingError: What `Session.open`, `Session.begin` and making a block raise.
    """
    process, not_measured = psutil.Process(), ["the text encoder", "how good the pictures are"]
    resident_before = process.memory_info().rss
    began = time.perf_counter()
    with open_session() as session:
        load_seconds = time.perf_counter() - began
        config, backend = session.config, session.backend
        timed = {name: _TimedGraph(name, graph, config) for name, graph in backend.graphs.items()}
        backend.graphs.update(timed)
        warm_up = 2 + config.policy.capacity
        if config.policy.capacity > LONGEST_CONTEXT:
            warm_up = 2
            not_measured.append("a full context: the policy reads every block")
        count = warm_up + blocks
        length_seconds = (count * config.block_pixel_frames - config.trimmed_frames) / config.fps
        rates = [] if isinstance(backend.device, CudaDevice) else [matrix_rate(backend.threads)]
        is_wordy = config.text_encoder == "words"
        prompt = PROMPT if is_wordy else np.zeros((1, config.text_dim), np.float32)
        times = np.zeros((3, count))  # made, inside graphs, encoded; seconds of each block
        calls_before: dict[str, int] = {}
        allocated = resident = 0
        with (
            tempfile.TemporaryDirectory() as folder,
            open_video(Path(folder) / "bench.mp4", config.width, config.height, config.fps) as file,
            session.begin(prompt, seconds=length_seconds, lead=None) as video,
        ):
            for block in range(count):
                if block == warm_up:
                    calls_before = {name: len(part) for name, part in _calls(timed).items()}
                inside, began = sum(session.graph_seconds().values()), time.perf_counter()
                frames = next(video).frames
                made = time.perf_counter()
                assert isinstance(frames, np.ndarray)
                file.write(frames)
                encoded = time.perf_counter()
                inside = sum(session.graph_seconds().values()) - inside
                times[:, block] = made - began, inside, encoded - made
                allocated = max(allocated, sum(backend.device.allocated.values()))
                resident = max(resident, process.memory_info().rss)
                if on_block:
                    on_block(block + 1, count)
        if rates:
            rates.append(matrix_rate(backend.threads))
        made, inside, encoded = 1e3 * times[:, warm_up:]
        roof = _roof(config, backend.device, rates, float(np.median(inside)), not_measured)
        memory = _memory(session, directory, allocated, not_measured)
        resident_memory = "host memory that the process took, with weights and archive"
        memory.append(Memory(resident_memory, None, resident - resident_before))
        frames_per_second = 1e3 * config.block_pixel_frames / (made + encoded)
        fps = _spread(frames_per_second)
        return Benchmark(
            model=config.name,
            size=(config.width, config.height),
            policy=str(config.policy),
            precision=f"{config.precision.weights} weights, {config.precision.cache} cache",
            steps=len(config.timesteps),
            runs_on=backend.identity,
            machine=f"{processor_name()}, {cpu_cores()} cores, {total_memory() / 1e9:.0f} GB, "
            f"{sys.platform}, Python {sys.version.split()[0]}",
            versions={
                name: version
                for name in ("packforcing", *LIBRARIES)
                if (version := installed_version(name))
            },
            warm_up=warm_up,
            blocks=blocks,
            load_seconds=load_seconds,
            first_frame_seconds=float(times[0, 0]),
            calls=_call_times(config, timed, calls_before, blocks),
            outside=_spread(made - inside),
            making=_spread(made),
            encoding=_spread(encoded),
            fps=fps,
            real_time=fps.median / config.fps,
            memory=memory,
            roof=roof,
            not_measured=not_measured,
        )


def matrix_rate(threads: int) -> float:
    """Measure the fp32 operations per second of NumPy's matrix product, the best of eight.

    In a process of its own, as a BLAS takes its number of threads when it is loaded.
    """
    names = "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"
    environment = {**os.environ, **dict.fromkeys(names, str(threads))}
    command = [sys.executable, "-c", _ROOF, str(_ROOF_SIZE)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return float(done.stdout)


def _roof(
    config: Config,
    device: object,
    rates: Sequence[float],
    inside_ms: float,
    not_measured: list[str],
) -> Roof | None:
    """Return the roofline of a block; None where the GPU's figures are not known."""
    if isinstance(device, CudaDevice):
        try:
            seconds = seconds_per_block(config, find_gpu(device.name))
        except ConfigError as error:
            not_measured.append(f"the share of the roofline: {error}")
            return None
        source = f"published figures of {device.name}: the larger of operations and bytes"
    else:
        work = operations(config)
        total = sum(times * work[call] for call, times in calls_per_block(config).items())
        seconds = total / max(rates)
        source = (
            f"{max(rates) / 1e9:.0f} GFLOP/s, measured: NumPy's fp32 product of two "
            f"{_ROOF_SIZE}x{_ROOF_SIZE} matrices"
        )
    return Roof(source, 1e3 * seconds, 1e3 * seconds / inside_ms)


def _memory(
    session: Session, directory: Path, allocated: int, not_measured: list[str]
) -> list[Memory]:
    """Return what the device holds, beside what was planned for it."""
    config, device = session.config, session.backend.device
    if not isinstance(device, CudaDevice):
        purposes = memory_by_purpose(config)
        fixed = sum(size for name, size in purposes.items() if name != "archive_per_block")
        return [Memory("buffers", fixed, allocated)]
    backend = session.backend.identity.partition(",")[0]
    records = [read_record(directory, backend, graph) for graph in GPU_GRAPHS]
    built = {name: size for record in records if record for name, size in record.figures.items()}
    planned = None
    try:
        rows = make_plan(config, device.target, built=built).device
        planned = sum(size for name, size in rows.items() if name not in OTHER_ROWS)
    except ConfigError as error:
        not_measured.append(f"memory against the plan: {error}")
    free_bytes, total_bytes = device.free_memory()
    return [
        Memory("buffers and scratch on the GPU", planned, allocated),
        Memory("GPU memory in use by all programs", None, total_bytes - free_bytes),
    ]


def _calls(timed: dict[str, _TimedGraph]) -> dict[str, list[float]]:
    return {name: seconds for graph in timed.values() for name, seconds in graph.calls.items()}


def _call_times(
    config: Config, timed: dict[str, _TimedGraph], before: dict[str, int], blocks: int
) -> dict[str, CallTimes]:
    """Return the calls of the counted blocks, in the order of the contract."""
    work, calls, result = operations(config), _calls(timed), {}
    for name in GPU_CALLS:
        if seconds := calls.get(name, [])[before.get(name, 0) :]:
            milliseconds = _spread(1e3 * np.array(seconds))
            rate = 1e3 * work[name] / milliseconds.median
            result[name] = CallTimes(len(seconds) / blocks, milliseconds, work[name], rate)
    return result


def _spread(values: np.ndarray) -> Spread:
    return Spread(*map(float, np.percentile(values, (25, 50, 75))))
