"""What a model computes with in rollouts: statistics that scales come from. Memory does not grow
with the rollouts.

Of keys (before RoPE) and values those that a cache keeps, of the calls at t = 0: commits and mid
passes. For each layer, head and channel there are the largest magnitude and a histogram of
magnitudes with bins of equal ratio.

Of what each matrix of a layer is multiplied with, all tokens: for each channel the largest
magnitude by the place of the call in a block (`calls`), and the sums over all calls of the products
of every two channels that an int4 scale is shared over: they tell the error of a matrix's products
from that of its weights. The denoiser itself gives them, as outputs that its graph is given for
this.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from packforcing.calibration.matmuls import NAMES, SHARED, initializer, known, matrices
from packforcing.config import Config
from packforcing.errors import BundleError, CalibrationError, OutputError
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

OCTAVE, LOWEST, BINS = 8, -10, 160  # bins per factor of two; the first begins at 2^LOWEST
# magnitude in the middle of each bin
MIDDLES = np.float32(2) ** ((np.arange(BINS, dtype=np.float32) + 0.5) / OCTAVE + LOWEST)
SOURCE = "source"  # of the file's metadata

Statistics = dict[str, np.ndarray]  # by the names of `forms`


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """What statistics are of."""

    model: str
    denoiser: dict[str, str]  # SHA-256 of its files
    prompts: list[str]  # words, or the SHA-256 of an embedding
    seed: int  # of the first prompt; each next one has the next
    blocks: int  # per prompt
    calls: list[str]  # of the denoiser for a block, by their place in the statistics
    done: int  # prompts that are in the statistics


def calls(config: Config) -> list[str]:
    """The denoiser's calls for a block, in order."""
    steps = max(len(config.timesteps), len(config.first_timesteps))
    return [*(f"step {step + 1}" for step in range(steps)), "commit", "mid pass"]


def forms(config: Config) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each array of the statistics: k and v by layer, head and channel; what a
    matrix of a layer reads by call, layer and channel, and by layer and two channels of a block;
    and how many tokens each call had."""
    channels = (config.layers, config.heads, config.head_dim)
    places = len(calls(config))
    found: dict[str, tuple[tuple[int, ...], str]] = {"tokens": ((places,), "int64")}
    for kind in "kv":
        found[f"{kind}.largest"] = channels, "float32"
        found[f"{kind}.counts"] = (*channels, BINS), "uint32"
    for name, (inputs, outputs) in zip(NAMES, layer_matrices(config)):
        if name not in SHARED:
            block = weight_block("int4", inputs, outputs)
            moments = config.layers, inputs // block, block, block
            found[f"{name}.largest"] = (places, config.layers, inputs), "float32"
            found[f"{name}.moments"] = moments, "float32"
    return found


def calibrate(
    directory: str | Path,
    prompts: Sequence[str | np.ndarray],
    path: str | Path,
    *,
    seconds: float = 5.0,
    seed: int = 0,
    on_block: Callable[[int, int], None] | None = None,
) -> Source:
    """Rolls a bundle out on every prompt and writes the statistics, after each of them.

    prompts: words or embeddings, float [T, text_dim]. A file that holds part of the same
    rollouts is gone on with. `on_block` is told how many blocks are done, and of how many. Raises
    `CalibrationError` for a bundle that is quantised, for what is no number or a file of other
    rollouts, and what opening a bundle and reading a prompt raise, or `OutputError`.
    """
    directory, path = Path(directory), Path(path)
    manifest = read_manifest(directory)
    config = manifest.config
    for what in ("weights", "cache"):
        kind = getattr(config.precision, what)
        if kind != config.precision.compute:
            raise CalibrationError(
                f"{directory} has {what} in {kind} already; name the bundle that it was made of"
            )
    if not prompts:
        raise CalibrationError("no prompts to roll out: name one per line")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {path.parent}")
    timelines = [
        check_request(config, prompt, seconds, seed + i) for i, prompt in enumerate(prompts)
    ]
    names = [
        prompt if isinstance(prompt, str) else hashlib.sha256(prompt.tobytes()).hexdigest()
        for prompt in prompts
    ]
    texts = [timeline.embeddings[0] for timeline in timelines]
    blocks = config.blocks(config.frames(seconds))
    source = Source(
        model=config.name,
        denoiser=graph_files(manifest, "denoiser"),
        prompts=names,
        seed=seed,
        blocks=blocks,
        calls=calls(config),
        done=0,
    )
    found = {name: np.zeros(*form) for name, form in forms(config).items()}
    if path.exists():
        begun, found = read(path)
        if msgspec.structs.replace(begun, done=0) != source:
            raise CalibrationError(
                f"{path} holds statistics of another model or other prompts; choose another name"
            )
        _check_forms(path, found, config)
        source = begun
    policy = config.policy.fit_to_video(blocks, config.policy)
    config = msgspec.structs.replace(config, policy=policy)
    backend = open_backend("onnxruntime", directory, manifest, config, None)
    try:
        del backend.graphs["denoiser"]  # the one that takes its place holds the same weights
        watched = _Watched(directory / graph_file("denoiser"), config, found)
        backend.graphs["denoiser"] = watched
        rollout = Rollout(config, backend)
        for number in range(source.done, len(prompts)):
            rollout.begin(texts[number], blocks, seed + number)
            for block in range(blocks):
                watched.where = f"block {block} of '{names[number]}'"
                rollout.next_block()
                if on_block:
                    on_block(number * blocks + block + 1, len(prompts) * blocks)
            source = msgspec.structs.replace(source, done=number + 1)
            _write(path, source, found)
    finally:
        backend.close()
    return source


def statistics_for(path: str | Path, manifest: Manifest) -> Statistics:
    """Statistics of a bundle's denoiser, whole; raises `CalibrationError` for others."""
    source, found = read(path)
    if source.denoiser != graph_files(manifest, "denoiser"):
        raise CalibrationError(
            f"{path} holds statistics of another model (a {source.model}) than the bundle's "
            f"{manifest.config.name}; make them with 'packforcing calibrate'"
        )
    if source.done < len(source.prompts):
        raise CalibrationError(
            f"{path} holds {source.done} of {len(source.prompts)} rollouts; run the same "
            "'packforcing calibrate' again to go on"
        )
    _check_forms(path, found, manifest.config)
    return found


def _check_forms(path: str | Path, found: Statistics, config: Config) -> None:
    if {name: (array.shape, array.dtype.name) for name, array in found.items()} != forms(config):
        raise CalibrationError(
            f"{path} does not hold what it says; make it anew with 'packforcing calibrate'"
        )


def read(path: str | Path) -> tuple[Source, Statistics]:
    """A file of statistics; raises `CalibrationError`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            said = (file.metadata() or {}).get(SOURCE, "")
            source = msgspec.json.decode(said, type=Source)
            return source, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, msgspec.DecodeError) as error:
        raise CalibrationError(
            f"cannot read statistics from {path}: {error}; make them with 'packforcing calibrate'"
        ) from error


def add(found: Statistics, kind: str, layer: int, tokens: np.ndarray) -> None:
    """Adds tokens [H, n, d] of keys or values ("k" or "v") of a layer.

    Raises `ValueError` for one that is no number.
    """
    heads, _, size = tokens.shape
    magnitude = np.abs(tokens, dtype=np.float32)
    largest = magnitude.max(1)
    if not np.isfinite(largest).all():
        head, channel = np.argwhere(~np.isfinite(largest))[0]
        raise ValueError(f"{kind} of layer {layer}, head {head}, channel {channel}")
    all_largest = found[f"{kind}.largest"][layer]
    np.maximum(all_largest, largest, out=all_largest)
    with np.errstate(divide="ignore"):
        bins = np.clip((np.log2(magnitude) - LOWEST) * OCTAVE, 0, BINS - 1).astype(np.int64)
    bins += np.arange(heads * size).reshape(heads, 1, size) * BINS
    found[f"{kind}.counts"][layer] += np.bincount(
        bins.ravel(), minlength=heads * size * BINS
    ).reshape(heads, size, BINS).astype(np.uint32)  # fmt: skip


def add_inputs(found: Statistics, place: int, name: str, values: np.ndarray) -> None:
    """Adds what a call gave of a matrix's input: an output of `observed` and its values.

    Raises `ValueError` for one that is no number.
    """
    key, _, layer = name.rpartition(".")
    if key.endswith(".largest"):
        total = found[key][place, int(layer)]
        np.maximum(total, values, out=total)
        return
    squares = values.diagonal(axis1=1, axis2=2).ravel()
    if not np.isfinite(squares).all():
        channel = np.argwhere(~np.isfinite(squares))[0, 0]
        matrix = f"blocks.{layer}.{key.rpartition('.')[0]}"
        raise ValueError(f"channel {channel} of what {matrix} is multiplied with")
    found[key][int(layer)] += values


def observed(path: Path, config: Config) -> tuple[bytes, tuple[TensorSpec, ...]]:
    """A denoiser's graph that also gives what its layers' matrices are multiplied with, summed up:
    the products of every two channels of a block, float32 [inputs / block, block, block], and the
    largest magnitudes [inputs].

    Returns it and these outputs, self_attn.q.moments.0 and so on. Raises `BundleError` for a
    denoiser of other matrices than its config calls for.
    """
    model = ir.load(path)
    graph, outputs, whole = model.graph, [], forms(config)
    axes = initializer(graph, "observed.axes", ir.tensor([0, 1], dtype=ir.DataType.INT64))
    products = matrices(graph, config, range(config.layers))
    for name, product in products.items():
        _, layer, matrix = name.split(".", 2)
        given = known(product.inputs[0])
        if matrix in SHARED:
            if given is not products[f"blocks.{layer}.{SHARED[matrix]}"].inputs[0]:
                raise BundleError(f"{path}: {name} has an input of its own; export the bundle anew")
            continue
        exact = ir.node("Cast", [given], {"to": int(ir.DataType.FLOAT)})
        magnitude = ir.node("Abs", exact.outputs)
        largest = ir.node("ReduceMax", [*magnitude.outputs, axes], {"keepdims": 0})
        (inputs,), moments = whole[f"{matrix}.largest"][0][2:], whole[f"{matrix}.moments"][0][1:]
        form = initializer(
            graph,
            f"observed.{matrix}.{layer}",
            ir.tensor([-1, *moments[:2]], dtype=ir.DataType.INT64),
        )
        split = ir.node("Reshape", [*exact.outputs, form])
        (parts,) = split.outputs
        summed = ir.node("Einsum", [parts, parts], {"equation": "nib,nic->ibc"})
        graph.insert_before(product, [exact, magnitude, largest, split, summed])
        for what, node, shape in (("largest", largest, (inputs,)), ("moments", summed, moments)):
            (value,) = node.outputs
            spec = TensorSpec(f"{matrix}.{what}.{layer}", shape)
            value.name, value.dtype = spec.name, ir.DataType.FLOAT
            value.shape = ir.Shape(spec.shape)
            graph.outputs.append(value)
            outputs.append(spec)
    return ir.to_proto(model).SerializeToString(), tuple(outputs)


def mean_products(found: Statistics, layer: int, matrix: str) -> np.ndarray:
    """Of every two channels in a block of those that a matrix is multiplied with, over all calls,
    float32 [inputs / block, block, block]."""
    sums = found[f"{SHARED.get(matrix, matrix)}.moments"][layer]
    return sums / np.float32(found["tokens"].sum())


def largest_input(found: Statistics, layer: int, matrix: str) -> float:
    """The largest magnitude that a matrix is multiplied with."""
    return float(found[f"{SHARED.get(matrix, matrix)}.largest"][:, layer].max())


class _Watched:
    """A denoiser whose calls are added to the statistics."""

    def __init__(self, path: Path, config: Config, found: Statistics) -> None:
        self.config, self.found, self.where, self.step = config, found, "", 0
        self.seconds = 0.0
        model, self.extra = observed(path, config)
        spec = contract(config)["denoiser"]
        spec = GraphSpec(spec.inputs, (*spec.outputs, *self.extra))
        self.graph = OnnxGraph(path, spec, None, model=model)

    def bind(self, arrays: Arrays) -> Callable[[], None]:
        host, tokens = HostDevice(), arrays["tokens"].shape[1]
        seen = {
            tensor.name: host.allocate(
                "statistics", tuple(map(int, tensor.shape)), tensor.dtype, host=True
            )
            for tensor in self.extra
        }
        call = self.graph.bind({**arrays, **seen})

        def run() -> None:
            call()
            clean = view(arrays["timestep"])[0] == 0
            place = self._place(clean, tokens)
            try:
                self.found["tokens"][place] += tokens
                for name, array in seen.items():
                    add_inputs(self.found, place, name, array.host)
                for layer in range(self.config.layers if clean else 0):
                    for kind in "kv":
                        add(self.found, kind, layer, view(arrays[f"{kind}_new.{layer}"])[0])
            except ValueError as error:
                raise CalibrationError(
                    f"no number in {calls(self.config)[place]} of {self.where}: {error}; the "
                    "bundle is not sound, try 'packforcing verify'"
                ) from error

        return run

    def _place(self, clean: bool, tokens: int) -> int:
        """Where a call stands among those of its block, as `calls` lists them."""
        if clean:
            self.step = 0
            return -2 if tokens == self.config.block_tokens else -1
        self.step += 1
        return self.step - 1


def _write(path: Path, source: Source, found: Statistics) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        save_file(found, partial, {SOURCE: msgspec.json.encode(source).decode()})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
