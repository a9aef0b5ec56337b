"""Quantize attention over the context in a denoiser's graph: queries, keys and values to fp8.

They are rounded where attention reads them: queries and keys after RoPE, so that keys of the
context, of whatever dtype, and those of the block itself are rounded once more, joined. Scales are
static, one per layer and operand. The softmax is quantized by the builder, since ONNX has no words
for it (`packforcing.export.builder`). Cross-attention stays as it is.

What fp8 costs comes from the keys: rounding is relative, and the few channels in which queries and
keys are both large have most of a score's error. So both are multiplied by an orthogonal matrix
first. Scores stay the same, and the error is spread over all channels.

Attention computes in the compute dtype, without the casts that otherwise make it accumulate in
fp32: a fused fp8 kernel accumulates in fp32 anyway, and with casts in between the builder finds
none.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from packforcing.calibration.activations import ATTENTION_OPERANDS, Statistics
from packforcing.calibration.matmuls import add_initializer, cast_source, not_none
from packforcing.calibration.recipes import ATTENTION_RECIPES, CACHE_RECIPES
from packforcing.config import Config
from packforcing.errors import CalibrationError
from packforcing.export.attention import context_attentions


def attention_scales(
    statistics: Statistics,
    config: Config,
    cache_scales: dict[str, np.ndarray],
    *,
    mixed: bool = True,
) -> list[np.ndarray]:
    """Return the scales of what attention reads.

    The largest magnitudes observed are the ends of the range. No channel of a mixed vector is
    larger than the norm of the vector. With a quantized cache keys and values are divided by its
    scales, and queries multiplied. The values of an fp8 cache are values of fp8 then, and their
    scale is 1: they go from the cache into attention as they are.

    Args:
        statistics: Of the model.
        config: Its config, with the precision that is quantized to.
        cache_scales: Of "k" and "v", float32 [L, H, d]; empty where the cache is not quantized.
        mixed: Whether `mix_channels` is applied.

    Returns:
        Scales of queries, keys and values, float32 [L, H].

    Raises:
        CalibrationError: The statistics have none of attention.
    """
    recipe = ATTENTION_RECIPES["fp8"]
    if f"{ATTENTION_OPERANDS[0]}.largest" not in statistics:
        raise CalibrationError(
            "the statistics were collected by an older release, which knew no fp8 attention: "
            "collect them again with 'packforcing calibrate'"
        )
    q, k, v = (statistics[f"{operand}.largest"] for operand in ATTENTION_OPERANDS)
    if cache_scales:
        # a rotation mixes the two channels of a pair, and they share a scale
        q, k, v = q * cache_scales["k"], k / cache_scales["k"], v / cache_scales["v"]
    ends = [np.linalg.norm(part, axis=-1) if mixed else part.max(-1) for part in (q, k)]
    scales = [end / recipe.high for end in (*ends, v.max(-1))]
    if cache_scales and CACHE_RECIPES[config.precision.cache].dtype == recipe.dtype:
        scales[2] = np.ones_like(scales[2])
    return scales


def mixing_matrix(size: int) -> np.ndarray:
    """Return an orthogonal matrix without large entries: the discrete Hartley transform.

    Unlike Hadamard matrices it exists in every size.

    Args:
        size: Rows and columns.

    Returns:
        float64 [size, size].
    """
    index = np.arange(size)
    angle = 2 * np.pi * np.outer(index, index) / size
    return (np.cos(angle) + np.sin(angle)) / np.sqrt(size)


def mix_channels(graph: ir.Graph, head_dim: int) -> None:
    """Multiply queries and keys of attention over the context by `mixing_matrix`, in every layer.

    Args:
        graph: The denoiser, changed in place.
        head_dim: Channels of a head.
    """
    matrix: ir.Value | None = None
    for layer, attention in enumerate(context_attentions(graph)):
        for index, operand in enumerate(ATTENTION_OPERANDS[:2]):
            exact = cast_source(not_none(attention.inputs[index]))
            if matrix is None:
                values = mixing_matrix(head_dim)
                tensor = ir.tensor(values.astype(not_none(exact.dtype).numpy()))
                matrix = add_initializer(graph, "attention.mixing", tensor)
            mix = ir.node("MatMul", [exact, matrix])
            (mixed,) = mix.outputs
            mixed.name, mixed.shape = f"{operand}.{layer}.mixed", exact.shape
            mixed.dtype = not_none(exact.dtype)
            graph.insert_before(attention, mix)
            attention.replace_input_with(index, mixed)


def quantize_attention(graph: ir.Graph, scales: list[np.ndarray], dtype: str) -> None:
    """Quantize what attention over the context reads, in every layer.

    Args:
        graph: The denoiser, changed in place.
        scales: Of queries, keys and values, float32 [L], or [L, H] for one per head.
        dtype: A key of `ATTENTION_RECIPES`.
    """
    quantized_dtype = ir.DataType[ATTENTION_RECIPES[dtype].dtype]
    for layer, attention in enumerate(context_attentions(graph)):
        for index, (operand, scale) in enumerate(zip(ATTENTION_OPERANDS, scales)):
            exact = cast_source(not_none(attention.inputs[index]))
            compute_dtype = not_none(exact.dtype)
            smallest = np.finfo(compute_dtype.numpy()).smallest_normal
            value = np.maximum(scale[layer].astype(compute_dtype.numpy()), smallest)
            name = f"{operand}.{layer}"
            step = add_initializer(graph, f"{name}.scale", ir.tensor(np.asarray(value)))
            axis = {"axis": 1} if value.ndim else {}
            quantize = ir.node(
                "QuantizeLinear", [exact, step], {"output_dtype": int(quantized_dtype), **axis}
            )
            dequantize = ir.node("DequantizeLinear", [*quantize.outputs, step], axis)
            for node, suffix, output_dtype in (
                (quantize, "rounded", quantized_dtype),
                (dequantize, "read", compute_dtype),
            ):
                (output,) = node.outputs
                output.name, output.shape = f"{name}.{suffix}", exact.shape
                output.dtype = output_dtype
            graph.insert_before(attention, [quantize, dequantize])
            attention.replace_input_with(index, dequantize.outputs[0])
        (attended,) = attention.outputs
        for cast in attended.consumers():
            if cast.op_type == "Cast":
                cast.outputs[0].replace_all_uses_with(attended)
                graph.remove(cast, safe=True)
        attended.dtype = compute_dtype
