"""Quantize the cache of a denoiser in its graph: keys and values that it writes and reads.

Scales are static, per layer, head and channel; the two channels of a RoPE pair of keys share one.
New keys and values are divided by their scales, rounded and returned. They stay divided when they
are read, those of the context and those of the block itself. Queries and what attention returns,
which are fewer, are multiplied instead: the products are the same, and a scale that a pair shares
commutes with its rotation. A block reads its own keys and values unrounded. Q/DQ nodes have scales
along one axis at most, so theirs is 1, and the scales are in nodes of their own.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from packforcing.calibration.matmuls import add_initializer, not_none
from packforcing.calibration.recipes import CACHE_RECIPES

ROTATION = "RotaryEmbedding"


def quantize_cache(graph: ir.Graph, scales: dict[str, np.ndarray], dtype: str) -> None:
    """Quantize the keys and values of every layer.

    Args:
        graph: The denoiser, changed in place.
        scales: Of "k" and "v", float32 [L, H, d], as `fit_cache_scales` returns them.
        dtype: A key of `CACHE_RECIPES`.
    """
    for kind, layers in scales.items():
        for layer, scale in enumerate(layers):
            quantize_cache_tensor(graph, f"{kind}_new.{layer}", f"{kind}_ctx.{layer}", scale, dtype)


def quantize_cache_tensor(
    graph: ir.Graph, new: str, context: str, scale: np.ndarray, dtype: str
) -> None:
    """Quantize the new keys or values of a layer, and those of its context.

    Args:
        graph: The denoiser, changed in place.
        new: Name of the output.
        context: Name of the input.
        scale: float32 [H, d].
        dtype: A key of `CACHE_RECIPES`.
    """
    index = next(i for i, value in enumerate(graph.outputs) if value.name == new)
    exact, quantized_dtype = graph.outputs[index], ir.DataType[CACHE_RECIPES[dtype].dtype]
    cached = next(value for value in graph.inputs if value.name == context)
    compute_dtype = not_none(exact.dtype)
    smallest = np.finfo(compute_dtype.numpy()).smallest_normal  # below it a GPU may divide by zero
    scale = np.maximum(scale, smallest).astype(compute_dtype.numpy())[None, :, None]
    scales = add_initializer(graph, f"{context}.step", ir.tensor(scale))
    one = graph.initializers.get("cache.step") or add_initializer(
        graph, "cache.step", ir.tensor(np.ones((), compute_dtype.numpy()))
    )

    def node(
        op: str, inputs: list[ir.Value], name: str, like: ir.Value, **attributes: int
    ) -> ir.Node:
        result = ir.node(op, inputs, attributes)
        (value,) = result.outputs
        value.name, value.shape = name, like.shape
        value.dtype = quantized_dtype if op == "QuantizeLinear" else compute_dtype
        return result

    (reader,) = cached.consumers()
    (own_reader,) = (user for user in exact.consumers() if user.op_type == reader.op_type)
    divide = node("Div", [exact, scales], f"{new}.steps", exact)
    quantize = node(
        "QuantizeLinear", [*divide.outputs, one], new, exact, output_dtype=int(quantized_dtype)
    )
    dequantize = node("DequantizeLinear", [cached, one], f"{context}.steps", cached)
    attention = reader
    while attention.op_type != "Attention":
        (attention,) = attention.outputs[0].consumers()
    if reader.op_type == ROTATION:  # keys
        rotation = query_rotation(attention)
        query = not_none(rotation.inputs[0])
        multiply = node("Mul", [query, scales], f"{query.name}.scaled", query)
        rotation.replace_input_with(0, multiply.outputs[0])
        graph.insert_before(rotation, multiply)
    else:
        attended = attention.outputs[0]
        for user in attended.consumers():
            if user.op_type == "Cast":  # from fp32
                attended = user.outputs[0]
        multiply = node("Mul", [attended, scales], f"{attended.name}.scaled", attended)
        attended.replace_all_uses_with(multiply.outputs[0])
        multiply.replace_input_with(0, attended)
        graph.insert_after(not_none(attended.producer()), multiply)
    own_reader.replace_input_with(list(own_reader.inputs).index(exact), divide.outputs[0])
    reader.replace_input_with(list(reader.inputs).index(cached), dequantize.outputs[0])
    graph.insert_before(graph[0], dequantize)
    graph.insert_after(not_none(exact.producer()), [divide, quantize])
    exact.name, cached.dtype = f"{new}.exact", quantized_dtype
    graph.outputs[index] = quantize.outputs[0]


def query_rotation(attention: ir.Node) -> ir.Node:
    """Return the node that rotates the queries of an attention."""
    node = attention
    while node.op_type != ROTATION:
        node = not_none(not_none(node.inputs[0]).producer())
    return node
