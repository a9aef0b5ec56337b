"""Quantized weights: their values, their scales, and that nothing else of a bundle changes."""

import math

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from packforcing.calibration.matmuls import layer_matmuls, stored_weight
from packforcing.calibration.quantizer import DENOISER, quantize_bundle
from packforcing.calibration.recipes import WEIGHT_RECIPES
from packforcing.calibration.scales import fit_weight_scales, round_to_scales
from packforcing.calibration.weights import input_factors, product_error
from packforcing.export.oracle import Oracle, oracle_config, record_calls
from packforcing.export.verify import verify_bundle
from packforcing.geometry import quantized_layers
from packforcing.runtime.bundle import contract, graph_file, read_manifest
from packforcing.runtime.estimate import weight_block
from tests.helpers import DEEP, quantized_matrices


def exact_matrices(bundle):
    graph = ir.load(bundle / DENOISER).graph
    return {
        name: stored_weight(node).const_value.numpy().astype(np.float32)
        for name, node in layer_matmuls(graph, DEEP, quantized_layers(DEEP)).items()
    }


def test_weights_are_off_by_half_a_scale_at_most_unless_int4_clips_them(half_bundle, quantized):
    """The spacing of fp8 values is an eighth of the power of two below the value; of fp4, half of
    it. A block of fp4 whose scale was rounded down clips its largest value."""
    dtype = read_manifest(quantized).config.precision.weights
    exact, matrices = exact_matrices(half_bundle), quantized_matrices(quantized)
    assert exact.keys() == matrices.keys() and len(exact) == 8 * (DEEP.layers - 2)
    for name, matrix in exact.items():
        rounded, spacing = matrices[name]
        assert not np.array_equal(rounded, matrix)
        if dtype == "fp8":
            _, exponent = np.frexp(matrix / spacing)
            spacing = spacing * np.maximum(2.0 ** (exponent - 4), 2**-9)
        scale = spacing
        if dtype == "nvfp4":
            sizes = np.abs(matrix / scale)
            spacing = scale * np.select([sizes < 2, sizes < 4], [0.5, 1], 2)
        is_close = np.abs(rounded - matrix) <= spacing * 0.501
        if dtype == "int4":
            recipe = WEIGHT_RECIPES[dtype]
            values = np.rint(rounded / spacing)
            is_close |= (values == recipe.high) & (matrix > rounded)
            is_close |= (values == recipe.low) & (matrix < rounded)
        if dtype == "nvfp4":
            is_close |= (np.abs(np.rint(rounded / scale)) == 6) & (np.abs(matrix) > np.abs(rounded))
        assert is_close.all(), name


def test_quantizing_weights_changes_nothing_else(half_bundle, quantized):
    before, after = (ir.load(path / DENOISER).graph for path in (half_bundle, quantized))
    names = before.initializers.keys() & after.initializers.keys()
    changed = layer_matmuls(before, DEEP, quantized_layers(DEEP))
    dtype = read_manifest(quantized).config.precision.weights
    split = DEEP.layers - 2 if dtype == "int4" else 0  # biases that are split with their matrix
    assert len(names) == len(before.initializers) - len(changed) - split
    for name in names:
        one, two = (graph.initializers[name].const_value.numpy() for graph in (before, after))
        np.testing.assert_array_equal(one, two)
    old, new = read_manifest(half_bundle), read_manifest(quantized)
    assert new.graphs == old.graphs  # the same tensors between graphs
    assert new.config == msgspec.structs.replace(
        old.config, precision=msgspec.structs.replace(old.config.precision, weights=dtype)
    )
    others = [name for name in old.files if name != DENOISER]
    assert all(new.files[name] == old.files[name] for name in others)
    assert new.files[DENOISER].bytes < old.files[DENOISER].bytes


def test_split_feed_forward_layers_compute_what_whole_ones_do(half_bundle, tmp_path, monkeypatch):
    config = oracle_config(read_manifest(half_bundle).config)
    specs = contract(config)
    oracles = {name: Oracle(half_bundle / graph_file(name), spec) for name, spec in specs.items()}
    call = record_calls(config, oracles)["denoiser"][0]
    quantize_bundle(half_bundle, tmp_path / "split", "int4")
    monkeypatch.setattr("packforcing.calibration.weights.split_feed_forward", lambda nodes: nodes)
    quantize_bundle(half_bundle, tmp_path / "whole", "int4")
    counts, flows = [], []
    for name in ("whole", "split"):
        graph = ir.load(tmp_path / name / DENOISER).graph
        counts.append(sum(node.op_type == "Gelu" for node in graph))
        oracle = Oracle(tmp_path / name / DENOISER, specs["denoiser"])
        flows.append(oracle.run(call.inputs)["flow"])
    assert counts == [DEEP.layers, 2 * DEEP.layers - 2]
    assert np.abs(flows[0] - flows[1]).max() < 1e-5 * np.abs(flows[0]).max()


def test_the_runtime_leaves_activations_of_quantized_weights_in_fp16(quantized):
    """ONNX Runtime's own default rounds inputs of quantized weights to int8, an error far above
    the limits; the oracle is the quantized graph in fp32."""
    verification = verify_bundle(quantized)
    assert verification.precision == read_manifest(quantized).config.precision
    assert verification.missed == []


@given(
    hnp.arrays(np.float32, (8, 3), elements=st.floats(-100, 100, width=32)),
    st.sampled_from(["int8", "int4"]),
    st.sampled_from([4, 8]),
)
def test_fitted_scales_have_no_larger_error_than_the_largest_magnitude(matrix, dtype, group):
    """Constant and empty channels included."""
    recipe = WEIGHT_RECIPES[dtype]
    scale, snr = fit_weight_scales(matrix, group, recipe, np.dtype(np.float16), "w")
    assert scale.shape == (8 // group, 3) and (scale > 0).all()

    def squared_error(scales):
        scales = np.repeat(scales.astype(np.float64), group, axis=0)
        rounded = np.clip(np.rint(matrix / scales), recipe.low, recipe.high) * scales
        return ((rounded - matrix) ** 2).sum()

    largest = np.abs(matrix).reshape(-1, group, 3).max(1)
    unclipped = np.maximum((largest / recipe.high).astype(np.float16), np.float16(6e-8))
    assert squared_error(scale) <= squared_error(unclipped) * 1.001 + 1e-9
    assert snr > 0 or not matrix.any() or np.abs(matrix).max() < 1e-5


def test_fp8_rounds_to_the_nearest_value_of_the_format():
    """E4M3 by its definition, a sign, 4 bits of exponent less 7 and 3 of mantissa: OCP 8-bit
    floating point specification."""
    codes = np.arange(127)  # the next code is NaN
    exponent, mantissa = codes >> 3, codes & 7
    normal = 2.0 ** (exponent - 7) * (1 + mantissa / 8)
    positive = np.where(exponent == 0, mantissa * 2.0**-9, normal)
    e4m3 = np.concatenate([-positive[::-1], positive])
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.uniform(-500, 500, 400), rng.normal(0, 0.05, 400), e4m3])
    column, recipe = values[:, None].astype(np.float32), WEIGHT_RECIPES["fp8"]
    rounded = round_to_scales(column, len(values), np.ones((1, 1)), recipe).ravel()
    nearest = np.abs(np.clip(values, -448, 448)[:, None] - e4m3).min(1)
    assert np.isin(rounded, e4m3).all()
    np.testing.assert_allclose(np.abs(rounded - np.clip(values, -448, 448)), nearest, atol=1e-6)


@pytest.mark.parametrize("correlation", [0, 30])
def test_scales_fitted_to_second_moments_lower_the_error_of_outputs(correlation):
    """Channels of very different size, correlated or not. The error of the outputs, on the inputs
    that the moments are of, is lower than with scales that fit the weights alone; with correlated
    channels, lower than with the diagonal of the moments."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_t(3, (256, 64)).astype(np.float32)
    inputs = rng.standard_normal((4000, 256)) * np.exp(rng.normal(0, 2, 256))
    inputs = (inputs + correlation * rng.standard_normal((4000, 1))).astype(np.float32)
    groups = inputs.reshape(4000, 2, 128)
    moments = np.einsum("nib,nic->ibc", groups, groups) / np.float32(4000)
    diagonal = moments * np.eye(128, dtype=np.float32)
    noise, recipe = {}, WEIGHT_RECIPES["int4"]
    for name, fitted_to in (("weights", None), ("diagonal", diagonal), ("moments", moments)):
        scale, snr = fit_weight_scales(matrix, 128, recipe, np.dtype(np.float32), "w", fitted_to)
        rounded = round_to_scales(matrix, 128, scale, recipe) * scale[:, None]
        noise[name] = np.square(inputs @ (rounded.reshape(matrix.shape) - matrix)).mean()
    signal = np.square(inputs @ matrix).mean()
    assert noise["moments"] < 0.8 * noise["weights"]
    assert noise["moments"] < (0.8 if correlation else 1.05) * noise["diagonal"]
    assert snr == pytest.approx(10 * math.log10(signal / noise["moments"]), abs=0.5)


@pytest.mark.parametrize(("outlier", "gain"), [(1, 1.02), (60, 0.3)])
def test_the_range_of_outlying_inputs_moves_into_the_weights(outlier, gain):
    """Where that lowers the error of the product in int8, on the inputs that the statistics are
    of. The predicted error, which chooses, is the measured one."""
    rng = np.random.default_rng(0)
    inputs = rng.uniform(-1, 1, (4000, 64)).astype(np.float32)
    inputs[:, ::16] *= outlier
    matrix = rng.standard_normal((64, 32)).astype(np.float32)
    largest, powers = np.abs(inputs).max(0), np.square(inputs).mean(0)
    moments = inputs.T @ inputs
    statistics = {
        "tokens": np.array([4000]),
        "ffn.0.largest": largest[None, None],
        "ffn.0.moments": moments[None, None],
    }
    weight = ir.Value(name="w", const_value=ir.tensor(matrix))
    matmul = ir.node("MatMul", [ir.Value(name="x"), weight])
    factors = input_factors({"blocks.0.ffn.0": matmul}, statistics, "w8a8")
    chosen = factors.get("blocks.0.ffn.0.input", np.ones(64, np.float32))
    assert np.array_equal(np.log2(chosen), np.rint(np.log2(chosen)))  # products are exact

    def rounded(values, step):
        return np.rint(values / step) * step

    def measured_error(factors):
        x, w = inputs * factors, matrix / factors[:, None]
        product = rounded(x, np.abs(x).max() / 127) @ rounded(w, np.abs(w).max(0) / 127)
        return np.square(product - inputs @ matrix).mean(0).sum()

    exact = measured_error(np.ones(64, np.float32))
    assert measured_error(chosen) <= gain * exact
    assert product_error(matrix, largest, powers, "w8a8") == pytest.approx(exact, rel=0.15)


def test_groups_that_share_a_scale_divide_the_inputs():
    assert [weight_block("int4", *shape) for shape in ((192, 640), (640, 192))] == [64, 128]
    assert [weight_block("int4", *shape) for shape in ((1536, 8960), (8960, 1536))] == [128, 128]
    assert [weight_block("int8", *shape) for shape in ((192, 640), (640, 192))] == [96, 640]
    for dtype in ("fp8", "w8a8"):
        assert [weight_block(dtype, *shape) for shape in ((192, 640), (640, 192))] == [192, 640]
    assert [weight_block("nvfp4", *shape) for shape in ((192, 640), (640, 192))] == [16, 16]
