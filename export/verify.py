"""Compare every graph and engine of a bundle with its oracle, output by output.

`packforcing.export.oracle` has the oracle and the recorded inputs. Context beyond `kv_len` must not
matter: each graph gets garbage there, twice, and has to return the same bits both times. The oracle
gets a context that ends at `kv_len`.

Polygraphy's comparator measures and decides. The outputs of a call become `RunResults`, and
`Comparator.compare_accuracy` compares them by the largest absolute error, with a tolerance per
output that is its limit times its scale; a `SimpleThreshold` decides on the mean error of the same
result. Polygraphy's runners are not used, since they would verify something else than what renders:
`TrtRunner` allocates buffers and scratch memory of its own, where the runtime binds engines to
fixed buffers that share scratch, and it needs a GPU, where the runtime's path runs on the emulated
one too. `OnnxrtRunner` cannot be fed the fp8 arrays of an fp8 cache, and `Comparator.run` gives
every runner the same inputs, where the oracle must not see the garbage.
"""

from __future__ import annotations

import importlib.metadata
import math
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, get_args

import ml_dtypes
import msgspec
import numpy as np

from packforcing.config import Config, Precision
from packforcing.errors import BackendError, MissingDependency
from packforcing.export.attention import Softmax
from packforcing.export.oracle import (
    SEED,
    Oracle,
    RecordedCall,
    Tensors,
    add_garbage,
    cast_inputs,
    describe_inputs,
    has_unused_context,
    oracle_config,
    record_calls,
    rehearsal_config,
    resize_call,
    score_bytes,
    truncate_context,
)
from packforcing.extras import optional_imports
from packforcing.machine import free_memory
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
from packforcing.units import format_memory

GraphFunction = Callable[[Tensors], Tensors]  # inputs to outputs, by name


class ErrorLimit(msgspec.Struct, frozen=True):
    """Errors that rounding explains, relative to an output's RMS.

    Attributes:
        largest: The absolute error of any element.
        mean: The mean absolute error of all elements.
    """

    largest: float
    mean: float


# By the precision that a graph computes in: about three times the largest errors measured on sound
# bundles, of 2 to 30 layers. There, rounding every result to fp16 (by up to 2^-11 of it) gives
# 1.6e-2 and 1.8e-3; fp32 sums in another order give 2e-5 and 7e-7. A fault gives far more.
#
# Products in int8, fp8 or fp4 round their inputs to few values, in fp8 to 8 per octave, and the
# last bit of an input decides between two. After a few layers two sound implementations share
# nothing but the size of the noise. On sound bundles that is 0.06 and 1.6e-2 in int8, 0.24 and
# 3.8e-2 in fp8, 0.67 and 8.8e-2 in fp4.
LIMITS = {
    "fp32": ErrorLimit(6e-5, 2e-6),
    "fp16": ErrorLimit(5e-2, 5e-3),
    "fp8": ErrorLimit(0.75, 0.12),
    "int8": ErrorLimit(0.2, 0.05),
    "nvfp4": ErrorLimit(2.0, 0.27),
}
QUANTIZED_PRODUCTS = LIMITS.keys() - {"fp32", "fp16"}
# What rounding to a quantized dtype adds, in units of its spacing: now and then the next value
QUANTIZED_LIMIT = ErrorLimit(1.0, 1e-3)
# Bytes of memory for each byte of the largest graph, and bytes besides
MEMORY_FACTOR, MEMORY_RESERVE = 3, 1 << 30


class OutputCheck(msgspec.Struct, frozen=True):
    """How far an output of one call is from the oracle's.

    Attributes:
        graph: Name in the contract.
        run: What computed it: a key of `execution_paths`, or the backend of an engine.
        call: Name of the recorded call.
        output: Name of the output.
        shape: Of the output.
        scale: RMS of the oracle's output.
        largest: Largest absolute error relative to `scale`.
        mean: Mean absolute error relative to `scale`.
        share: The worse of the two errors, as a share of its limit.
        independent: The bits are the same whatever is beyond `kv_len`.
        passed: Whether the output is within its limits and independent.
    """

    graph: str
    run: str
    call: str
    output: str
    shape: tuple[int, ...]
    scale: float
    largest: float
    mean: float
    share: float
    independent: bool
    passed: bool


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `verify_bundle`; checks that failed come first, then the largest shares."""

    bundle: str
    model: str
    precision: Precision
    inputs: str
    limits: dict[str, ErrorLimit]
    checks: list[OutputCheck]
    engines: str
    tools: dict[str, str]
    seconds: float

    @property
    def missed(self) -> list[OutputCheck]:
        """The checks that failed."""
        return [check for check in self.checks if not check.passed]


def verify_bundle(
    directory: str | Path, on_graph: Callable[[str, int, int], None] | None = None
) -> Verification:
    """Compare every graph of a bundle with its oracle, and its engines where there is a GPU.

    Args:
        directory: The bundle.
        on_graph: Called before each graph with its name, its index and their number.

    Returns:
        A check per output. An output beyond its limit is no error, but a failed check.

    Raises:
        BundleError: The bundle is damaged.
        BackendError: Engines are damaged or of other graphs, or memory is missing.
        MissingDependency: Polygraphy is not installed.
    """
    with optional_imports("verifying", "verify"):
        import polygraphy.comparator  # noqa: F401
    start = time.perf_counter()
    directory = Path(directory)
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    config = manifest.config
    require_memory(directory)
    engines_text, backends = describe_engines(directory)
    small = rehearsal_config(config)
    oracle_specs = contract(oracle_config(config))
    oracles = {
        name: Oracle(directory / graph_file(name), spec) for name, spec in oracle_specs.items()
    }
    calls = record_calls(small, oracles)
    checks: list[OutputCheck] = []
    dtypes = {name: compute_dtype(name, spec, config) for name, spec in manifest.graphs.items()}
    engine_calls: dict[str, list[ExpectedCall]] = {}
    for index, (name, spec) in enumerate(manifest.graphs.items()):
        if on_graph:
            on_graph(name, index, len(manifest.graphs))
        oracle, recorded = oracles.pop(name), calls.pop(name)
        expected = [ExpectedCall(oracle, spec, call) for call in recorded]
        if backends and name in GPU_GRAPHS:
            resized = [resize_call(spec, call, small, config) for call in recorded]
            fitting = [call for call in resized if score_bytes(config, call) < free_memory()]
            engine_calls[name] = [ExpectedCall(oracle, spec, call) for call in fitting]
            if len(fitting) < len(resized):
                engines_text += f"; {len(fitting)} of {len(resized)} calls of {name}, for memory"
        del oracle, recorded  # so that one set of a graph's weights is in memory at a time
        attention = config.precision.attention if name == "denoiser" else None
        paths = execution_paths(directory / graph_file(name), spec, oracle_specs[name], attention)
        for path_name, load in paths.items():
            checks += check_calls(name, path_name, spec, LIMITS[dtypes[name]], load(), expected)
    for backend in backends:
        try:
            loaded = Engines(backend, directory, config)
        except (BackendError, MissingDependency) as error:  # another GPU, too little memory
            engines_text += f"; not run on {backend}: {error}"
            continue
        with closing(loaded) as engines:
            for name, engine in engines.load(manifest.graphs).items():
                spec, limit = manifest.graphs[name], LIMITS[dtypes[name]]
                function = partial(run_graph, engine, spec, engines.device)
                checks += check_calls(name, backend, spec, limit, function, engine_calls[name])
    checks.sort(key=lambda check: (check.passed, -check.share))
    return Verification(
        bundle=str(directory),
        model=config.name,
        precision=config.precision,
        inputs=describe_inputs(small, config),
        limits={dtype: LIMITS[dtype] for dtype in sorted({*dtypes.values()})},
        checks=checks,
        engines=engines_text,
        tools={
            name: importlib.metadata.version(name)
            for name in ("packforcing", "onnxruntime", "polygraphy", "onnx-ir")
        },
        seconds=time.perf_counter() - start,
    )


class ExpectedCall:
    """A recorded call in the dtypes of the bundle's graph, and the oracle's outputs for it."""

    def __init__(self, oracle: Oracle, spec: GraphSpec, call: RecordedCall) -> None:
        self.name, self.inputs = call.name, cast_inputs(spec, call.inputs)
        self.outputs = oracle.run(truncate_context(spec, self.inputs))


def require_memory(*directories: Path) -> None:
    """Check that bundles can be verified, loaded at once, in the memory that is free.

    Raises:
        BackendError: Their weights need more.
    """
    largest_bytes = sum(
        max(
            sum(file.stat().st_size for file in directory.glob(f"{path.name}*"))
            for path in directory.glob("*.onnx")
        )
        for directory in directories
    )
    needed, free = MEMORY_FACTOR * largest_bytes + MEMORY_RESERVE, free_memory()
    if needed > free:
        raise BackendError(
            f"verifying {' and '.join(map(str, directories))} needs {format_memory(needed)} of "
            f"memory and {format_memory(free)} is free: close other programs, or use a machine "
            "with more"
        )


def describe_engines(directory: Path) -> tuple[str, list[str]]:
    """Check a bundle's engines.

    Args:
        directory: The bundle.

    Returns:
        A text about them, and the backends whose engines can run here: none without a GPU.

    Raises:
        BackendError: Engines are damaged, or were built from other graphs.
    """
    built = {
        backend: read_records(directory, backend)
        for backend in ENGINE_BACKENDS
        if all(record_file(directory, backend, graph).exists() for graph in GPU_GRAPHS)
    }
    if not built:
        return "none built, or not all of them", []
    targets = {
        backend: sorted({target for record in records.values() for target in record.key.targets})
        for backend, records in built.items()
    }
    text = ", ".join(f"{backend} for {' '.join(targets[backend])}" for backend in built)
    try:
        gpus()
    except (BackendError, MissingDependency) as error:
        return f"{text}: built from these graphs and intact, not run here ({error})", []
    return f"{text}: run here, on their own shapes", list(built)


def check_calls(
    graph: str,
    path: str,
    spec: GraphSpec,
    limit: ErrorLimit,
    function: GraphFunction,
    calls: list[ExpectedCall],
) -> list[OutputCheck]:
    """Run calls with garbage beyond `kv_len`, twice where there is any, and check the outputs.

    Args:
        graph: Name in the contract.
        path: What computes the graph, as in `OutputCheck.run`.
        spec: The graph's inputs and outputs.
        limit: Of its errors.
        function: Computes it.
        calls: Inputs, and the oracle's outputs.
    """
    checks = []
    for call in calls:
        outputs = repeated = function(add_garbage(spec, call.inputs, SEED))
        if has_unused_context(spec, call.inputs):
            repeated = function(add_garbage(spec, call.inputs, SEED + 1))
        label = (graph, path, call.name)
        checks += compare_outputs(label, limit, call.outputs, outputs, repeated)
    return checks


def execution_paths(
    path: Path, spec: GraphSpec, oracle_spec: GraphSpec, attention: str | None = None
) -> dict[str, Callable[[], GraphFunction]]:
    """Return what computes a graph on the CPU, loaded when it is called, by name.

    ONNX Runtime's CPU provider computes most of an fp16 graph in fp32 and rounds rarely. "rounded"
    is the fp32 graph with every result rounded to fp16: a value beyond the range of fp16, or an
    operation that fp16 is too coarse for, shows there. "softmax, normalized" and "softmax,
    relative" are the fp32 graph with the softmax of fp8 attention rounded, which ONNX cannot say.

    Args:
        path: The ONNX file.
        spec: Its inputs and outputs.
        oracle_spec: The same in fp32.
        attention: dtype of the graph's attention over the context; None: that it computes in.
    """

    def oracle(**rounding: Any) -> GraphFunction:
        return Oracle(path, oracle_spec, **rounding).run

    paths: dict[str, Callable[[], GraphFunction]] = {
        "onnxruntime": lambda: partial(run_graph, OnnxGraph(path, spec, None), spec, HostDevice())
    }
    if is_fp16(spec):
        paths["rounded"] = partial(oracle, round_to_fp16=True)
    for softmax in get_args(Softmax) if attention else ():
        paths[f"softmax, {softmax}"] = partial(oracle, softmax=softmax)
    return paths


def run_graph(graph: LoadedGraph, spec: GraphSpec, device: HostDevice, inputs: Tensors) -> Tensors:
    """Run a loaded graph through arrays that are bound as in the runtime.

    Args:
        graph: A graph or an engine.
        spec: Its inputs and outputs.
        device: Allocates the arrays.
        inputs: By name.

    Returns:
        Outputs by name.
    """
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
    for name, values in inputs.items():
        arrays[name].host[...] = values
    device.upload(*(arrays[tensor.name] for tensor in spec.inputs))
    graph.bind(arrays)()
    device.download(*(arrays[tensor.name] for tensor in spec.outputs))
    return {tensor.name: arrays[tensor.name].host.copy() for tensor in spec.outputs}


def compare_outputs(
    label: tuple[str, str, str],
    limit: ErrorLimit,
    expected: Tensors,
    outputs: Tensors,
    repeated: Tensors,
) -> list[OutputCheck]:
    """Compare the outputs of a call with the oracle's.

    Args:
        label: The graph, what computed it, and the call.
        limit: Of the graph's errors.
        expected: The oracle's outputs by name.
        outputs: The graph's.
        repeated: The graph's with other garbage beyond `kv_len`.
    """
    from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc, SimpleThreshold
    from polygraphy.logger import G_LOGGER

    scales = {
        name: float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))
        for name, array in expected.items()
    }
    limits = {name: output_limit(limit, scales[name], array) for name, array in expected.items()}
    outputs, repeated, expected = (
        {name: array.astype(np.float32) for name, array in tensors.items()}
        for tensors in (outputs, repeated, expected)
    )
    results = RunResults()
    results.add([outputs], runner_name="graph")
    results.add([expected], runner_name="oracle")
    compare_largest = SimpleCompareFunc(
        check_error_stat="max",
        atol={name: limits[name].largest * scale for name, scale in scales.items()},
        rtol=0.0,  # so that the absolute tolerance decides
    )
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(all="ignore"):
        (accuracy,) = Comparator.compare_accuracy(results, compare_func=compare_largest)
    ((by_output,),) = accuracy.values()
    checks = []
    for name, result in by_output.items():
        scale, limit = scales[name], limits[name]
        mean_threshold = SimpleThreshold("mean", limit.mean * scale, 0.0)
        independent = np.array_equal(outputs[name], repeated[name])
        largest, mean = (
            error / (scale or 1.0) if np.isfinite(error) else math.inf
            for error in (result.max_absdiff, result.mean_absdiff)
        )
        within_limits = bool(result) and mean_threshold.passed(result.metric_values())
        checks.append(
            OutputCheck(
                graph=label[0],
                run=label[1],
                call=label[2],
                output=name,
                shape=expected[name].shape,
                scale=scale,
                largest=largest,
                mean=mean,
                share=max(largest / limit.largest, mean / limit.mean),
                independent=independent,
                passed=within_limits and independent,
            )
        )
    return checks


def output_limit(limit: ErrorLimit, scale: float, expected: np.ndarray) -> ErrorLimit:
    """Return the errors that an output may have; a quantized one may differ by rounding besides.

    Args:
        limit: Of the graph.
        scale: RMS of the oracle's output.
        expected: The oracle's output.
    """
    if expected.dtype.itemsize > 1 or not scale:
        return limit
    spacing = 1.0
    if expected.dtype == DTYPES["fp8"]:  # grows with the values
        _, exponent = math.frexp(np.abs(expected).max())
        spacing = 2.0 ** (exponent - 1 - ml_dtypes.finfo(expected.dtype).nmant)
    return ErrorLimit(
        limit.largest + spacing * QUANTIZED_LIMIT.largest / scale,
        limit.mean + spacing * QUANTIZED_LIMIT.mean / scale,
    )


def compute_dtype(graph: str, spec: GraphSpec, config: Config) -> str:
    """Return the dtype that a graph computes in, a key of `LIMITS`; host graphs stay in fp32."""
    products = {config.precision.products, config.precision.attention_products}
    if graph == "denoiser" and products & QUANTIZED_PRODUCTS:
        return max(products & QUANTIZED_PRODUCTS, key=lambda dtype: LIMITS[dtype].largest)
    return "fp16" if is_fp16(spec) else "fp32"


def is_fp16(spec: GraphSpec) -> bool:
    """Tell whether a graph computes in fp16."""
    return DTYPES["fp16"] in {tensor.dtype for tensor in (*spec.inputs, *spec.outputs)}
