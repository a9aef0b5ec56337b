"""NVFP4 in ONNX Runtime: the same bits as the formats' definition, by the dtypes of ml_dtypes."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from packforcing.export import nvfp4

E2M1, E4M3 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn
ROWS, COLUMNS, SCALE = 6, 32, np.float32(0.37)
CODES = np.arange(16, dtype=np.uint8)


def call(function: str, *inputs: np.ndarray, dtype=np.float32, options=None) -> np.ndarray:
    """Call a function of NVFP4 in ONNX Runtime, without its optimizations."""
    values = [
        ir.Value(name=f"input{index}", shape=ir.Shape(array.shape),
                 type=ir.TensorType(ir.tensor(array).dtype), const_value=ir.tensor(array))
        for index, array in enumerate(inputs)
    ]  # fmt: skip
    node = ir.node(function, values, options, domain=nvfp4.DOMAIN)
    (result,) = node.outputs
    result.name, result.dtype = "result", ir.DataType.from_numpy(np.dtype(dtype))
    graph = ir.Graph([], [result], nodes=[node], initializers=values, opset_imports={"": 24})
    model = ir.Model(graph, ir_version=11)
    nvfp4.add_functions(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    blob = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(blob, options, providers=["CPUExecutionProvider"])
    return session.run(None, {})[0]


def rounded(x: np.ndarray, scale: np.float32) -> np.ndarray:
    """Round to NVFP4 by its definition, in the dtype of `x`."""
    blocks = x.astype(np.float32).reshape(-1, 16)
    largest = np.abs(blocks).max(1, keepdims=True) / np.float32(6)
    block_scales = np.minimum(largest / scale, 448).astype(E4M3).astype(np.float32)
    steps = block_scales * scale
    with np.errstate(divide="ignore", invalid="ignore"):
        quotients = np.where(steps > 0, blocks / steps, 0)
    values = np.clip(quotients, -6, 6).astype(E2M1).astype(np.float32)
    return (values * steps).reshape(x.shape).astype(x.dtype)


@settings(deadline=None, max_examples=25)
@given(
    hnp.arrays(np.float32, (1, ROWS, COLUMNS), elements=st.floats(-1e4, 1e4, width=32)),
    st.integers(-20, 3).map(lambda exponent: np.float32(1.7 * 2.0**exponent)),
    st.sampled_from([np.float32, np.float16]),
)
def test_activations_are_rounded_to_the_bit(x, scale, dtype):
    """Blocks of zeros, scales beyond the ends of E4M3, and values beyond the range included."""
    x = x.astype(dtype)
    result = call(nvfp4.ROUND, x, np.asarray(scale), dtype=dtype)
    np.testing.assert_array_equal(result, rounded(x, scale))


def test_every_interval_of_e2m1_and_every_tie_rounds_as_its_dtype_does():
    """The largest value of each block is 6, so that its scale is one."""
    points = np.arange(0, 6.001, 1 / 16, dtype=np.float32)
    points = np.concatenate([points, np.nextafter(points, 0), np.nextafter(points, 7), -points])
    points = np.resize(np.clip(points, -6, 6), (1, len(points), 15))
    x = np.concatenate([points, np.full_like(points[..., :1], 6)], 2)
    x = np.concatenate([x, np.roll(x, 1, 1)], 2)
    result = call(nvfp4.ROUND, x, np.asarray(np.float32(1)))
    np.testing.assert_array_equal(result, x.astype(E2M1).astype(np.float32))


def test_every_scale_of_e4m3_is_rounded_as_its_dtype_does():
    """One block for each number between 0 and beyond the largest scale: of its largest value."""
    sizes = np.concatenate([np.geomspace(2**-11, 500, 4000), np.linspace(0, 2**-5, 500)])
    x = np.zeros((1, len(sizes), 16), np.float32)
    x[0, :, 0] = 6 * sizes
    result = call(nvfp4.ROUND, x, np.asarray(np.float32(1)))
    np.testing.assert_array_equal(result, rounded(x, np.float32(1)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_are_dequantized_to_the_bit(dtype):
    rng = np.random.default_rng(0)
    values = CODES.view(E2M1)[rng.integers(0, 16, (64, 24))]
    block_scales = rng.uniform(2**-9, 448, (4, 24)).astype(E4M3)
    arguments = nvfp4.encode(values), block_scales, np.asarray(SCALE)
    number = int(ir.DataType.from_numpy(np.dtype(dtype)))
    result = call(nvfp4.DEQUANTIZE, *arguments, dtype=dtype, options={"dtype": number})
    steps = np.repeat(block_scales.astype(np.float32) * SCALE, 16, 0)
    np.testing.assert_array_equal(result, (values.astype(np.float32) * steps).astype(dtype))


def test_codes_are_the_bits_of_e2m1():
    """So the bytes of packed uint4 are those of packed E2M1."""
    assert nvfp4.encode(CODES.view(E2M1)).astype(int).tolist() == CODES.tolist()
    packed = [ir.tensor(array).tobytes() for array in (nvfp4.encode(CODES.view(E2M1)),
                                                      CODES.view(E2M1))]  # fmt: skip
    assert packed[0] == packed[1]
