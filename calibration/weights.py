"""Quantize the matrices of a denoiser's layers in its graph.

A weight [inputs, outputs] becomes int8, int4 or fp8, with a scale per output channel [outputs] or
per group [inputs / group, outputs], and a DequantizeLinear before its MatMul. Quantized values are
computed while the file is written, and no weight is read before, so memory stays small whatever the
size of the model. With int4 weights, each feed-forward layer becomes a sum of two. With fp8
weights, inputs are quantized to fp8 as well, with one static scale per tensor, so that the product
can run in fp8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from packforcing.calibration.activations import Statistics, largest_input, second_moments
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
    WEIGHT_RECIPES,
    Recipe,
)
from packforcing.calibration.scales import fit_weight_scales, round_to_scales
from packforcing.config import Config
from packforcing.errors import CalibrationError
from packforcing.geometry import quantized_layers
from packforcing.runtime.estimate import INT4_BLOCK, weight_block


def quantize_matrices(
    graph: ir.Graph,
    config: Config,
    dtype: str,
    statistics: Statistics | None = None,
    on_matrix: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Quantize the matrices of a denoiser's layers, all but the first and the last.

    Args:
        graph: The denoiser, changed in place.
        config: Its model.
        dtype: A key of `WEIGHT_RECIPES`.
        statistics: Activation statistics, needed for fp8. None: fit scales to the weights alone.
        on_matrix: Called with the number of matrices that are done and that of all.

    Returns:
        The SQNR of each matrix in dB, lowest first: of its outputs with statistics, of its weights
        without.

    Raises:
        BundleError: The denoiser's matrices are not those of the model.
        CalibrationError: An input was zero throughout.
        ValueError: A weight is NaN or infinite.
    """
    matmuls = layer_matmuls(graph, config, quantized_layers(config))
    if dtype == "int4":
        matmuls = split_feed_forward(matmuls)
    snr = {}
    for index, (name, matmul) in enumerate(matmuls.items()):
        moments = input_moments(statistics, name, matmul) if statistics else None
        snr[name] = quantize_matmul(matmul, name, dtype, moments)
        if on_matrix:
            on_matrix(index + 1, len(matmuls))
    if dtype in INPUT_RECIPES and statistics:
        quantize_inputs(matmuls, statistics, INPUT_RECIPES[dtype])
    return dict(sorted(snr.items(), key=lambda item: item[1]))


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


def quantize_matmul(
    matmul: ir.Node, name: str, dtype: str, moments: np.ndarray | None = None
) -> float:
    """Quantize the matrix of a MatMul in its graph.

    Args:
        matmul: The node, changed in place.
        name: The matrix.
        dtype: A key of `WEIGHT_RECIPES`.
        moments: Second moments of its inputs, as `fit_weight_scales` takes them.

    Returns:
        The SQNR in dB.

    Raises:
        ValueError: A weight is NaN or infinite.
    """
    graph, weight = not_none(matmul.graph), not_none(matmul.inputs[1])
    recipe, quantized_dtype = WEIGHT_RECIPES[dtype], ir.DataType[WEIGHT_RECIPES[dtype].dtype]
    tensor = not_none(stored_weight(matmul).const_value)
    inputs, outputs = shape = tensor.shape.numpy()
    group = weight_block(dtype, inputs, outputs)
    matrix = tensor.numpy().astype(np.float32)
    scale, snr = fit_weight_scales(
        matrix, group, recipe, not_none(weight.dtype).numpy(), name, moments
    )

    def quantize() -> ir.TensorProtocol:
        values = round_to_scales(tensor.numpy().astype(np.float32), group, scale, recipe)
        return ir.tensor(values.reshape(shape).astype(quantized_dtype.numpy()))

    quantized = ir.LazyTensor(quantize, quantized_dtype, ir.Shape(shape))
    if group == inputs:
        scale_in_graph, axes = scale[0], {"axis": 1}
    else:
        scale_in_graph, axes = scale, {"axis": 0, "block_size": group}
    dequantize = ir.node(
        "DequantizeLinear",
        [
            add_initializer(graph, f"{name}.{dtype}", quantized),
            add_initializer(graph, f"{name}.scale", ir.tensor(scale_in_graph)),
        ],
        attributes=axes,
    )
    (value,) = dequantize.outputs
    value.name, value.shape = f"{name}.read", weight.shape
    value.dtype = not_none(weight.dtype)
    graph.insert_before(matmul, dequantize)
    matmul.replace_input_with(1, value)
    return snr


def quantize_inputs(matmuls: dict[str, ir.Node], statistics: Statistics, recipe: Recipe) -> None:
    """Quantize the inputs of MatMuls in their graph, up to the largest magnitude observed.

    Args:
        matmuls: Nodes by the name of their matrix, changed in place.
        statistics: Of the model.
        recipe: Of the inputs.
    """
    quantized_dtype = ir.DataType[recipe.dtype]
    dequantized: dict[str, ir.Value] = {}
    for name, matmul in matmuls.items():
        _, layer, matrix = name.split(".", 2)
        input_name = f"blocks.{layer}.{SHARED_INPUTS.get(matrix, matrix)}.input"
        if input_name not in dequantized:
            graph, exact = not_none(matmul.graph), not_none(matmul.inputs[0])
            dtype = not_none(exact.dtype)
            value = np.asarray(largest_input(statistics, int(layer), matrix) / recipe.high)
            smallest = np.finfo(dtype.numpy()).smallest_subnormal
            value = np.maximum(value.astype(dtype.numpy()), smallest)
            scale = add_initializer(graph, f"{input_name}.scale", ir.tensor(value))
            options = {"output_dtype": int(quantized_dtype)}
            quantize = ir.node("QuantizeLinear", [exact, scale], options)
            dequantize = ir.node("DequantizeLinear", [*quantize.outputs, scale])
            for node, suffix, output_dtype in (
                (quantize, "rounded", quantized_dtype),
                (dequantize, "read", dtype),
            ):
                (output,) = node.outputs
                output.name, output.shape = f"{input_name}.{suffix}", exact.shape
                output.dtype = output_dtype
            graph.insert_before(matmul, [quantize, dequantize])
            dequantized[input_name] = dequantize.outputs[0]
        matmul.replace_input_with(0, dequantized[input_name])
