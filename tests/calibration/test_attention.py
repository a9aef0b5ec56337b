"""fp8 attention: its scales, the graph that rounds, the softmax written out, and the engines."""

import functools
import math
import shutil

import ml_dtypes
import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from packforcing import MODELS
from packforcing.calibration.activations import (
    ATTENTION_OPERANDS,
    SOURCE_KEY,
    load_statistics,
    read_statistics,
)
from packforcing.calibration.attention import attention_scales, mixing_matrix
from packforcing.calibration.quantizer import DENOISER, quantize_bundle
from packforcing.calibration.recipes import CACHE_RECIPES
from packforcing.calibration.scales import fit_cache_scales
from packforcing.config import Precision
from packforcing.errors import BackendError, CalibrationError, ConfigError
from packforcing.export import export_bundle
from packforcing.export.attention import context_attentions, write_out_attention
from packforcing.export.oracle import Oracle, oracle_config
from packforcing.export.verify import verify_bundle
from packforcing.geometry import layer_matrices
from packforcing.model import random_weights
from packforcing.runtime import Session
from packforcing.runtime.bundle import contract, read_manifest
from packforcing.runtime.estimate import scratch_bytes
from packforcing.runtime.plan import check_target
from tests.helpers import CALIBRATION_PROMPTS, invent_statistics, is_close_estimate, run

E4M3 = ml_dtypes.float8_e4m3fn


# The fp8 cache has the most of its own: its bytes reach attention. The others do not differ in what
# a slow test shows.
SLOW = ["fp8", *(pytest.param(cache, marks=pytest.mark.full) for cache in (None, "int8"))]


@pytest.fixture(scope="module")
def quantize(half_bundle, calibrated, tmp_path_factory):
    """Make the bundle with fp8 attention and a dtype of the cache, once."""
    folder = tmp_path_factory.mktemp("bundles")

    @functools.cache
    def bundle(dtype):
        directory = folder / f"{dtype}"
        quantize_bundle(half_bundle, directory, None, dtype, calibrated, attention="fp8")
        return directory

    return bundle


@pytest.fixture
def quantized(request, quantize):
    """Bundles with fp8 attention; of a test that names no dtype of the cache, in fp16."""
    return quantize(getattr(request, "param", None))


def operands(bundle, names, inputs):
    """What attention of a bundle's first layer reads, in fp32."""
    model = ir.load(bundle / DENOISER)
    attention = context_attentions(model.graph)[0]
    values = [*attention.inputs[:3], attention.outputs[0]]
    for name, value in zip(names, values):
        value.name = name
        model.graph.outputs.append(value)
    ir.save(model, bundle / "observed.onnx")
    spec = contract(oracle_config(read_manifest(bundle).config))["denoiser"]
    outputs = (*spec.outputs, *(spec.outputs[0].__class__(name, ()) for name in names))
    oracle = Oracle(bundle / "observed.onnx", msgspec.structs.replace(spec, outputs=outputs))
    return oracle.run(inputs)


def random_inputs(config, context=20, valid=None):
    spec = contract(oracle_config(config))["denoiser"]
    rng = np.random.default_rng(1)
    sizes = {"N": config.block_tokens, "C": context}
    inputs = {}
    for tensor in spec.inputs:
        shape = [sizes.get(str(n), n) for n in tensor.shape]
        small = tensor.dtype in ("int8", "float8_e4m3fn")
        array = rng.integers(-100, 101, shape) if small else rng.standard_normal(shape)
        inputs[tensor.name] = array.astype(tensor.dtype)
    inputs["kv_len"] = np.array([config.block_tokens + (context if valid is None else valid)])
    inputs["timestep"] = np.array([500], np.float32)
    return inputs


@pytest.mark.parametrize("quantized", [None, "int8", "fp8"], indirect=True)
def test_attention_reads_values_of_fp8_by_scales_that_reach_the_largest(
    half_bundle, calibrated, quantized, tmp_path
):
    config = read_manifest(quantized).config
    assert config.precision.attention == "fp8"
    cache = config.precision.cache
    statistics = load_statistics(calibrated, read_manifest(half_bundle))
    fitted = fit_cache_scales(statistics, CACHE_RECIPES[cache]) if cache != "fp16" else {}
    scales = attention_scales(statistics, config, fitted)
    if not fitted:
        q, k, v = (statistics[f"{operand}.largest"] for operand in ATTENTION_OPERANDS)
        ends = [np.linalg.norm(part, axis=-1) for part in (q, k)]
        for scale, end in zip(scales, (*ends, v.max(-1))):
            np.testing.assert_allclose(scale * 448, end, rtol=1e-6)
    copy = shutil.copytree(quantized, tmp_path / "copy")
    names = ("q", "k", "v", "attended")
    outputs = operands(copy, names, random_inputs(config))
    for name, scale in zip(names, scales):
        steps = outputs[name] / np.float32(np.float16(scale[0].max()))
        np.testing.assert_allclose(steps.astype(E4M3).astype(np.float32), steps, rtol=1e-6)
        assert len(np.unique(steps)) > 20
    if cache == "fp8":  # the context's values reach attention as they are
        stored = random_inputs(config)["v_ctx.0"].astype(np.float32)
        np.testing.assert_array_equal(outputs["v"][:, :, config.block_tokens :], stored)
        assert scales[2].max() == scales[2].min() == 1


@pytest.mark.parametrize("size", [6, 32, 96, 128])
def test_the_mixing_matrix_is_orthogonal_and_spreads_every_channel(size):
    matrix = mixing_matrix(size)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    assert np.abs(matrix).max() <= math.sqrt(2 / size) + 1e-12


@pytest.mark.parametrize("softmax", [None, "normalized", "relative"])
def test_the_written_out_softmax_is_the_formula_s(softmax, quantized, tmp_path):
    """By NumPy in double precision, with the context cut at its valid end."""
    directory = shutil.copytree(quantized, tmp_path / "attention")
    config, names = read_manifest(directory).config, ("q", "k", "v", "attended")
    inputs = random_inputs(config, valid=7)
    outputs = operands(directory, names, inputs)
    spec = contract(oracle_config(config))["denoiser"]
    model = ir.load(directory / DENOISER)
    attended = context_attentions(model.graph)[0].outputs[0]
    (reader,) = attended.consumers()
    write_out_attention(model.graph, softmax)
    value = reader.inputs[0]
    value.name, value.dtype = "attended", ir.DataType.FLOAT16
    model.graph.outputs.append(value)
    ir.save(model, tmp_path / "written.onnx")
    spec = msgspec.structs.replace(
        spec, outputs=(*spec.outputs, spec.outputs[0].__class__("attended", ()))
    )
    written = Oracle(tmp_path / "written.onnx", spec).run(inputs)["attended"]
    q, k, v = (outputs[name].astype(np.float64) for name in names[:3])
    valid = config.block_tokens + 7
    scores = q @ k[:, :, :valid].swapaxes(-1, -2) / math.sqrt(config.head_dim)
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    total = exponentials.sum(-1, keepdims=True)

    def rounded(values):
        scale = float(np.float16(1 / 448))
        return (values / scale).astype(np.float32).astype(E4M3).astype(np.float64) * scale

    v = v[:, :, :valid]
    expected = {
        None: exponentials / total @ v,
        "normalized": rounded(exponentials / total) @ v,
        "relative": rounded(exponentials) @ v / total,
    }
    error = {name: np.abs(array - written).mean() for name, array in expected.items()}
    assert min(error, key=lambda name: error[name]) == softmax
    # a last bit of fp32 decides now and then between two values of fp8
    assert error[softmax] < 0.1 * min(e for name, e in error.items() if name != softmax)


@pytest.mark.parametrize("quantized", SLOW, indirect=True)
def test_a_bundle_with_fp8_attention_is_verified_and_rendered(quantized):
    verification = verify_bundle(quantized)
    assert verification.missed == []
    runs = {check.run for check in verification.checks if check.graph == "denoiser"}
    assert runs == {"onnxruntime", "rounded", "softmax, normalized", "softmax, relative"}
    with Session.open(quantized) as session:
        frames = np.concatenate(list(session.stream(CALIBRATION_PROMPTS[0], seconds=3)))
    assert frames.std() > 1


def test_verify_finds_a_scale_that_is_wrong(quantized, tmp_path):
    copy = shutil.copytree(quantized, tmp_path / "copy")
    spec = contract(oracle_config(read_manifest(copy).config))["denoiser"]
    inputs = random_inputs(read_manifest(copy).config)
    sound = Oracle(copy / DENOISER, spec, softmax="normalized").run(inputs)["flow"]
    model = ir.load(copy / DENOISER)
    scale = model.graph.initializers["attention.k.1.scale"]
    scale.const_value = ir.tensor((scale.const_value.numpy() / 64).astype(np.float16))
    ir.save(model, copy / DENOISER)
    wrong = Oracle(copy / DENOISER, spec, softmax="normalized").run(inputs)["flow"]
    assert np.abs(wrong - sound).max() > 0


def test_it_needs_statistics_that_have_attention_s(half_bundle, calibrated, tmp_path):
    with pytest.raises(CalibrationError, match="needs activation statistics"):
        quantize_bundle(half_bundle, tmp_path / "out", attention="fp8")
    source, statistics = read_statistics(calibrated)
    old = {name: array for name, array in statistics.items() if "attention." not in name}
    path = tmp_path / "old.safetensors"
    save_file(old, path, {SOURCE_KEY: msgspec.json.encode(source).decode()})
    with pytest.raises(CalibrationError, match="collect them again with 'packforcing calibrate'"):
        quantize_bundle(half_bundle, tmp_path / "out", attention="fp8", calibration=path)
    quantize_bundle(half_bundle, tmp_path / "cache", cache="int8", calibration=path)


def test_it_is_quantized_once(quantized, calibrated, tmp_path):
    with pytest.raises(ConfigError, match="has attention in fp8 already"):
        quantize_bundle(quantized, tmp_path, attention="fp8", calibration=calibrated)


@pytest.mark.parametrize("target", ["sm75", "sm80", "sm86"])
def test_targets_without_fp8_are_refused(target):
    precision = Precision(compute="fp16", weights="fp16", cache="fp16", attention="fp8")
    with pytest.raises(ConfigError, match=f"{target} has no fp8 for the attention; it has fp32"):
        check_target(precision, target)
    check_target(precision, "sm89")


def test_commands_name_it(quantized):
    shown = run("inspect", quantized).stdout
    assert "attention fp8, other arithmetic fp16" in shown


# Engines


@pytest.fixture(scope="module")
def builder():
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX, which builds without a GPU")
    from packforcing.export import builder, engines

    return builder, engines


def denoiser_job(bundle, engines, tmp_path, targets):
    from packforcing.runtime.engine_records import Key, shapes

    manifest = read_manifest(bundle)
    key = Key(
        graph={}, tool="", targets=targets, shapes=shapes(manifest.config, "denoiser"),
        length="input",
    )  # fmt: skip
    job = engines.build_job(manifest, "tensorrt-rtx", "denoiser", key, tmp_path / "d.engine")
    return msgspec.structs.replace(job, graph=str(bundle / job.graph))


@pytest.mark.parametrize("quantized", SLOW, indirect=True)
def test_an_engine_runs_attention_in_fp8(builder, quantized, tmp_path):
    job = denoiser_job(quantized, builder[1], tmp_path, ("sm89", "sm120"))
    kernels = builder[0].build_engine(job).kernels
    layers = read_manifest(quantized).config.layers
    attention = {(k.call, k.operands): k.count for k in kernels if k.kind == "attention"}
    assert attention == {
        (call, (dtype,) * 3): layers
        for call in ("denoiser.block", "denoiser.compressed")
        for dtype in ("fp16", "fp8")  # over the text, over the context
    }


def test_an_engine_whose_softmax_is_left_alone_is_refused(builder, quantized, tmp_path):
    """The builder takes a kernel in fp16 without a word."""
    job = denoiser_job(quantized, builder[1], tmp_path, ("sm89",))
    with pytest.raises(
        BackendError, match=r"attention of denoiser\.block was to run in fp8 \(4 kernels\), but .*"
    ):
        builder[0].build_engine(msgspec.structs.replace(job, softmax=None))


@pytest.mark.full
def test_the_full_model_runs_attention_and_products_in_fp8(builder, tmp_path, capsys):
    """fp8 attention, weights and cache: every type as named, and no more scratch than in fp16."""
    config = MODELS["wan-1.3b"]
    export_bundle(config, random_weights(config), tmp_path / "fp16")
    statistics = invent_statistics(tmp_path / "fp16", tmp_path / "s.safetensors")
    quantize_bundle(tmp_path / "fp16", tmp_path / "fp8", "fp8", "fp8", statistics, attention="fp8")
    built = {}
    for name in ("fp8", "fp16"):
        job = denoiser_job(tmp_path / name, builder[1], tmp_path, ("sm89", "sm120"))
        built[name] = builder[0].build_engine(job)
        (tmp_path / "d.engine").unlink()
        with capsys.disabled():
            print("", name, "scratch", built[name].scratch, "weights", built[name].weights)
            for entry in built[name].kernels:
                print(" ", entry)
    assert max(built["fp8"].scratch) <= max(built["fp16"].scratch)
    estimates = scratch_bytes(read_manifest(tmp_path / "fp8").config)
    for call, size in zip(("denoiser.block", "denoiser.compressed"), built["fp8"].scratch):
        assert is_close_estimate(call, estimates[call], size, 40 << 20)
    matrices = sum(math.prod(shape) for shape in layer_matrices(config)) * (config.layers - 2)
    for call in ("denoiser.block", "denoiser.compressed"):
        amounts = {
            (k.kind, *k.operands): k.weights or k.count
            for k in built["fp8"].kernels
            if k.call == call
        }
        assert amounts["attention", "fp8", "fp8", "fp8"] == config.layers
        assert amounts["attention", "fp16", "fp16", "fp16"] == config.layers  # over the text
        assert amounts["product", "fp8", "fp8"] == matrices
