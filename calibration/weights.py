"""Quantised bundles: standard ONNX, small numbers with a DequantizeLinear before each product.

A weight [inputs, outputs] becomes int8, int4 or fp8 with a scale per output channel [outputs] or
per block [inputs / block, outputs]; the node's output is what the MatMul had before. No weight is
read before its matrix is at work, and the small numbers are made while they are written, so memory
stays small whatever the size of the model. In int4 each feed-forward layer becomes a sum of two:
`halve`. What fp8 weights are multiplied with is rounded to fp8 as well, with a fixed scale per
tensor, so that the product can be made in fp8.

A cache in 8 bits has fixed scales per layer, head and channel; the two channels of a RoPE pair of
a key share one. New keys and values are divided by them, rounded and handed out. Values of the
context are multiplied by them as they are read. Keys stay divided, the context's and the block's
own, and queries, which are fewer, are multiplied instead: the product is the same, and a scale that
a pair shares commutes with its rotation. A block's own keys and values are not rounded for itself.
Q/DQ nodes know scales along one axis only, so theirs is 1 and the scale is a product of its own.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import msgspec
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from packforcing.calibration.activations import (
    MIDDLES,
    Statistics,
    largest_input,
    mean_products,
    statistics_for,
)
from packforcing.calibration.matmuls import SHARED, initializer, known, matrices, stored
from packforcing.calibration.recipes import (
    ACTIVATIONS,
    CACHE,
    SNR,
    WEIGHTS,
    Recipe,
    quantised_layers,
)
from packforcing.errors import BundleError, CalibrationError, ConfigError
from packforcing.export.exporter import new_bundle, save_graph, write_bundle_manifest
from packforcing.export.lint import lint
from packforcing.runtime.bundle import check_files, contract, graph_file, read_manifest
from packforcing.runtime.estimate import INT4_BLOCK, weight_block

DENOISER = graph_file("denoiser")
# Keys are divided by their steps in fp16, which ends at 65,504. So even in the head's smallest
# channel one may be 4 times as large as the largest that was seen in any of int8, twice in fp8.
WIDEST = 64
ROTATION = "RotaryEmbedding"


class Quantised(msgspec.Struct, frozen=True, kw_only=True):
    """What `quantize_bundle` did: signal-to-noise ratio of every matrix in dB, worst first, and
    bytes of the denoiser before and after. With statistics the ratio is of what the matrix gives,
    without of its weights."""

    snr: dict[str, float]
    before: int
    after: int


def quantize_bundle(
    source: str | Path,
    directory: str | Path,
    weights: Literal["int8", "int4", "fp8"] | None = None,
    cache: Literal["int8", "fp8"] | None = None,
    calibration: str | Path | None = None,
    on_matrix: Callable[[int, int], None] | None = None,
) -> Quantised:
    """Writes the bundle `source` with quantised weights, a quantised cache or both into
    `directory`, whole or not at all.

    calibration: statistics of `source`, for the cache and for weights: fp8 ones need them, others
    are fitted to what they are multiplied with, where they are given. `on_matrix` is told how many
    matrices are done, and of how many. Raises `BundleError` for a damaged bundle, a weight that is
    no number, or a denoiser of other matrices than its config calls for, `ConfigError` for nothing
    to do or a bundle that is quantised already, `CalibrationError` for statistics that are missing
    or of another model and `OutputError` if the folder cannot be written.
    """
    source = Path(source)
    manifest = read_manifest(source)
    config = manifest.config
    asked = {"weights": weights, "cache": cache}
    asked = {what: kind for what, kind in asked.items() if kind}
    if not asked:
        raise ConfigError("nothing to quantise: name --weights, --cache or both")
    for what in asked:
        if getattr(config.precision, what) != config.precision.compute:
            raise ConfigError(
                f"{source} has {what} in {getattr(config.precision, what)} already; name the "
                "bundle that it was made of"
            )
    if calibration is None and (cache or weights == "fp8"):
        needs = "a quantised cache needs to know its keys and values"
        if not cache:
            needs = "fp8 needs to know what weights are multiplied with"
        raise CalibrationError(
            f"{needs}: make a file with 'packforcing calibrate' and name it with --calibration"
        )
    if Path(directory).resolve() == source.resolve():
        raise ConfigError(f"{directory} is the bundle to be quantised; choose another folder")
    found = statistics_for(calibration, manifest) if calibration else None
    steps = cache_steps(found, CACHE[cache]) if found and cache else {}
    layers = quantised_layers(config)
    if weights and not layers:
        raise ConfigError(f"{config.name} has no layer between its first and its last")
    check_files(source, manifest)
    config = msgspec.structs.replace(
        config, precision=msgspec.structs.replace(config.precision, **asked)
    )
    with new_bundle(directory, sum(record.bytes for record in manifest.files.values())) as folder:
        for name in manifest.files:
            if not name.startswith(DENOISER):
                shutil.copyfile(source / name, folder / name)
        model = ir.load(source / DENOISER)
        products = matrices(model.graph, config, layers) if weights else {}
        if weights == "int4":
            products = halve(products)
        snr = {}
        for number, (name, product) in enumerate(products.items()):
            read = what_it_reads(found, name, product) if found else None
            try:
                snr[name] = quantize_product(product, name, config.precision.weights, read)
            except ValueError as error:
                raise BundleError(f"{source / DENOISER}: {error}") from error
            if on_matrix:
                on_matrix(number + 1, len(products))
        if weights in ACTIVATIONS and found:
            quantize_inputs(products, found, ACTIVATIONS[weights])
        for kind, by_layer in steps.items():
            for layer, step in enumerate(by_layer):
                names = f"{kind}_new.{layer}", f"{kind}_ctx.{layer}"
                quantize_cache(model.graph, *names, step, config.precision.cache)
        common.RemoveUnusedNodesPass()(model)  # what was read before, casts of it included
        lint("denoiser", model, contract(config)["denoiser"])
        save_graph(model, folder / DENOISER)
        worst_first = dict(sorted(snr.items(), key=lambda item: item[1]))
        if snr:
            (folder / SNR).write_bytes(msgspec.json.format(msgspec.json.encode(worst_first)))
        write_bundle_manifest(folder, config, manifest.tools)
        sizes = [
            sum(path.stat().st_size for path in where.glob(f"{DENOISER}*"))
            for where in (source, folder)
        ]
    return Quantised(snr=worst_first, before=sizes[0], after=sizes[1])


def what_it_reads(found: Statistics, name: str, product: ir.Node) -> np.ndarray:
    """Mean products of what a product's matrix is multiplied with, by statistics: as
    `mean_products` gives them, of the half of the channels that a halved one has.

    Raises `CalibrationError` if that was zero throughout.
    """
    _, layer, matrix = name.split(".", 2)
    matrix, _, half = matrix.partition(".half")
    mean = mean_products(found, int(layer), matrix)
    if not mean.any():
        raise CalibrationError(
            f"what {name} is multiplied with was zero throughout: calibrate with more prompts, or "
            "check the model's weights"
        )
    blocks = known(known(product.inputs[1]).shape).numpy()[0] // mean.shape[-1]
    return mean[-blocks:] if half == "1" else mean[:blocks]


def halve(products: dict[str, ir.Node]) -> dict[str, ir.Node]:
    """Makes each feed-forward layer a sum of two; returns the products that there are then.

    gelu(x A + a) B is gelu(x A1 + a1) B1 + gelu(x A2 + a2) B2, where A1 and A2 are columns of A,
    B1 and B2 rows of B: exact but for the order of the sum, and int4 numbers stay the same, since B
    is cut between two blocks. A whole A is written out in fp16, into scratch, by TensorRT-RTX 1.7.
    What is not at least two blocks wide stays whole.
    """
    found = dict(products)
    for name, second in products.items():
        inner, outputs = known(known(second.inputs[1]).shape).numpy()
        cut = -(-inner // 2 // INT4_BLOCK) * INT4_BLOCK
        whole_blocks = weight_block("int4", inner, outputs) == INT4_BLOCK
        if not (name.endswith("ffn.2") and whole_blocks and cut < inner):
            continue
        widens = name.replace("ffn.2", "ffn.0")
        first, graph, whole = products[widens], known(second.graph), second.outputs[0]
        gelu = known(known(second.inputs[0]).producer())
        add = known(known(gelu.inputs[0]).producer())
        del found[widens], found[name]
        halves = []
        for half, part in enumerate((slice(cut), slice(cut, None))):
            last, columns = known(first.inputs[0]), (slice(None), part)
            for old, where in ((first, columns), (add, part), (gelu, part), (second, part)):
                new = ir.node(
                    old.op_type,
                    [
                        last if constant is None else initializer(
                            graph,
                            f"{known(given).name}.half{half}",
                            cut_out(constant, where, known(last.dtype)),
                        )
                        for given in old.inputs
                        for constant in [stored(known(given)).const_value]
                    ],
                    dict(old.attributes),
                )  # fmt: skip
                last = new.outputs[0]
                last.name = f"{old.outputs[0].name}.half{half}"
                last.dtype = known(old.outputs[0].dtype)
                graph.insert_before(second, new)
                if old in (first, second):
                    found[f"{widens if old is first else name}.half{half}"] = new
            halves.append(last)
        total = ir.node("Add", halves)
        graph.insert_before(second, total)
        (value,) = total.outputs
        value.name, value.shape, value.dtype = f"{whole.name}.sum", whole.shape, known(whole.dtype)
        whole.replace_all_uses_with(value)
    return found


def cut_out(tensor: ir.TensorProtocol, where: Any, dtype: ir.DataType) -> ir.LazyTensor:
    """Part of a constant, in another precision, read when it is needed."""

    def part() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(tensor.numpy()[where]).astype(dtype.numpy()))

    shape = np.broadcast_to(np.empty(()), tensor.shape.numpy())[where].shape
    return ir.LazyTensor(part, dtype, ir.Shape(shape))


def quantize_product(
    product: ir.Node, name: str, kind: str, read: np.ndarray | None = None
) -> float:
    """Quantises the matrix of a MatMul in its graph; returns the signal-to-noise ratio in dB.

    read: mean products of what it is multiplied with, as `scales` takes them.
    """
    graph, weight, recipe = known(product.graph), known(product.inputs[1]), WEIGHTS[kind]
    tensor = known(stored(weight).const_value)
    inputs, outputs = shape = tensor.shape.numpy()
    block = weight_block(kind, inputs, outputs)
    matrix = tensor.numpy().astype(np.float32)
    scale, snr = scales(matrix, block, recipe, known(weight.dtype).numpy(), name, read)
    number = ir.DataType[recipe.format]

    def small() -> ir.TensorProtocol:
        values = rounded(tensor.numpy().astype(np.float32), block, scale, recipe)
        return ir.tensor(values.reshape(shape).astype(number.numpy()))

    if block == inputs:
        scale_in_graph, axes = scale[0], {"axis": 1}
    else:
        scale_in_graph, axes = scale, {"axis": 0, "block_size": block}
    dequantize = ir.node(
        "DequantizeLinear",
        [
            initializer(graph, f"{name}.{kind}", ir.LazyTensor(small, number, ir.Shape(shape))),
            initializer(graph, f"{name}.scale", ir.tensor(scale_in_graph)),
        ],
        attributes=axes,
    )
    (value,) = dequantize.outputs
    value.name, value.shape, value.dtype = f"{name}.read", weight.shape, known(weight.dtype)
    graph.insert_before(product, dequantize)
    product.replace_input_with(1, value)
    return snr


def scales(
    matrix: np.ndarray,
    block: int,
    recipe: Recipe,
    dtype: np.dtype,
    name: str,
    read: np.ndarray | None = None,
) -> tuple[np.ndarray, float]:
    """Scales [inputs / block, outputs] in `dtype` of a matrix [inputs, outputs], float32, and the
    signal-to-noise ratio with them in dB: of what the matrix gives, if `read` has the mean products
    M of every two channels in a block of what it is multiplied with, [blocks, width, width], those
    of two blocks taken as uncorrelated; else of its weights. Weights that are off by e put outputs
    off by e' M e, in the mean square. Where a recipe has several clips, `width` has to be `block`.

    Raises `ValueError` for a weight that is no number.
    """
    parts = matrix.reshape(-1, block, matrix.shape[1])

    def power(weights: np.ndarray) -> np.ndarray:
        """Mean square of what weights give, [blocks, outputs]."""
        if read is None:
            return np.einsum("ibo,ibo->io", weights, weights)
        weights = weights.reshape(len(read), -1, matrix.shape[1])
        return np.einsum("ibo,ibo->io", weights, np.matmul(read, weights))

    largest = np.abs(parts).max(1)
    if not np.isfinite(largest).all():
        raise ValueError(f"{name} holds weights that are no numbers; export from sound weights")
    smallest = np.finfo(dtype).smallest_subnormal  # a block of zeros has a scale too
    scale = error = np.empty(0)
    for clip in recipe.clips:
        tried = np.maximum((largest * np.float32(clip / recipe.high)).astype(dtype), smallest)
        difference = rounded(matrix, block, tried, recipe)
        difference *= tried[:, None].astype(np.float32)
        difference -= parts
        left = power(difference)
        if scale.size:
            better = left < error
            tried, left = np.where(better, tried, scale), np.where(better, left, error)
        scale, error = tried, left
    signal, noise = power(parts).sum(dtype=np.float64), error.sum(dtype=np.float64)
    return scale, 10 * math.log10(signal / noise) if noise else math.inf


def rounded(matrix: np.ndarray, block: int, scale: np.ndarray, recipe: Recipe) -> np.ndarray:
    """A matrix in steps of its scales, [inputs / block, block, outputs]: the nearest numbers that
    the recipe's format has, in float32."""
    parts = matrix.reshape(-1, block, matrix.shape[1]) / scale[:, None].astype(np.float32)
    np.clip(parts, recipe.low, recipe.high, out=parts)
    if recipe.format.startswith("INT"):
        return np.rint(parts, out=parts)
    return parts.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def quantize_inputs(products: dict[str, ir.Node], found: Statistics, recipe: Recipe) -> None:
    """Rounds what products are multiplied with, by the largest magnitude that there was."""
    number = ir.DataType[recipe.format]
    done: dict[str, ir.Value] = {}
    for name, product in products.items():
        _, layer, matrix = name.split(".", 2)
        first = f"blocks.{layer}.{SHARED.get(matrix, matrix)}.input"
        if first not in done:
            graph, exact = known(product.graph), known(product.inputs[0])
            dtype = known(exact.dtype)
            step = np.asarray(largest_input(found, int(layer), matrix) / recipe.high)
            smallest = np.finfo(dtype.numpy()).smallest_subnormal
            step = np.maximum(step.astype(dtype.numpy()), smallest)
            scale = initializer(graph, f"{first}.scale", ir.tensor(step))
            quantize = ir.node("QuantizeLinear", [exact, scale], {"output_dtype": int(number)})
            dequantize = ir.node("DequantizeLinear", [*quantize.outputs, scale])
            for node, end, kind in ((quantize, "rounded", number), (dequantize, "read", dtype)):
                (value,) = node.outputs
                value.name, value.shape, value.dtype = f"{first}.{end}", exact.shape, kind
            graph.insert_before(product, [quantize, dequantize])
            done[first] = dequantize.outputs[0]
        product.replace_input_with(0, done[first])


def quantize_cache(graph: ir.Graph, new: str, context: str, step: np.ndarray, kind: str) -> None:
    """Quantises an output of new keys or values and the input that they come back by, with the
    steps [H, d]."""
    index = next(i for i, value in enumerate(graph.outputs) if value.name == new)
    exact, number = graph.outputs[index], ir.DataType[CACHE[kind].format]
    cached = next(value for value in graph.inputs if value.name == context)
    full = known(exact.dtype)
    smallest = np.finfo(full.numpy()).smallest_normal  # below it a GPU may divide by zero
    step = np.maximum(step, smallest).astype(full.numpy())[None, :, None]
    steps = initializer(graph, f"{context}.step", ir.tensor(step))
    one = graph.initializers.get("cache.step") or initializer(
        graph, "cache.step", ir.tensor(np.ones((), full.numpy()))
    )

    def named(op: str, given: list[ir.Value], name: str, like: ir.Value, **how: int) -> ir.Node:
        node = ir.node(op, given, how)
        (value,) = node.outputs
        value.name, value.shape = name, like.shape
        value.dtype = number if op == "QuantizeLinear" else full
        return node

    (reader,) = cached.consumers()
    divide = named("Div", [exact, steps], f"{new}.steps", exact)
    quantize = named("QuantizeLinear", [*divide.outputs, one], new, exact, output_dtype=int(number))
    dequantize = named("DequantizeLinear", [cached, one], f"{context}.steps", cached)
    (read,) = dequantize.outputs
    if reader.op_type == ROTATION:  # keys
        (own,) = (node for node in exact.consumers() if node.op_type == ROTATION)
        own.replace_input_with(0, divide.outputs[0])
        rotate = rotation_of_queries(reader)
        query = known(rotate.inputs[0])
        scale = named("Mul", [query, steps], f"{query.name}.scaled", query)
        rotate.replace_input_with(0, scale.outputs[0])
        graph.insert_before(rotate, scale)
    else:
        multiply = named("Mul", [read, steps], f"{context}.exact", cached)
        (read,) = multiply.outputs
        graph.insert_before(reader, multiply)
    reader.replace_input_with(list(reader.inputs).index(cached), read)
    graph.insert_before(graph[0], dequantize)
    graph.insert_after(known(exact.producer()), [divide, quantize])
    exact.name, cached.dtype = f"{new}.exact", number
    graph.outputs[index] = quantize.outputs[0]


def rotation_of_queries(keys: ir.Node) -> ir.Node:
    """The node that rotates the queries of the attention that keys go into."""
    node = keys
    while node.op_type != "Attention":
        (node,) = node.outputs[0].consumers()
    while node.op_type != ROTATION:
        node = known(known(node.inputs[0]).producer())
    return node


def cache_steps(found: Statistics, recipe: Recipe) -> dict[str, np.ndarray]:
    """The steps of keys and values, "k" and "v", float32 [L, H, d]: of the recipe's ends of the
    range the one whose squared error, summed over the histogram, is least. No step of a key is
    below a `WIDEST` of the largest in its head.

    Raises `CalibrationError` for a channel that was always zero.
    """
    steps = {}
    for kind in "kv":
        largest, counts = found[f"{kind}.largest"], found[f"{kind}.counts"]
        shared = 2 if kind == "k" else 1  # a RoPE pair
        largest = largest.reshape(*largest.shape[:-1], -1, shared).max(-1)
        counts = counts.reshape(*largest.shape, shared, -1).sum(-2)
        if not largest.all():
            layer, head, channel = np.argwhere(largest == 0)[0]
            raise CalibrationError(
                f"{kind} of layer {layer}, head {head}, channel {channel * shared} was zero "
                "throughout: calibrate with more prompts, or check the model's weights"
            )
        best = np.full(largest.shape, np.inf)
        steps[kind] = np.zeros((*largest.shape, shared), np.float32)
        for clip in recipe.clips:
            end = (largest * np.float32(clip))[..., None]
            step = end / recipe.high
            error = np.where(end < MIDDLES, (MIDDLES - end) ** 2, step**2 / 12)
            squared = (error * counts).sum(-1)
            steps[kind] = np.where((squared < best)[..., None], step, steps[kind])
            best = np.minimum(best, squared)
        steps[kind] = np.broadcast_to(steps[kind], (*largest.shape, shared)).reshape(
            found[f"{kind}.largest"].shape
        )
    steps["k"] = np.maximum(steps["k"], steps["k"].max(-1, keepdims=True) / WIDEST)
    return steps
