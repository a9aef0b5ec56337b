"""Collect activation statistics of rollouts, which scales are fitted to.

Memory does not grow with the number of rollouts. The statistics are

- of the keys (before RoPE) and values that a cache stores, in the calls that yield them (commits,
  or last steps under a policy without commits, and mid passes): per layer, head and channel the
  largest magnitude, and a histogram of magnitudes whose bins have edges of equal ratio;
- of what attention over the context reads, in all calls: per layer, head and channel the largest
  magnitude of queries and keys after RoPE and of values, new and context;
- of the input of each matrix of a layer, in all calls: per channel the largest magnitude, by the
  place of the call in a block (`call_names`); and summed over all calls, the second moments of
  every two channels that share an int4 scale. The error of a matrix's outputs follows from these
  and the error of its weights. The denoiser's graph computes them as additional outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from packforcing.calibration.matmuls import (
    MATRIX_NAMES,
    SHARED_INPUTS,
    add_initializer,
    layer_matmuls,
    not_none,
)
from packforcing.config import Config
from packforcing.errors import BundleError, CalibrationError, OutputError
from packforcing.export.attention import context_attentions
from packforcing.files import new_file
from packforcing.geometry import layer_matrices
from packforcing.runtime.backends import open_backend
from packforcing.runtime.backends.onnxruntime import OnnxGraph
from packforcing.runtime.buffers import Arrays
from packforcing.runtime.bundle import (
    GraphSpec,
    Manifest,
    TensorSpec,
    contract,
    graph_file,
    read_manifest,
)
from packforcing.runtime.device import HostDevice, view
from packforcing.runtime.engine_records import graph_files
from packforcing.runtime.estimate import weight_block
from packforcing.runtime.request import check_request
from packforcing.runtime.rollout import Rollout
from packforcing.sampler import denoising_steps

BINS, BINS_PER_OCTAVE, LOWEST_EXPONENT = 160, 8, -10  # the first bin begins at 2^LOWEST_EXPONENT
BIN_MAGNITUDES = np.float32(2) ** (  # in the middle of each bin
    (np.arange(BINS, dtype=np.float32) + 0.5) / BINS_PER_OCTAVE + LOWEST_EXPONENT
)
SOURCE_KEY = "source"  # in the file's metadata
ATTENTION_OPERANDS = ("attention.q", "attention.k", "attention.v")  # in the order of its inputs

Statistics = dict[str, np.ndarray]  # by the names of `array_specs`


class StatisticsSource(msgspec.Struct, frozen=True, kw_only=True):
    """The rollouts that statistics are of."""

    model: str
    denoiser: dict[str, str]  # SHA-256 of its files
    prompts: list[str]  # words, or the SHA-256 of an embedding
    seed: int  # of the first prompt; each next prompt has the next seed
    blocks: int  # per prompt
    calls: list[str]  # `call_names`
    done: int  # prompts that are in the statistics


def call_names(config: Config) -> list[str]:
    """Return the denoiser's calls for a block, in order."""
    steps = max(len(config.timesteps), len(config.first_timesteps))
    commit = ["commit"] if config.policy.commit == "clean" else []
    return [*(f"step {step + 1}" for step in range(steps)), *commit, "mid pass"]


def array_specs(config: Config) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of each array of the statistics, by name.

    - "tokens": number of tokens [call].
    - "k.largest", "v.largest": [layer, head, channel].
    - "attention.q.largest", k and v: [layer, head, channel].
    - "k.counts", "v.counts": histograms [layer, head, channel, bin].
    - "ffn.0.largest" and so on: [call, layer, channel].
    - "ffn.0.moments" and so on: [layer, group, channel, channel].
    """
    channels = (config.layers, config.heads, config.head_dim)
    calls = len(call_names(config))
    specs: dict[str, tuple[tuple[int, ...], str]] = {"tokens": ((calls,), "int64")}
    for kind in "kv":
        specs[f"{kind}.largest"] = channels, "float32"
        specs[f"{kind}.counts"] = (*channels, BINS), "uint32"
    specs |= {f"{operand}.largest": (channels, "float32") for operand in ATTENTION_OPERANDS}
    for name, (inputs, outputs) in zip(MATRIX_NAMES, layer_matrices(config)):
        if name not in SHARED_INPUTS:
            group = weight_block("int4", inputs, outputs)
            moments = config.layers, inputs // group, group, group
            specs[f"{name}.largest"] = (calls, config.layers, inputs), "float32"
            specs[f"{name}.moments"] = moments, "float32"
    return specs


def calibrate(
    directory: str | Path,
    prompts: Sequence[str | np.ndarray],
    path: str | Path,
    *,
    seconds: float = 5.0,
    seed: int = 0,
    on_block: Callable[[int, int], None] | None = None,
) -> StatisticsSource:
    """Roll a bundle out on every prompt; write the statistics after each of them.

    A file with the statistics of some of these rollouts is resumed.

    Args:
        directory: A bundle that is not quantized.
        prompts: Words, or embeddings, float [T, text_dim].
        path: The file to write, safetensors.
        seconds: Length of each video.
        seed: Seed of the first prompt; each next prompt has the next seed.
        on_block: Called with the number of blocks that are done and that of all blocks.

    Returns:
        What the statistics are of.

    Raises:
        CalibrationError: The bundle is quantized, an activation is NaN or infinite, or the file
            has statistics of other rollouts.
        BundleError: The bundle is damaged.
        PromptError: A prompt cannot be used.
        OutputError: The file cannot be written.
    """
    directory, path = Path(directory), Path(path)
    manifest = read_manifest(directory)
    config = manifest.config
    for part in ("weights", "cache", "attention"):
        dtype = getattr(config.precision, part)
        if dtype not in (config.precision.compute, None):
            raise CalibrationError(
                f"{directory} has {part} in {dtype} already; name the bundle that it was made from"
            )
    if not prompts:
        raise CalibrationError("no prompts to roll out: name one per line")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {path.parent}")
    timelines = [
        check_request(config, prompt, seconds, seed + index) for index, prompt in enumerate(prompts)
    ]
    names = [
        prompt if isinstance(prompt, str) else hashlib.sha256(prompt.tobytes()).hexdigest()
        for prompt in prompts
    ]
    texts = [timeline.embeddings[0] for timeline in timelines]
    blocks = config.blocks(config.frames(seconds))
    source = StatisticsSource(
        model=config.name,
        denoiser=graph_files(manifest, "denoiser"),
        prompts=names,
        seed=seed,
        blocks=blocks,
        calls=call_names(config),
        done=0,
    )
    statistics = {name: np.zeros(*spec) for name, spec in array_specs(config).items()}
    if path.exists():
        resumed, statistics = read_statistics(path)
        if msgspec.structs.replace(resumed, done=0) != source:
            raise CalibrationError(
                f"{path} holds statistics of another model or other prompts; choose another name"
            )
        _check_specs(path, statistics, config)
        source = resumed
    policy = config.policy.fit_to_video(blocks, config.policy)
    config = msgspec.structs.replace(config, policy=policy)
    backend = open_backend("onnxruntime", directory, manifest, config, None)
    try:
        del backend.graphs["denoiser"]  # its replacement holds the same weights
        denoiser = _ObservedDenoiser(directory / graph_file("denoiser"), config, statistics)
        backend.graphs["denoiser"] = denoiser
        rollout = Rollout(config, backend)
        for index in range(source.done, len(prompts)):
            rollout.begin(texts[index], blocks, seed + index)
            for block in range(blocks):
                denoiser.begin_block(block, names[index])
                rollout.next_block()
                if on_block:
                    on_block(index * blocks + block + 1, len(prompts) * blocks)
            source = msgspec.structs.replace(source, done=index + 1)
            _write_statistics(path, source, statistics)
    finally:
        backend.close()
    return source


def load_statistics(path: str | Path, manifest: Manifest) -> Statistics:
    """Read the complete statistics of a bundle's denoiser.

    Args:
        path: A file that `calibrate` wrote.
        manifest: The bundle's.

    Raises:
        CalibrationError: The file cannot be read, or holds statistics of another model or of only
            some of its rollouts.
    """
    source, statistics = read_statistics(path)
    if source.denoiser != graph_files(manifest, "denoiser"):
        raise CalibrationError(
            f"{path} holds statistics of another model (a {source.model}) than the bundle's "
            f"{manifest.config.name}; make them with 'packforcing calibrate'"
        )
    if source.done < len(source.prompts):
        raise CalibrationError(
            f"{path} holds {source.done} of {len(source.prompts)} rollouts; run the same "
            "'packforcing calibrate' again to complete it"
        )
    _check_specs(path, statistics, manifest.config)
    return statistics


def _check_specs(path: str | Path, statistics: Statistics, config: Config) -> None:
    specs = {name: (array.shape, array.dtype.name) for name, array in statistics.items()}
    expected = array_specs(config)
    if not any(name.startswith("attention.") for name in specs):  # they were added later
        expected = {name: spec for name, spec in expected.items() if "attention." not in name}
    if specs != expected:
        raise CalibrationError(
            f"{path} has other arrays than its metadata states; make it again with "
            "'packforcing calibrate'"
        )


def read_statistics(path: str | Path) -> tuple[StatisticsSource, Statistics]:
    """Read a file of statistics, complete or not.

    Raises:
        CalibrationError: The file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            metadata = (file.metadata() or {}).get(SOURCE_KEY, "")
            source = msgspec.json.decode(metadata, type=StatisticsSource)
            return source, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, msgspec.DecodeError) as error:
        raise CalibrationError(
            f"cannot read statistics from {path}: {error}; make them with 'packforcing calibrate'"
        ) from error


def _write_statistics(path: Path, source: StatisticsSource, statistics: Statistics) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        with new_file(path) as partial:
            save_file(statistics, partial, {SOURCE_KEY: msgspec.json.encode(source).decode()})
    except SafetensorError as error:
        raise OutputError(f"cannot write {path}: {error}") from error


def add_cache_tokens(statistics: Statistics, kind: str, layer: int, tokens: np.ndarray) -> None:
    """Add keys or values to the statistics, in place.

    Args:
        statistics: Changed.
        kind: "k" or "v".
        layer: Index of the layer.
        tokens: Keys before RoPE, or values, float [H, n, d].

    Raises:
        ValueError: A value is NaN or infinite; the message says which.
    """
    heads, _, size = tokens.shape
    magnitudes = np.abs(tokens, dtype=np.float32)
    largest = magnitudes.max(1)
    if not np.isfinite(largest).all():
        head, channel = np.argwhere(~np.isfinite(largest))[0]
        raise ValueError(f"{kind} of layer {layer}, head {head}, channel {channel}")
    total = statistics[f"{kind}.largest"][layer]
    np.maximum(total, largest, out=total)
    with np.errstate(divide="ignore"):
        bins = (np.log2(magnitudes) - LOWEST_EXPONENT) * BINS_PER_OCTAVE
    bins = np.clip(bins, 0, BINS - 1).astype(np.int64)
    bins += np.arange(heads * size).reshape(heads, 1, size) * BINS
    statistics[f"{kind}.counts"][layer] += np.bincount(
        bins.ravel(), minlength=heads * size * BINS
    ).reshape(heads, size, BINS).astype(np.uint32)  # fmt: skip


def add_observed(statistics: Statistics, call: int, name: str, values: np.ndarray) -> None:
    """Add an additional output of an observed denoiser to the statistics, in place.

    Args:
        statistics: Changed.
        call: Index in `call_names`.
        name: Name of the output, like "ffn.0.moments.3".
        values: The output.

    Raises:
        ValueError: A value is NaN or infinite; the message says which.
    """
    key, _, layer = name.rpartition(".")
    operand, _, kind = key.rpartition(".")
    if kind == "largest":
        # NaN among these shows in the moments, too
        place = (int(layer),) if operand in ATTENTION_OPERANDS else (call, int(layer))
        total = statistics[key][place]
        np.maximum(total, values, out=total)
        return
    squares = values.diagonal(axis1=1, axis2=2).ravel()
    if not np.isfinite(squares).all():
        channel = np.argwhere(~np.isfinite(squares))[0, 0]
        matrix = f"blocks.{layer}.{operand}"
        raise ValueError(f"input channel {channel} of {matrix}")
    statistics[key][int(layer)] += values


def observed_denoiser(path: Path, config: Config) -> tuple[bytes, tuple[TensorSpec, ...]]:
    """Add outputs to a denoiser's graph: statistics of what matrices and attention read.

    Args:
        path: The graph's ONNX file.
        config: Its model.

    Returns:
        The serialized graph, and its additional outputs. "ffn.0.moments.3" is the sum over tokens
        of the products of every two channels of a group, float32 [group, channel, channel];
        "ffn.0.largest.3" the largest magnitudes, float32 [inputs]; "attention.q.largest.3" those
        of queries, float32 [head, channel].

    Raises:
        BundleError: The denoiser's matrices are not those of the model.
    """
    model = ir.load(path)
    graph, outputs, specs = model.graph, [], array_specs(config)
    axes = add_initializer(graph, "observed.axes", ir.tensor([0, 1], dtype=ir.DataType.INT64))
    tokens = add_initializer(graph, "observed.tokens", ir.tensor([0, 2], dtype=ir.DataType.INT64))

    def observe(node: ir.Node, spec: TensorSpec) -> None:
        (value,) = node.outputs
        value.name, value.dtype, value.shape = spec.name, ir.DataType.FLOAT, ir.Shape(spec.shape)
        graph.outputs.append(value)
        outputs.append(spec)

    for index, attention in enumerate(context_attentions(graph)):
        for operand, value in zip(ATTENTION_OPERANDS, attention.inputs):
            wide = ir.node("Cast", [not_none(value)], {"to": int(ir.DataType.FLOAT)})
            magnitudes = ir.node("Abs", wide.outputs)
            largest = ir.node("ReduceMax", [*magnitudes.outputs, tokens], {"keepdims": 0})
            graph.insert_before(attention, [wide, magnitudes, largest])
            size = specs[f"{operand}.largest"][0][1:]
            observe(largest, TensorSpec(f"{operand}.largest.{index}", size))
    matmuls = layer_matmuls(graph, config, range(config.layers))
    for name, matmul in matmuls.items():
        _, layer, matrix = name.split(".", 2)
        inputs = not_none(matmul.inputs[0])
        if matrix in SHARED_INPUTS:
            if inputs is not matmuls[f"blocks.{layer}.{SHARED_INPUTS[matrix]}"].inputs[0]:
                raise BundleError(
                    f"{path}: {name} has an input of its own; export the bundle again"
                )
            continue
        wide = ir.node("Cast", [inputs], {"to": int(ir.DataType.FLOAT)})
        magnitudes = ir.node("Abs", wide.outputs)
        largest = ir.node("ReduceMax", [*magnitudes.outputs, axes], {"keepdims": 0})
        channels = specs[f"{matrix}.largest"][0][2:]
        moments = specs[f"{matrix}.moments"][0][1:]
        shape = add_initializer(
            graph,
            f"observed.{matrix}.{layer}",
            ir.tensor([-1, *moments[:2]], dtype=ir.DataType.INT64),
        )
        grouped = ir.node("Reshape", [*wide.outputs, shape])
        (groups,) = grouped.outputs
        products = ir.node("Einsum", [groups, groups], {"equation": "nib,nic->ibc"})
        graph.insert_before(matmul, [wide, magnitudes, largest, grouped, products])
        observe(largest, TensorSpec(f"{matrix}.largest.{layer}", channels))
        observe(products, TensorSpec(f"{matrix}.moments.{layer}", moments))
    return ir.to_proto(model).SerializeToString(), tuple(outputs)


def second_moments(statistics: Statistics, layer: int, matrix: str) -> np.ndarray:
    """Return the second moments of a matrix's inputs, over all calls.

    Args:
        statistics: Of a model.
        layer: Index of the layer.
        matrix: One of `MATRIX_NAMES`.

    Returns:
        The mean product of every two channels of a group, float32 [group, channel, channel].
    """
    sums = statistics[f"{SHARED_INPUTS.get(matrix, matrix)}.moments"][layer]
    return sums / np.float32(statistics["tokens"].sum())


def largest_inputs(statistics: Statistics, layer: int, matrix: str) -> np.ndarray:
    """Return the largest magnitude of each of a matrix's inputs over all calls, [inputs]."""
    return statistics[f"{SHARED_INPUTS.get(matrix, matrix)}.largest"][:, layer].max(0)


class _ObservedDenoiser:
    """A denoiser that adds each of its calls to the statistics."""

    def __init__(self, path: Path, config: Config, statistics: Statistics) -> None:
        self.config, self.statistics = config, statistics
        self.seconds = 0.0  # of `Bindable`
        model, self.observed = observed_denoiser(path, config)
        spec = contract(config)["denoiser"]
        spec = GraphSpec(spec.inputs, (*spec.outputs, *self.observed))
        self.graph = OnnxGraph(path, spec, None, model=model)

    def begin_block(self, block: int, prompt: str) -> None:
        """Note the block and the prompt of the calls that follow."""
        self.location = f"block {block} of '{prompt}'"
        self.step, self.steps = 0, len(denoising_steps(self.config, block))

    def bind(self, arrays: Arrays) -> Callable[[], None]:
        host, tokens = HostDevice(), arrays["tokens"].shape[1]
        observed = {
            tensor.name: host.allocate(
                "statistics", tuple(map(int, tensor.shape)), tensor.dtype, host=True
            )
            for tensor in self.observed
        }
        call_graph = self.graph.bind({**arrays, **observed})

        def call() -> None:
            call_graph()
            is_clean = view(arrays["timestep"])[0] == 0
            index = self._call_index(is_clean, tokens)
            commits = is_clean or (
                self.config.policy.commit == "last-step" and self.step == self.steps
            )
            try:
                self.statistics["tokens"][index] += tokens
                for name, array in observed.items():
                    add_observed(self.statistics, index, name, array.host)
                for layer in range(self.config.layers if commits else 0):
                    for kind in "kv":
                        new = view(arrays[f"{kind}_new.{layer}"])[0]
                        add_cache_tokens(self.statistics, kind, layer, new)
            except ValueError as error:
                raise CalibrationError(
                    f"NaN or infinity in {call_names(self.config)[index]} of {self.location}: "
                    f"{error}; check the bundle with 'packforcing verify'"
                ) from error

        return call

    def _call_index(self, is_clean: bool, tokens: int) -> int:
        """Return the index of a call in `call_names`."""
        if is_clean:
            return -2 if tokens == self.config.block_tokens else -1
        self.step += 1
        return self.step - 1
