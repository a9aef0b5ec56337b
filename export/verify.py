"""Every graph and engine of a bundle against its oracle, on recorded inputs, output by output.

What lies in the context beyond `kv_len` must not matter. So each is given garbage there, twice,
and has to give the same bits both times; the oracle is given a context that ends there.
`packforcing.export.oracle` has the oracle and the inputs.
"""

from __future__ import annotations

import importlib.metadata
import math
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np

from packforcing.config import Config, Precision
from packforcing.errors import BackendError, MissingDependency
from packforcing.export.oracle import (
    SEED,
    Call,
    Oracle,
    Tensors,
    as_stored,
    has_rest,
    in_full,
    record,
    rehearsal,
    sized,
    with_garbage,
    without_rest,
)
from packforcing.runtime.backends import ENGINE_BACKENDS, LoadedGraph
from packforcing.runtime.backends.onnxruntime import OnnxGraph
from packforcing.runtime.backends.tensorrt import Engines
from packforcing.runtime.bundle import (
    DTYPES,
    GPU_GRAPHS,
    GraphSpec,
    check_files,
    contract,
    graph_file,
    read_manifest,
)
from packforcing.runtime.device import HostDevice
from packforcing.runtime.engine_records import read_records, record_file
from packforcing.runtime.nvml import gpus

Run = Callable[[Tensors], Tensors]


class Limit(msgspec.Struct, frozen=True):
    """Errors that rounding explains, relative to an output's RMS: of an element, and the mean."""

    largest: float
    mean: float


# By the precision that a graph computes in: about three times the worst that was measured on sound
# bundles, of 2 to 30 layers. Rounding every result to fp16 (by up to 2^-11 of it) gives 1.6e-2 and
# 1.8e-3 there; fp32 sums in another order give 2e-5 and 7e-7. A fault gives far more.
#
# Where products are made in fp8, what they take is rounded to one of 8 numbers per octave, and the
# last bit of what comes in decides between two. After a few layers nothing is left in common but
# the noise's size: 0.24 and 3.8e-2 on a sound bundle, in the flow at t = 0.
LIMITS = {"fp32": Limit(6e-5, 2e-6), "fp16": Limit(5e-2, 5e-3), "fp8": Limit(0.75, 0.12)}
# What rounding to 8 bits adds, in steps: another neighbour, now and then
STEP = Limit(1.0, 1e-3)
# Of memory: bytes for each byte of the largest graph, and beside that
MEMORY, SPARE = 3, 1 << 30


class Check(msgspec.Struct, frozen=True):
    """An output of one call. Errors are relative to `scale`, the oracle's RMS; `share` is the
    worse of the two as a share of what is allowed."""

    graph: str
    run: str  # how it was run: one of `ways`, or the backend of an engine
    call: str
    output: str
    shape: tuple[int, ...]
    scale: float
    largest: float
    mean: float
    share: float
    independent: bool  # the same bits whatever lies beyond kv_len
    passed: bool


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """What `verify` found; the worst output comes first."""

    bundle: str
    model: str
    precision: Precision
    inputs: str
    limits: dict[str, Limit]
    checks: list[Check]
    engines: str
    tools: dict[str, str]
    seconds: float

    @property
    def missed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]


def verify(
    directory: str | Path, on_graph: Callable[[str, int, int], None] | None = None
) -> Verification:
    """Compares every graph of a bundle with its oracle, and its engines where there is a GPU.

    `on_graph` is told each graph's name, its number and how many there are, before it is
    compared. Raises `BundleError` for a damaged bundle and `BackendError` for engines that are
    damaged or of other graphs, or where a library or the memory is missing. An output that
    misses is no error, but in the result.
    """
    began = time.perf_counter()
    directory = Path(directory)
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    config = manifest.config
    check_memory(directory)
    about_engines, runnable = built_engines(directory)
    small = rehearsal(config)
    plain = contract(in_full(config))
    oracles = {name: Oracle(directory / graph_file(name), spec) for name, spec in plain.items()}
    calls = record(small, oracles)
    checks: list[Check] = []
    kinds = {name: computes(name, spec, config) for name, spec in manifest.graphs.items()}
    for_engines: dict[str, list[Expected]] = {}
    for number, (name, spec) in enumerate(manifest.graphs.items()):
        if on_graph:
            on_graph(name, number, len(manifest.graphs))
        oracle, recorded = oracles.pop(name), calls.pop(name)
        expected = [Expected(oracle, spec, call) for call in recorded]
        if runnable and name in GPU_GRAPHS:
            wide = [sized(spec, call, small, config) for call in recorded]
            fitting = [call for call in wide if score_bytes(config, call) < free_memory()]
            for_engines[name] = [Expected(oracle, spec, call) for call in fitting]
            if len(fitting) < len(wide):
                about_engines += f"; {len(fitting)} of {len(wide)} calls of {name}, for memory"
        del oracle, recorded  # one set of a graph's weights at a time
        for way, load in ways(directory / graph_file(name), spec, plain[name]).items():
            checks += judge(name, way, spec, LIMITS[kinds[name]], load(), expected)
    for backend in runnable:
        try:
            opened = Engines(backend, directory, config)
        except (BackendError, MissingDependency) as error:  # of another GPU, too little memory
            about_engines += f"; not run on {backend}: {error}"
            continue
        with closing(opened) as engines:
            for name, engine in engines.load(manifest.graphs).items():
                spec, limit = manifest.graphs[name], LIMITS[kinds[name]]
                runs = partial(run, engine, spec, engines.device)
                checks += judge(name, backend, spec, limit, runs, for_engines[name])
    checks.sort(key=lambda check: (check.passed, -check.share))
    return Verification(
        bundle=str(directory),
        model=config.name,
        precision=config.precision,
        inputs=about_inputs(small, config),
        limits={kind: LIMITS[kind] for kind in sorted({*kinds.values()})},
        checks=checks,
        engines=about_engines,
        tools={
            name: importlib.metadata.version(name)
            for name in ("packforcing", "onnxruntime", "polygraphy", "onnx-ir")
        },
        seconds=time.perf_counter() - began,
    )


def about_inputs(small: Config, config: Config) -> str:
    """What the inputs stand for, and what they do not."""

    def sizes(config: Config) -> str:
        return (
            f"{config.block_tokens:,} and {config.compressed_tokens:,} new tokens with "
            f"{config.context_tokens:,} of context"
        )

    said = f"recorded from a rollout with {sizes(small)}"
    if small.context_tokens != config.context_tokens:
        said += (
            f", since a CPU stores attention scores in full; the model's own are {sizes(config)}"
        )
    if config.text_encoder != "words":
        said += "; the prompt's embedding is a seeded draw"
    return said


class Expected:
    """A call in the types that the bundle's graph takes, and what the oracle gives for it."""

    def __init__(self, oracle: Oracle, spec: GraphSpec, call: Call) -> None:
        self.call, self.inputs = call.name, as_stored(spec, call.inputs)
        self.outputs = oracle.run(without_rest(spec, self.inputs))


def check_memory(*directories: Path) -> None:
    """Refuses bundles, loaded at once, whose weights are too much for the memory that is free."""
    largest = sum(
        max(
            sum(file.stat().st_size for file in directory.glob(f"{path.name}*"))
            for path in directory.glob("*.onnx")
        )
        for directory in directories
    )
    needed, free = MEMORY * largest + SPARE, free_memory()
    if needed > free:
        raise BackendError(
            f"verifying {' and '.join(map(str, directories))} needs {needed / 1e9:.1f} GB of "
            f"memory, {free / 1e9:.1f} GB are free: close other programs, or use a machine with "
            "more"
        )


def free_memory() -> int:
    """Bytes of host memory that can be had without swapping."""
    import psutil

    return psutil.virtual_memory().available


def score_bytes(config: Config, call: Call) -> int:
    """What the oracle takes for the attention scores of a layer, before and after softmax."""
    if "kv_len" not in call.inputs:
        return 0
    new, read = call.inputs["tokens"].shape[1], int(call.inputs["kv_len"][0])
    return 2 * np.dtype(np.float32).itemsize * config.heads * new * read


def built_engines(directory: Path) -> tuple[str, list[str]]:
    """What to say of a bundle's engines, and the backends whose engines are to be run.

    Where there is no GPU these are none. Raises `BackendError` for engines that are damaged or
    were built from other graphs.
    """
    built = {
        backend: read_records(directory, backend)
        for backend in ENGINE_BACKENDS
        if all(record_file(directory, backend, graph).exists() for graph in GPU_GRAPHS)
    }
    if not built:
        return "none built, or not all of them", []
    targets = {backend: sorted({t for r in records.values() for t in r.key.targets})
               for backend, records in built.items()}  # fmt: skip
    said = ", ".join(f"{backend} for {' '.join(targets[backend])}" for backend in built)
    try:
        gpus()
    except (BackendError, MissingDependency) as error:
        return f"{said}: built from these graphs and intact, not run here ({error})", []
    return f"{said}: run here, on their own shapes", list(built)


def judge(
    graph: str, way: str, spec: GraphSpec, limit: Limit, runs: Run, expected: list[Expected]
) -> list[Check]:
    """Runs every call with garbage beyond `kv_len`, twice if there is room for it, and compares
    each output."""
    checks = []
    for wanted in expected:
        found = again = runs(with_garbage(spec, wanted.inputs, SEED))
        if has_rest(spec, wanted.inputs):
            again = runs(with_garbage(spec, wanted.inputs, SEED + 1))
        label = (graph, way, wanted.call)
        checks += compare(label, limit, wanted.outputs, found, again)
    return checks


def ways(path: Path, spec: GraphSpec, plain: GraphSpec) -> dict[str, Callable[[], Run]]:
    """How a graph is run to be compared: what loads it, by name.

    ONNX Runtime's CPU provider computes most of an fp16 graph in fp32 and rounds rarely. So the
    fp32 graph that rounds every result to fp16 is compared too: what goes beyond the range of
    fp16, or cannot bear its rounding, shows there.
    """
    ways: dict[str, Callable[[], Run]] = {
        "onnxruntime": lambda: partial(run, OnnxGraph(path, spec, None), spec, HostDevice())
    }
    if halved(spec):
        ways["rounded"] = lambda: Oracle(path, plain, rounded=True).run
    return ways


def run(graph: LoadedGraph, spec: GraphSpec, device: HostDevice, inputs: Tensors) -> Tensors:
    """Outputs of a loaded graph by name, through arrays as the runtime binds them."""
    open_axes = {
        size: inputs[tensor.name].shape[axis]
        for tensor in spec.inputs
        for axis, size in enumerate(tensor.shape)
        if isinstance(size, str)
    }
    arrays = {
        tensor.name: device.allocate(
            "verify",
            tuple(open_axes[n] if isinstance(n, str) else n for n in tensor.shape),
            tensor.dtype,
            host=True,
        )
        for tensor in (*spec.inputs, *spec.outputs)
    }
    for name, given in inputs.items():
        arrays[name].host[...] = given
    device.upload(*(arrays[tensor.name] for tensor in spec.inputs))
    graph.bind(arrays)()
    device.download(*(arrays[tensor.name] for tensor in spec.outputs))
    return {tensor.name: arrays[tensor.name].host.copy() for tensor in spec.outputs}


def compare(
    call: tuple[str, str, str], limit: Limit, wanted: Tensors, found: Tensors, again: Tensors
) -> list[Check]:
    """Checks of a call's outputs; `again` are those with other garbage beyond `kv_len`.

    call: of which graph, how it was run, and which call of it.
    """
    from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc, SimpleThreshold
    from polygraphy.logger import G_LOGGER

    scales = {name: float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))
              for name, array in wanted.items()}  # fmt: skip
    allowed = {name: at_most(limit, scales[name], array) for name, array in wanted.items()}
    found, again, wanted = ({name: out.astype(np.float32) for name, out in outputs.items()}
                            for outputs in (found, again, wanted))  # fmt: skip
    results = RunResults()
    results.add([found], runner_name="graph")
    results.add([wanted], runner_name="oracle")
    # without a relative tolerance the absolute one, stated in the output's own scale, decides
    by_largest = SimpleCompareFunc(
        check_error_stat="max",
        atol={name: allowed[name].largest * scale for name, scale in scales.items()},
        rtol=0.0,
    )
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(all="ignore"):
        (accuracy,) = Comparator.compare_accuracy(results, compare_func=by_largest)
    ((compared,),) = accuracy.values()
    checks = []
    for name, result in compared.items():
        scale, limit = scales[name], allowed[name]
        on_average = SimpleThreshold("mean", limit.mean * scale, 0.0)
        same = np.array_equal(found[name], again[name])
        largest, mean = (
            error / (scale or 1.0) if np.isfinite(error) else math.inf
            for error in (result.max_absdiff, result.mean_absdiff)
        )
        checks.append(
            Check(
                graph=call[0],
                run=call[1],
                call=call[2],
                output=name,
                shape=wanted[name].shape,
                scale=scale,
                largest=largest,
                mean=mean,
                share=max(largest / limit.largest, mean / limit.mean),
                independent=same,
                passed=bool(result) and on_average.passed(result.metric_values()) and same,
            )
        )
    return checks


def at_most(limit: Limit, scale: float, wanted: np.ndarray) -> Limit:
    """The errors that an output may have: one in 8 bits may differ by a step besides."""
    if wanted.dtype.itemsize > 1 or not scale:
        return limit
    step = 1.0
    if wanted.dtype == DTYPES["fp8"]:  # its steps grow with the numbers
        _, exponent = math.frexp(np.abs(wanted).max())
        step = 2.0 ** (exponent - 1 - ml_dtypes.finfo(wanted.dtype).nmant)
    return Limit(limit.largest + step * STEP.largest / scale, limit.mean + step * STEP.mean / scale)


def computes(graph: str, spec: GraphSpec, config: Config) -> str:
    """The precision that a graph computes in: those on the host stay in fp32."""
    if graph == "denoiser" and config.precision.weights == "fp8":
        return "fp8"
    return "fp16" if halved(spec) else "fp32"


def halved(spec: GraphSpec) -> bool:
    """Whether a graph computes in fp16."""
    return DTYPES["fp16"] in {tensor.dtype for tensor in (*spec.inputs, *spec.outputs)}
