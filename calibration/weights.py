"""Quantize the matrices of a denoiser's layers in its graph.

A weight [inputs, outputs] becomes int8, int4 or fp8, with a scale per output channel [outputs] or
per group [inputs / group, outputs], and a DequantizeLinear before its MatMul. Quantized values are
computed while the file is written, and no weight is read before, so memory stays small whatever the
size of the model. With int4 weights, each feed-forward layer becomes a sum of two.

With w8a8, fp8 and nvfp4, inputs are quantized to the dtype of the weights, so that the product can
run in it: with one static scale per tensor, and in nvfp4 with a dynamic one per block besides
(`packforcing.export.nvfp4`). int8 has few values for inputs whose channels differ in size, so with
w8a8 a part of that difference moves into the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from packforcing.calibration.activations import Statistics, largest_inputs, second_moments
from packforcing.calibration.matmuls import (
    SHARED_INPUTS,
    add_initializer,
    cast_source,
    layer_matmuls,
    not_none,
    stored_weight,
)
from packforcing.calibration.recipes import (
    INPUT_RECIPES,
    MIGRATION_STRENGTHS,
    WEIGHT_RECIPES,
)
from packforcing.calibration.scales import ONE, fit_weight_scales, round_to_scales
from packforcing.config import Config
from packforcing.errors import CalibrationError
from packforcing.export import nvfp4
from packforcing.geometry import quantized_layers
from packforcing.runtime.estimate import INT4_BLOCK, weight_block

SMALLEST_SHARE = 1e-3  # of the largest channel; a smaller one counts as that large


def quantize_matrices(
    model: ir.Model,
    config: Config,
    dtype: str,
    statistics: Statistics | None = None,
    on_matrix: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Quantize the matrices of a denoiser's layers, all but the first and the last.

    Args:
        model: The denoiser, changed in place.
        config: Its config.
        dtype: A key of `WEIGHT_RECIPES`.
        statistics: Activation statistics, needed for a key of `INPUT_RECIPES`. None: fit scales
            to the weights alone.
        on_matrix: Called with the number of matrices that are done and that of all.

    Returns:
        The SQNR of each matrix in dB, lowest first: of its outputs with statistics, of its weights
        without.

    Raises:
        BundleError: The denoiser's matrices are not those of the model.
        CalibrationError: An input was zero throughout.
        ValueError: A weight is NaN or infinite.
    """
    matmuls = layer_matmuls(model.graph, config, quantized_layers(config))
    if dtype == "int4":
        matmuls = split_feed_forward(matmuls)
    snr = quantize_products(model, matmuls, dtype, statistics, on_matrix)
    return dict(sorted(snr.items(), key=lambda item: item[1]))


def quantize_products(
    model: ir.Model,
    matmuls: dict[str, ir.Node],
    dtype: str,
    statistics: Statistics | None = None,
    on_matrix: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Quantize some matrices, and their inputs where products run in the dtype of the weights.

    Args:
        model: The denoiser, changed in place.
        matmuls: Its nodes by the name of their matrix.
        dtype: As in `quantize_matrices`.
        statistics: As there.
        on_matrix: As there.

    Returns:
        The SQNR of each matrix in dB.

    Raises:
        CalibrationError: An input was zero throughout.
        ValueError: A weight is NaN or infinite.
    """
    factors: dict[str, np.ndarray] = {}
    if dtype in MIGRATION_STRENGTHS and statistics:
        factors = input_factors(matmuls, statistics, dtype)
    snr: dict[str, float] = {}
    for index, (name, matmul) in enumerate(matmuls.items()):
        moments = input_moments(statistics, name, matmul) if statistics else None
        snr[name] = quantize_matmul(matmul, name, dtype, moments, factors.get(input_name(name)))
        if on_matrix:
            on_matrix(index + 1, len(matmuls))
    if dtype in INPUT_RECIPES and statistics:
        quantize_inputs(matmuls, statistics, dtype, factors)
    if dtype == "nvfp4":
        nvfp4.add_functions(model)
    return snr


def input_moments(statistics: Statistics, name: str, matmul: ir.Node) -> np.ndarray:
    """Return the second moments of the inputs of a MatMul.

    Args:
        statistics: Of the model.
        name: The matrix, like "blocks.3.ffn.2", or "blocks.3.ffn.2.half1" for half of it.
        matmul: Its node.

    Returns:
        float32 [group, channel, channel], as `second_moments`; of half the groups for a half.

    Raises:
        CalibrationError: The inputs were zero throughout.
    """
    _, layer, matrix = name.split(".", 2)
    matrix, _, half = matrix.partition(".half")
    moments = second_moments(statistics, int(layer), matrix)
    if not moments.any():
        raise CalibrationError(
            f"the input of {name} was zero throughout: calibrate with more prompts, or check the "
            "model's weights"
        )
    groups = not_none(not_none(matmul.inputs[1]).shape).numpy()[0] // moments.shape[-1]
    return moments[-groups:] if half == "1" else moments[:groups]


def split_feed_forward(matmuls: dict[str, ir.Node]) -> dict[str, ir.Node]:
    """Make each feed-forward layer a sum of two, in the graph.

    gelu(x A + a) B is gelu(x A1 + a1) B1 + gelu(x A2 + a2) B2, where A1 and A2 are columns of A, B1
    and B2 rows of B: exact but for the order of the sum. int4 values stay the same, since B is cut
    between two groups. TensorRT-RTX 1.7 would write a whole dequantized A into scratch, in fp16.
    A layer less than two groups wide stays whole.

    Args:
        matmuls: Nodes by the name of their matrix.

    Returns:
        The nodes that there are then; halves of "blocks.3.ffn.2" are "blocks.3.ffn.2.half0" and
        "blocks.3.ffn.2.half1".
    """
    result = dict(matmuls)
    for name, second in matmuls.items():
        inner, outputs = not_none(not_none(second.inputs[1]).shape).numpy()
        cut = -(-inner // 2 // INT4_BLOCK) * INT4_BLOCK
        has_whole_groups = weight_block("int4", inner, outputs) == INT4_BLOCK
        if not (name.endswith("ffn.2") and has_whole_groups and cut < inner):
            continue
        first_name = name.replace("ffn.2", "ffn.0")
        first, graph = matmuls[first_name], not_none(second.graph)
        whole = second.outputs[0]
        gelu = not_none(not_none(second.inputs[0]).producer())
        add = not_none(not_none(gelu.inputs[0]).producer())
        del result[first_name], result[name]
        halves = []
        for half, part in enumerate((slice(cut), slice(cut, None))):
            last, columns = not_none(first.inputs[0]), (slice(None), part)
            for old, index in ((first, columns), (add, part), (gelu, part), (second, part)):
                new = ir.node(
                    old.op_type,
                    [
                        last if constant is None else add_initializer(
                            graph,
                            f"{not_none(value).name}.half{half}",
                            slice_constant(constant, index, not_none(last.dtype)),
                        )
                        for value in old.inputs
                        for constant in [cast_source(not_none(value)).const_value]
                    ],
                    dict(old.attributes),
                )  # fmt: skip
                last = new.outputs[0]
                last.name = f"{old.outputs[0].name}.half{half}"
                last.dtype = not_none(old.outputs[0].dtype)
                graph.insert_before(second, new)
                if old in (first, second):
                    result[f"{first_name if old is first else name}.half{half}"] = new
            halves.append(last)
        total = ir.node("Add", halves)
        graph.insert_before(second, total)
        (value,) = total.outputs
        value.name, value.shape = f"{whole.name}.sum", whole.shape
        value.dtype = not_none(whole.dtype)
        whole.replace_all_uses_with(value)
    return result


def slice_constant(tensor: ir.TensorProtocol, index: Any, dtype: ir.DataType) -> ir.LazyTensor:
    """Return `tensor[index]` in another dtype, read when it is needed."""

    def read() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(tensor.numpy()[index]).astype(dtype.numpy()))

    shape = np.broadcast_to(np.empty(()), tensor.shape.numpy())[index].shape
    return ir.LazyTensor(read, dtype, ir.Shape(shape))


def input_name(name: str) -> str:
    """Return the name of a matrix's input, which those of queries, keys and values share."""
    _, layer, matrix = name.split(".", 2)
    return f"blocks.{layer}.{SHARED_INPUTS.get(matrix, matrix)}.input"


def input_factors(
    matmuls: dict[str, ir.Node], statistics: Statistics, dtype: str
) -> dict[str, np.ndarray]:
    """Choose what to multiply inputs by, so that their channels differ less in size.

    Weights are divided by the same. Channel j has the factor max|W_j|^(1 - a) / max|X_j|^a, where X
    are the inputs and W the weights (SmoothQuant, arXiv 2211.10438, equation 4, whose s_j it
    inverts), rounded to a power of two, so that the product is exact. Of several strengths a, and
    of none, the one with the least error of the outputs counts.

    Args:
        matmuls: Nodes by the name of their matrix.
        statistics: Of the model.
        dtype: A key of `MIGRATION_STRENGTHS`.

    Returns:
        float32 [inputs] by the name of the input; those that are better as they are have none.
    """
    names: dict[str, list[str]] = {}
    for name in matmuls:
        names.setdefault(input_name(name), []).append(name)
    factors: dict[str, np.ndarray] = {}
    for key, sharing in names.items():
        _, layer, matrix = sharing[0].split(".", 2)
        weights = np.concatenate(
            [not_none(stored_weight(matmuls[name]).const_value).numpy() for name in sharing], 1
        ).astype(np.float32)
        largest = largest_inputs(statistics, int(layer), matrix)
        powers = second_moments(statistics, int(layer), matrix).diagonal(0, 1, 2).ravel()
        sizes = [
            np.log2(np.maximum(values, values.max() * SMALLEST_SHARE))
            for values in (np.abs(weights).max(1), largest)
        ]
        least = product_error(weights, largest, powers, dtype)
        for strength in MIGRATION_STRENGTHS[dtype]:
            exponents = (1 - strength) * sizes[0] - strength * sizes[1]
            candidate = np.exp2(np.rint(exponents - np.median(exponents)))
            error = product_error(
                weights / candidate[:, None], largest * candidate, powers * candidate**2, dtype
            )
            if error < least:
                factors[key], least = candidate, error
    return factors


def product_error(
    weights: np.ndarray, largest: np.ndarray, powers: np.ndarray, dtype: str
) -> float:
    """Predict the error of the outputs of a product in integers.

    Rounding to multiples of a step is off by step^2 / 12 in the mean square. The error of an input
    reaches each output by its weight, that of a weight by the mean square of its input.

    Args:
        weights: [inputs, outputs].
        largest: Largest magnitude of each input, [inputs].
        powers: Mean square of each input, [inputs].
        dtype: A key of `WEIGHT_RECIPES`, of integers.

    Returns:
        The sum of the mean squared errors of all outputs.
    """
    input_step = largest.max() / INPUT_RECIPES[dtype].high
    weight_steps = np.abs(weights).max(0) / WEIGHT_RECIPES[dtype].high
    of_inputs = input_step**2 * np.square(weights).sum(dtype=np.float64)
    return float(of_inputs + np.square(weight_steps).sum() * powers.sum()) / 12


def quantize_matmul(
    matmul: ir.Node,
    name: str,
    dtype: str,
    moments: np.ndarray | None = None,
    factors: np.ndarray | None = None,
) -> float:
    """Quantize the matrix of a MatMul in its graph.

    Args:
        matmul: The node, changed in place.
        name: The matrix.
        dtype: A key of `WEIGHT_RECIPES`.
        moments: Second moments of its inputs, as `fit_weight_scales` takes them.
        factors: What its inputs will be multiplied by, [inputs]; None: nothing.

    Returns:
        The SQNR in dB.

    Raises:
        ValueError: A weight is NaN or infinite.
    """
    graph, weight = not_none(matmul.graph), not_none(matmul.inputs[1])
    recipe, compute_dtype = WEIGHT_RECIPES[dtype], not_none(weight.dtype)
    tensor = not_none(stored_weight(matmul).const_value)
    inputs, outputs = shape = tensor.shape.numpy()
    group = weight_block(dtype, inputs, outputs)
    is_nvfp4 = dtype == "nvfp4"

    def read() -> np.ndarray:
        matrix = tensor.numpy().astype(np.float32)
        return matrix if factors is None else matrix / factors[:, None]

    matrix = read()
    unit = nvfp4.tensor_scale(np.abs(matrix).max() * max(recipe.clips)) if is_nvfp4 else ONE
    scale_dtype = ir.DataType.FLOAT8E4M3FN if is_nvfp4 else compute_dtype
    if moments is not None and factors is not None:
        by_group = factors.reshape(len(moments), -1)
        moments = moments * by_group[:, None] * by_group[:, :, None]
    if moments is not None and len(recipe.clips) > 1:
        moments = diagonal_blocks(moments, group)
    scale, snr = fit_weight_scales(matrix, group, recipe, scale_dtype.numpy(), name, moments, unit)

    def quantize() -> ir.TensorProtocol:
        values = round_to_scales(read(), group, scale.astype(np.float32) * unit, recipe)
        values = values.reshape(shape).astype(ir.DataType[recipe.dtype].numpy())
        return ir.tensor(nvfp4.encode(values) if is_nvfp4 else values)

    stored_dtype = ir.DataType.UINT4 if is_nvfp4 else ir.DataType[recipe.dtype]
    quantized = ir.LazyTensor(quantize, stored_dtype, ir.Shape(shape))
    arguments = [
        add_initializer(graph, f"{name}.{dtype}", quantized),
        add_initializer(graph, f"{name}.scale", ir.tensor(scale[0] if group == inputs else scale)),
    ]
    if is_nvfp4:
        arguments.append(add_initializer(graph, f"{name}.unit", ir.tensor(np.asarray(unit))))
        options = {"dtype": int(compute_dtype)}
        dequantize = ir.node(nvfp4.DEQUANTIZE, arguments, options, domain=nvfp4.DOMAIN)
    else:
        options = {"axis": 1} if group == inputs else {"axis": 0, "block_size": group}
        dequantize = ir.node("DequantizeLinear", arguments, options)
    (value,) = dequantize.outputs
    value.name, value.shape = f"{name}.read", weight.shape
    value.dtype = compute_dtype
    graph.insert_before(matmul, dequantize)
    matmul.replace_input_with(1, value)
    return snr


def diagonal_blocks(moments: np.ndarray, width: int) -> np.ndarray:
    """Return the moments of smaller groups, [groups, width, width], of those of larger ones."""
    groups, size, _ = moments.shape
    parts = moments.reshape(groups, size // width, width, size // width, width)
    return np.einsum("gibic->gibc", parts).reshape(-1, width, width)


def quantize_inputs(
    matmuls: dict[str, ir.Node],
    statistics: Statistics,
    dtype: str,
    factors: Mapping[str, np.ndarray],
) -> None:
    """Quantize the inputs of MatMuls in their graph, up to the largest magnitude observed.

    Args:
        matmuls: Nodes by the name of their matrix, changed in place.
        statistics: Of the model.
        dtype: A key of `INPUT_RECIPES`.
        factors: Of `input_factors`; an input without any is not multiplied.
    """
    dequantized: dict[str, ir.Value] = {}
    for name, matmul in matmuls.items():
        _, layer, matrix = name.split(".", 2)
        key = input_name(name)
        if key not in dequantized:
            largest = largest_inputs(statistics, int(layer), matrix)
            dequantized[key] = quantize_input(matmul, key, dtype, largest, factors.get(key))
        matmul.replace_input_with(0, dequantized[key])


def quantize_input(
    matmul: ir.Node, name: str, dtype: str, largest: np.ndarray, factors: np.ndarray | None
) -> ir.Value:
    """Quantize the input of a MatMul in its graph.

    Args:
        matmul: The node.
        name: The input.
        dtype: A key of `INPUT_RECIPES`.
        largest: Largest magnitude of each channel, [inputs].
        factors: What to multiply each channel by first; None: nothing.

    Returns:
        The dequantized input.
    """
    graph, value, recipe = not_none(matmul.graph), not_none(matmul.inputs[0]), INPUT_RECIPES[dtype]
    compute_dtype, shape = not_none(value.dtype), value.shape
    quantized_dtype = ir.DataType[recipe.dtype]

    def add(node: ir.Node, suffix: str, dtype: ir.DataType) -> ir.Value:
        (output,) = node.outputs
        output.name, output.shape, output.dtype = f"{name}.{suffix}", shape, dtype
        graph.insert_before(matmul, node)
        return output

    if factors is not None:
        multiplier = ir.tensor(factors.astype(compute_dtype.numpy()))
        node = ir.node("Mul", [value, add_initializer(graph, f"{name}.factors", multiplier)])
        value, largest = add(node, "balanced", compute_dtype), largest * factors
    if dtype == "nvfp4":
        unit = np.asarray(nvfp4.tensor_scale(largest.max()))
        scale = add_initializer(graph, f"{name}.scale", ir.tensor(unit))
        node = ir.node(nvfp4.ROUND, [value, scale], domain=nvfp4.DOMAIN)
        return add(node, "read", compute_dtype)
    step = np.asarray(largest.max() / recipe.high).astype(compute_dtype.numpy())
    step = np.maximum(step, np.finfo(step.dtype).smallest_subnormal)
    scale = add_initializer(graph, f"{name}.scale", ir.tensor(step))
    options = {"output_dtype": int(quantized_dtype)}
    value = add(ir.node("QuantizeLinear", [value, scale], options), "rounded", quantized_dtype)
    return add(ir.node("DequantizeLinear", [value, scale]), "read", compute_dtype)
