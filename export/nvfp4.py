"""NVFP4 in a graph: ONNX functions that every runtime can run, and what TensorRT builds of them.

NVFP4 is E2M1 values in blocks of 16, with an E4M3 scale per block and an fp32 scale per tensor.
Weights are stored so. Activations are rounded in every call, with scales of their blocks. ONNX
Runtime has no E2M1, so a graph calls two functions. Their bodies in the file are ordinary ops that
compute the same values, and codes of weights are uint4. `tensorrt_model` replaces the bodies by
TensorRT's, and uint4 by E2M1, which has the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx.parser
import onnx_ir as ir
from onnx_ir.passes import common

from packforcing.export.attention import context_attentions

DOMAIN, DEQUANTIZE, ROUND = "packforcing", "Nvfp4Dequantize", "Nvfp4Round"
LARGEST_VALUE, LARGEST_SCALE = 6.0, 448.0  # of E2M1 and E4M3

# Of codes [K, N], block scales [K / 16, N] and the tensor's scale. A code is the index of a value.
_DEQUANTIZE = """
<domain: "packforcing", opset_import: ["": 24]>
Nvfp4Dequantize <dtype> (codes, block_scales, scale) => (weight)
{
    values = Constant <value_floats = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0,
                                       -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]> ()
    indices = Cast <to = 6> (codes)
    numbers = Gather (values, indices)
    block = Constant <value_ints = [-1, 16]> ()
    columns = Shape <start = 1> (numbers)
    blocked = Concat <axis = 0> (block, columns)
    blocks = Reshape (numbers, blocked)
    wide = Cast <to = 1> (block_scales)
    steps = Mul (wide, scale)
    axis = Constant <value_ints = [1]> ()
    step = Unsqueeze (steps, axis)
    exact = Mul (blocks, step)
    shape = Shape (numbers)
    joined = Reshape (exact, shape)
    weight = Cast <to: int = @dtype> (joined)
}
"""
# Of activations [1, n, K]. A block's scale is its largest magnitude / 6, in units of the tensor's
# scale. Values round to the nearest multiple of their octave's spacing, ties to even.
_ROUND = """
<domain: "packforcing", opset_import: ["": 24]>
Nvfp4Round (x, scale) => (y)
{
    exact = Cast <to = 1> (x)
    blocked = Constant <value_ints = [0, 0, -1, 16]> ()
    blocks = Reshape (exact, blocked)
    magnitudes = Abs (blocks)
    last = Constant <value_ints = [-1]> ()
    largest = ReduceMax (magnitudes, last)
    six = Constant <value_float = 6.0> ()
    sixth = Div (largest, six)
    ratio = Div (sixth, scale)
    block_scale = Cast <to = 17> (ratio)
    wide = Cast <to = 1> (block_scale)
    step = Mul (wide, scale)
    tiny = Constant <value_float = 1e-37> ()
    divisor = Max (step, tiny)
    quotients = Div (blocks, divisor)
    low = Constant <value_float = -6.0> ()
    clipped = Clip (quotients, low, six)
    sizes = Abs (clipped)
    half = Constant <value_float = 0.5> ()
    one = Constant <value_float = 1.0> ()
    two = Constant <value_float = 2.0> ()
    four = Constant <value_float = 4.0> ()
    below_four = Less (sizes, four)
    below_two = Less (sizes, two)
    spacing_above = Where (below_four, one, two)
    spacing = Where (below_two, half, spacing_above)
    counts = Div (clipped, spacing)
    whole = Round (counts)
    values = Mul (whole, spacing)
    dequantized = Mul (values, step)
    shape = Shape (x)
    joined = Reshape (dequantized, shape)
    y = CastLike (joined, x)
}
"""
_TENSORRT_DEQUANTIZE = """
<domain: "packforcing", opset_import: ["": 24]>
Nvfp4Dequantize <dtype> (codes, block_scales, scale) => (weight)
{
    wide = DequantizeLinear (block_scales, scale)
    steps = Cast <to: int = @dtype> (wide)
    weight = DequantizeLinear <axis = 0, block_size = 16> (codes, steps)
}
"""
_TENSORRT_ROUND = """
<domain: "packforcing", opset_import: ["": 24, "trt": 1]>
Nvfp4Round (x, scale) => (y)
{
    codes, block_scales = trt.TRT_FP4DynamicQuantize <axis = -1, block_size = 16, scale_type = 17>
        (x, scale)
    wide = DequantizeLinear (block_scales, scale)
    steps = CastLike (wide, x)
    y = DequantizeLinear <axis = -1, block_size = 16> (codes, steps)
}
"""


def tensor_scale(largest: np.float32) -> np.float32:
    """Return the scale of a tensor, with which the largest magnitude has the largest values."""
    smallest = np.finfo(np.float32).smallest_normal  # of a tensor of zeros
    return np.maximum(np.float32(largest) / np.float32(LARGEST_VALUE * LARGEST_SCALE), smallest)


def encode(values: np.ndarray) -> np.ndarray:
    """Return the codes of E2M1 values as uint4, of the same shape."""
    return values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8).astype(ml_dtypes.uint4)


def add_functions(model: ir.Model, bodies: tuple[str, ...] = (_DEQUANTIZE, _ROUND)) -> None:
    """Define the functions of NVFP4 in a model, in place of those that it has.

    Args:
        model: Changed in place.
        bodies: The functions in ONNX's text format.
    """
    for body in bodies:
        function = ir.serde.deserialize_function(onnx.parser.parse_function(body))
        model.functions[function.identifier()] = function
        model.opset_imports.update({DOMAIN: 1, **function.opset_imports})


def tensorrt_model(path: Path, *, without_length: bool = False) -> bytes | None:
    """Read a graph as TensorRT's parser knows it.

    Args:
        path: The ONNX file. Files beside it that hold weights are not read.
        without_length: Leave out the length of the context that `Attention` reads, for a parser
            that may not know this input.

    Returns:
        The model without functions of NVFP4, which reads the same files; None where the parser
        knows the file as it is.
    """
    model = ir.load(path)
    if not (model.functions or without_length):
        return None
    if without_length:
        for node in context_attentions(model.graph):
            node.resize_inputs(6)
    if not model.functions:
        return ir.to_proto(model).SerializeToString()
    add_functions(model, (_TENSORRT_DEQUANTIZE, _TENSORRT_ROUND))
    proto = ir.to_proto(common.InlinePass()(model).model)
    for tensor in proto.graph.initializer:
        if tensor.data_type == ir.DataType.UINT4:
            tensor.data_type = ir.DataType.FLOAT4E2M1.value
    return proto.SerializeToString()
