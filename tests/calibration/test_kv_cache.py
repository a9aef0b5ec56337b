"""A quantized cache: its scales, its values, and renders that use it."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from packforcing.calibration.activations import BINS, add_cache_tokens, load_statistics
from packforcing.calibration.kv_cache import quantize_cache_tensor
from packforcing.calibration.quantizer import DENOISER
from packforcing.calibration.recipes import CACHE_RECIPES
from packforcing.calibration.scales import fit_cache_scales
from packforcing.errors import CalibrationError, RenderStopped
from packforcing.export.oracle import Oracle, oracle_config
from packforcing.export.verify import verify_bundle
from packforcing.runtime import Session
from packforcing.runtime.allocations import memory_by_purpose
from packforcing.runtime.bundle import DTYPES, contract, read_manifest
from tests.helpers import DEEP


def empty_statistics(*channels: int) -> dict[str, np.ndarray]:
    """Statistics of no keys and values, by layer, head and channel."""
    return {
        f"{kind}.{name}": array
        for kind in "kv"
        for name, array in (
            ("largest", np.zeros(channels, np.float32)),
            ("counts", np.zeros((*channels, BINS), np.uint32)),
        )
    }


def test_scales_reach_the_largest_magnitude_without_outliers_and_a_rope_pair_shares_one():
    rng = np.random.default_rng(0)
    tokens = rng.uniform(-1, 1, (2, 1000, 4)) * [1, 3, 0.1, 20]
    statistics = empty_statistics(1, 2, 4)
    for kind in "kv":
        add_cache_tokens(statistics, kind, 0, tokens.astype(np.float32))
    scales = fit_cache_scales(statistics, CACHE_RECIPES["int8"])
    largest = np.abs(tokens).max(1)
    np.testing.assert_allclose(scales["v"][0] * 127, largest, rtol=1e-6)
    pairs = largest.reshape(2, 2, 2).max(-1).repeat(2, -1)
    np.testing.assert_allclose(scales["k"][0] * 127, pairs, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "margin"), [("int8", 4), ("fp8", 2)])
def test_a_key_divided_by_its_scale_is_finite_in_fp16_though_its_channel_was_nearly_zero(
    dtype, margin
):
    """A block's own keys are divided by their scales and not clipped."""
    statistics = empty_statistics(1, 2, 4)
    for kind in "kv":
        tokens = np.random.default_rng(0).uniform(-1, 1, (2, 1000, 4)) * [1e-6, 1e-6, 10, 0.01]
        add_cache_tokens(statistics, kind, 0, tokens.astype(np.float32))
    (scales,) = fit_cache_scales(statistics, CACHE_RECIPES[dtype])["k"]
    assert (margin * 10 / scales < np.finfo(np.float16).max).all()
    assert scales[:, 0] == pytest.approx(scales[:, 2] / 64)  # too small to cost precision


def test_a_channel_that_was_always_zero_is_refused(half_bundle, calibrated):
    statistics = load_statistics(calibrated, read_manifest(half_bundle))
    statistics["v.largest"][1, 0, 3] = 0
    with pytest.raises(CalibrationError, match="v of layer 1, head 0, channel 3 was zero"):
        fit_cache_scales(statistics, CACHE_RECIPES["int8"])


def test_a_quantized_cache_is_the_rounded_one(half_bundle, quantized_cache, calibrated):
    """New keys and values, times their scales, are the exact ones to half a scale; and the flow
    from a quantized context is the exact flow from that context dequantized."""
    config = read_manifest(quantized_cache).config
    dtype, recipe = np.dtype(DTYPES[config.precision.cache]), CACHE_RECIPES[config.precision.cache]
    exact_spec, inputs_spec = contract(oracle_config(DEEP)), contract(config)["denoiser"]
    exact = Oracle(half_bundle / DENOISER, exact_spec["denoiser"])
    quantized = Oracle(quantized_cache / DENOISER, contract(oracle_config(config))["denoiser"])
    rng = np.random.default_rng(1)
    sizes = {"N": DEEP.block_tokens, "C": 20}
    scales = fit_cache_scales(load_statistics(calibrated, read_manifest(half_bundle)), recipe)
    inputs, dequantized = {}, {}
    for tensor in inputs_spec.inputs:
        shape = [sizes.get(str(n), n) for n in tensor.shape]
        if tensor.dtype == dtype:
            inputs[tensor.name] = rng.integers(-127, 128, shape).astype(dtype)
            kind, layer = tensor.name[0], int(tensor.name.rpartition(".")[2])
            scale = scales[kind][layer].astype(np.float16)[:, None].astype(np.float32)
            dequantized[tensor.name] = inputs[tensor.name].astype(np.float32) * scale
        else:
            array = rng.standard_normal(shape).astype(tensor.dtype)
            dequantized[tensor.name] = inputs[tensor.name] = array
    for arrays in (inputs, dequantized):
        arrays["kv_len"] = np.array([sum(sizes.values())], np.int64)
        arrays["timestep"] = np.array([500], np.float32)
    expected, outputs = exact.run(dequantized), quantized.run(inputs)
    np.testing.assert_allclose(outputs["flow"], expected["flow"], atol=1e-4)
    for layer in range(DEEP.layers):
        for kind in "kv":
            name, scale = f"{kind}_new.{layer}", scales[kind][layer][:, None]
            assert outputs[name].dtype == dtype
            lowest = -128 if dtype == np.int8 else recipe.low  # QuantizeLinear's own
            ideal = np.clip(expected[name] / scale, lowest, recipe.high)
            # half a scale, in fp8 a sixteenth of the value; and the division is in fp16
            allowed = 0.5 if dtype == np.int8 else np.maximum(np.abs(ideal) / 16, 2**-10)
            error = np.abs(outputs[name].astype(np.float32) - ideal)
            assert (error <= allowed + 0.002 * recipe.high).all()


@pytest.mark.parametrize("kind", "kv")
@pytest.mark.parametrize("largest", [6e4, 1.0, 1e-3, 1e-6, 1e-9])
def test_channels_of_any_magnitude_survive_a_quantized_cache(largest, kind):
    """A scale in fp16 has a least size, below which a GPU might take it for zero. Keys and values
    go into attention divided by their scales, and what it returns is finite."""

    def value(name, *shape):
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT16))

    new, context, tokens, query = (
        value(name, 1, 1, 3, 2) for name in (f"{kind}_new.0", f"{kind}_ctx.0", "tokens", "query")
    )
    cos, sin, result = value("cos", 1, 3, 1), value("sin", 1, 3, 1), value("result", 1, 1, 3, 2)
    nodes = [ir.node("Identity", [tokens], outputs=[new])]
    if kind == "k":
        rotated = [
            ir.node("RotaryEmbedding", [x, cos, sin], {"interleaved": 1})
            for x in (query, new, context)
        ]
        keys = ir.node("Concat", [node.outputs[0] for node in rotated[1:]], {"axis": 2})
        inputs = [rotated[0].outputs[0], keys.outputs[0], keys.outputs[0]]
        nodes += [*rotated, keys]
    else:
        joined = [ir.node("Concat", pair, {"axis": 2}) for pair in ([query, query], [new, context])]
        inputs = [query, *(node.outputs[0] for node in joined)]
        nodes += joined
    attended = ir.node("Attention", inputs)
    attended.outputs[0].dtype = ir.DataType.FLOAT16
    nodes += [attended, ir.node("Identity", attended.outputs, outputs=[result])]
    ends = [tokens, context, query, cos, sin], [new, result]
    graph = ir.Graph(*ends, nodes=nodes, opset_imports={"": 24}, name="g")
    scale = np.full((1, 2), largest / 127, np.float32)
    quantize_cache_tensor(graph, f"{kind}_new.0", f"{kind}_ctx.0", scale, "int8")
    session = onnxruntime.InferenceSession(
        ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    )
    values = np.float16([[0, largest], [-largest, largest / 3], [largest / 2, -largest]])
    values = values[None, None]
    feeds = {"tokens": values, "query": np.ones_like(values)}
    feeds |= {"cos": np.ones((1, 3, 1), np.float16), "sin": np.zeros((1, 3, 1), np.float16)}
    quantized, _ = session.run(None, {**feeds, f"{kind}_ctx.0": np.zeros(values.shape, np.int8)})
    _, attended = session.run(None, {**feeds, f"{kind}_ctx.0": quantized})
    spacing = max(largest / 127, 2**-14)
    assert np.isfinite(attended).all()
    history = quantized * np.float16(spacing)
    np.testing.assert_allclose(
        history.astype("f"), values.astype("f"), atol=0.51 * spacing, rtol=2e-3
    )


def test_the_runtime_stores_a_quantized_cache_and_archive(half_bundle, quantized_cache):
    config = read_manifest(quantized_cache).config
    dtype = DTYPES[config.precision.cache]
    sizes = [
        memory_by_purpose(read_manifest(bundle).config)["context"]
        for bundle in (half_bundle, quantized_cache)
    ]
    assert sizes[0] == 2 * sizes[1]
    with Session.open(quantized_cache) as session:
        frames = list(session.stream("a red star", seconds=4))
        rollout = session.rollout
        assert rollout is not None
        assert rollout.archive.key_values.dtype == dtype
        assert rollout.archive.key_values.view(np.int8).any()
        assert rollout.buffers.context.dtype == dtype
    assert len(np.concatenate(frames)) == config.frames(4)
    assert verify_bundle(quantized_cache).missed == []


def test_a_render_with_a_quantized_cache_resumes_to_the_same_bytes(quantized_cache, tmp_path):
    request = {"prompt": "a red star", "seconds": 9, "checkpoint_seconds": 3.0}
    with Session.open(quantized_cache) as session:
        session.render(path=tmp_path / "whole.mp4", **request)

        def stop(info):
            if info.index == 4:
                session.stop()

        path = tmp_path / "parts.mp4"
        with pytest.raises(RenderStopped):
            session.render(path=path, on_block=stop, **request)
        summary = session.render(path=path, resume=True, **request)
    assert summary.frames_resumed > 0
    assert path.read_bytes() == (tmp_path / "whole.mp4").read_bytes()
