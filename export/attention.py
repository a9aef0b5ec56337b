"""Attention over the context in a denoiser's graph, and the rounding of its softmax written out.

An engine with fp8 attention rounds the softmax to fp8 too. ONNX's `Attention` has no words for it,
so ONNX Runtime runs such a graph with an exact softmax. `write_out_attention` replaces the node by
its formula, with the softmax rounded. Where a kernel rounds is not documented, so there are two
conventions: the normalized probabilities, or the exponentials relative to the largest of their row,
which a fused kernel has before it knows their sum.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

Softmax = Literal["normalized", "relative"]
FP8 = ir.DataType.FLOAT8E4M3FN
# Of the range of softmax, which ends at 1
SOFTMAX_SCALE = 1 / float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)


def context_attentions(graph: ir.Graph) -> list[ir.Node]:
    """Return the nodes of attention over the context, one per layer, in order.

    They read `kv_len`; cross-attention, over all of the text, does not.
    """
    return [
        node
        for node in graph
        if node.op_type == "Attention"
        and len(node.inputs) > 6
        and node.inputs[6] is not None
        and node.inputs[6].name == "kv_len"
    ]


def write_out_attention(
    graph: ir.Graph, softmax: Softmax | None, layers: Collection[int] | None = None
) -> None:
    """Replace attention over the context by its formula, with the softmax rounded to fp8.

    Scores are in memory at once, so this is for small grids.

    Args:
        graph: The denoiser, changed in place.
        softmax: What is rounded: probabilities, or exponentials relative to the largest of their
            row, whose sum stays exact. None: nothing.
        layers: In these alone; None: in all.
    """
    for layer, attention in enumerate(context_attentions(graph)):
        if layers is None or layer in layers:
            _write_out(graph, attention, f"attention.{layer}", softmax)


def _write_out(graph: ir.Graph, attention: ir.Node, prefix: str, softmax: Softmax | None) -> None:
    q, k, v, kv_len = (attention.inputs[index] for index in (0, 1, 2, 6))
    assert q is not None and k is not None and v is not None and q.dtype is not None
    dtype = q.dtype
    nodes: list[ir.Node] = []

    def constant(name: str, content: float | list[int], dtype: ir.DataType = dtype) -> ir.Value:
        array = np.array(content, dtype.numpy())
        value = ir.Value(
            name=f"{prefix}.{name}",
            shape=ir.Shape(array.shape),
            type=ir.TensorType(dtype),
            const_value=ir.tensor(array, name=f"{prefix}.{name}"),
        )
        graph.register_initializer(value)
        return value

    def apply(
        op: str, *inputs: ir.Value | None, dtype: ir.DataType = dtype, **attributes
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes)
        nodes.append(node)
        (value,) = node.outputs
        value.name, value.dtype = f"{prefix}.{len(nodes)}.{op}", dtype
        return value

    def rounded(value: ir.Value) -> ir.Value:
        scale = constant("softmax", SOFTMAX_SCALE)
        steps = apply("QuantizeLinear", value, scale, dtype=FP8, output_dtype=int(FP8))
        return apply("DequantizeLinear", steps, scale)

    integer = ir.DataType.INT64
    zero, one = (constant(str(n), n, dtype=integer) for n in (0, 1))
    keys = apply("Squeeze", apply("Shape", k, dtype=integer, start=2, end=3), dtype=integer)
    index = apply("Range", zero, keys, one, dtype=integer)
    valid = apply("Less", index, kv_len, dtype=ir.DataType.BOOL)
    products = apply("MatMul", q, apply("Transpose", k, perm=[0, 1, 3, 2]))
    factor = constant("factor", attention.attributes["scale"].as_float())
    scores = apply("Where", valid, apply("Mul", products, factor), constant("none", -np.inf))
    if softmax == "relative":
        last = constant("last", [-1], dtype=integer)
        largest = apply("ReduceMax", scores, last, keepdims=1)
        exponentials = apply("Exp", apply("Sub", scores, largest))
        total = apply("ReduceSum", exponentials, last, keepdims=1)
        result = apply("Div", apply("MatMul", rounded(exponentials), v), total)
    else:
        shares = apply("Softmax", scores, axis=-1)
        result = apply("MatMul", rounded(shares) if softmax else shares, v)
    graph.insert_before(attention, nodes)
    (attended,) = attention.outputs
    result.shape = attended.shape
    attended.replace_all_uses_with(result)
    graph.remove(attention, safe=True)
