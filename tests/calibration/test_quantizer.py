"""Quantized bundles as a whole: rendered, verified, built, refused."""

import json
import math
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

from packforcing import MODELS
from packforcing.app.reports.verify import write_reports
from packforcing.calibration.activations import calibrate
from packforcing.calibration.matmuls import layer_matmuls, stored_weight
from packforcing.calibration.quantizer import DENOISER, quantize_bundle
from packforcing.calibration.recipes import INPUT_RECIPES, WEIGHT_RECIPES
from packforcing.calibration.weights import quantize_matrices
from packforcing.config import Config, Precision
from packforcing.errors import BundleError, CalibrationError, ConfigError
from packforcing.export import export_bundle
from packforcing.export.exporter import save_graph
from packforcing.export.graphs import export_graph
from packforcing.export.verify import verify_bundle
from packforcing.files import file_record
from packforcing.geometry import layer_matrices, quantized_layers
from packforcing.model import random_weights
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime.bundle import read_manifest, write_manifest
from packforcing.runtime.plan import TARGETS, choose_plan, make_plan
from packforcing.units import GIB
from tests.helpers import (
    CALIBRATION_PROMPTS,
    DEEP,
    builder_job,
    invent_statistics,
    random_statistics,
    run,
    run_measured,
)


@pytest.mark.parametrize(
    ("dtype", "least_psnr"),
    [("int8", 35), ("w8a8", 25), ("int4", 15), ("fp8", 25), ("nvfp4", 13)],
)
def test_the_demo_model_renders_with_quantized_weights(dtype, least_psnr, tmp_path):
    out, prompts, statistics = (tmp_path / name for name in (dtype, "prompts", "s.safetensors"))
    options = ["--weights", dtype, "--out", out, "--json"]
    if dtype in INPUT_RECIPES:
        prompts.write_text("a red star over navy stripes\n")
        calibration = "--prompts", prompts, "--seconds", "1", "--out", statistics
        result = run("calibrate", demo_bundle(), *calibration)
        assert result.exit_code == 0, result.output
        options += ["--calibration", statistics]
    result = run("quantize", demo_bundle(), *options)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    ratios = list(answer["snr"].values())
    assert ratios == sorted(ratios) and len(ratios) == (40 if dtype == "int4" else 32)
    assert answer["after"] < answer["before"]
    videos = []
    for bundle in (demo_bundle(), out):
        with Session.open(bundle) as session:
            frames = session.stream("a green circle over gray dots", seconds=1)
            videos.append(np.concatenate(list(frames)).astype(np.float32))
    noise = np.mean(np.square(videos[0] - videos[1]))
    assert least_psnr < 10 * math.log10(255**2 / noise) < 80


@pytest.mark.parametrize(
    ("weights", "cache"),
    [("int4", "int8"), ("int8", "fp8"), ("fp8", "fp8"), ("w8a8", "int8"), ("nvfp4", "fp8")],
)
def test_quantized_weights_and_cache_combine(weights, cache, half_bundle, calibrated, tmp_path):
    quantize_bundle(half_bundle, tmp_path / "both", weights, cache, calibrated)
    verification = verify_bundle(tmp_path / "both")
    write_reports(tmp_path, verification)
    assert (verification.precision.weights, verification.precision.cache) == (weights, cache)
    assert verification.missed == []
    with Session.open(tmp_path / "both") as session:
        frames = np.concatenate(list(session.stream(CALIBRATION_PROMPTS[0], seconds=3)))
    assert frames.std() > 1


def test_weights_move_into_and_out_of_the_graph_s_file_by_their_size(
    half_bundle, tmp_path, monkeypatch
):
    source = shutil.copytree(half_bundle, tmp_path / "large")
    model = ir.load(source / DENOISER)
    ir.save(model, source / DENOISER, external_data=f"{DENOISER}.data")
    manifest = read_manifest(source)
    for name in (DENOISER, f"{DENOISER}.data"):
        manifest.files[name] = file_record(source / name)
    write_manifest(source, manifest)
    quantize_bundle(source, tmp_path / "inside", "int8")
    monkeypatch.setattr("packforcing.export.exporter.INLINE_BYTES", 1000)
    quantize_bundle(source, tmp_path / "beside", "int8")
    assert f"{DENOISER}.data" not in read_manifest(tmp_path / "inside").files
    assert f"{DENOISER}.data" in read_manifest(tmp_path / "beside").files
    videos = []
    for name in ("inside", "beside"):
        with Session.open(tmp_path / name) as session:
            videos.append(np.concatenate(list(session.stream("a red star", seconds=0.5))))
    np.testing.assert_array_equal(*videos)


def test_a_quantized_bundle_is_neither_quantized_nor_calibrated_again(quantized, tmp_path):
    with pytest.raises(ConfigError, match=r"has weights in \w+ already"):
        quantize_bundle(quantized, tmp_path / "out", "int8")
    with pytest.raises(CalibrationError, match=r"has weights in \w+ already"):
        calibrate(quantized, CALIBRATION_PROMPTS, tmp_path / "s.safetensors")
    result = run("quantize", quantized, "--weights", "int8", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "already" in result.stderr
    assert not (tmp_path / "out").exists()


def test_requests_that_cannot_work_are_refused(half_bundle, tiny_bundle, tmp_path):
    with pytest.raises(ConfigError, match="nothing to quantize"):
        quantize_bundle(half_bundle, tmp_path / "out")
    with pytest.raises(ConfigError, match="choose another folder"):
        quantize_bundle(half_bundle, half_bundle, "int8")
    with pytest.raises(ConfigError, match="no layer between its first and its last"):
        quantize_bundle(tiny_bundle, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


def test_nan_in_a_weight_is_refused(half_bundle, tmp_path):
    broken = shutil.copytree(half_bundle, tmp_path / "broken")
    model = ir.load(broken / DENOISER)
    matmul = layer_matmuls(model.graph, DEEP, quantized_layers(DEEP))["blocks.1.self_attn.q"]
    value = stored_weight(matmul)
    array = value.const_value.numpy().copy()
    array[3, 5] = np.nan
    value.const_value = ir.tensor(array, name=value.name)
    ir.save(model, broken / DENOISER)
    with pytest.raises(BundleError, match="damaged"):
        quantize_bundle(broken, tmp_path / "out", "int8")
    manifest = read_manifest(broken)
    manifest.files[DENOISER] = file_record(broken / DENOISER)
    write_manifest(broken, manifest)
    with pytest.raises(BundleError, match=r"blocks\.1\.self_attn\.q has weights that are NaN"):
        quantize_bundle(broken, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


# Against the builder


def test_fp8_is_built_for_gpus_that_have_it_and_refused_for_others(
    half_bundle, calibrated, tmp_path
):
    pytest.importorskip("tensorrt_rtx")
    from packforcing.export.engines import build_engines

    bundle = tmp_path / "fp8"
    quantize_bundle(half_bundle, bundle, "fp8", "fp8", calibrated)
    with pytest.raises(ConfigError, match="sm86 has no fp8 for the weights; it has fp32, fp16, in"):
        build_engines(bundle)
    assert not (bundle / "engines").exists()
    built = build_engines(bundle, ["sm89", "sm120"])
    assert built["denoiser"].key.targets == ("sm89", "sm120")


@pytest.fixture(scope="module")
def wide_denoiser(tmp_path_factory) -> tuple[Config, Path]:
    """A denoiser in fp16, wide enough for every kind of product; random weights."""
    half = Precision(compute="fp16", weights="fp16", cache="fp16")
    sizes = {"dim": 128, "heads": 2, "ffn_dim": 256, "layers": 3}
    config = msgspec.structs.replace(DEEP, precision=half, **sizes)
    path = tmp_path_factory.mktemp("wide") / DENOISER
    save_graph(export_graph(config, random_weights(config), "denoiser"), path)
    return config, path


@pytest.mark.parametrize(("dtype", "target"), [("w8a8", "sm86"), ("nvfp4", "sm120")])
def test_products_run_in_the_dtype_of_the_weights(dtype, target, wide_denoiser, tmp_path):
    """All of them, by the builder's list, and no other products do."""
    pytest.importorskip("tensorrt_rtx")
    from packforcing.export.builder import build_engine
    from packforcing.export.engines import kernel_types

    config, exact = wide_denoiser
    precision = msgspec.structs.replace(config.precision, weights=dtype)
    config = msgspec.structs.replace(config, precision=precision)
    model = ir.load(exact)
    quantize_matrices(model, config, dtype, random_statistics(config))
    save_graph(model, tmp_path / DENOISER)
    job = builder_job(config, tmp_path / DENOISER, "denoiser")
    types = kernel_types(config)
    job = msgspec.structs.replace(job, targets=(target,), kernel_types=types)
    built = build_engine(job)
    products = precision.products
    count = sum(map(math.prod, layer_matrices(config)))
    for call in job.calls:
        amounts = {
            kernels.operands: kernels.weights
            for kernels in built.kernels
            if kernels.call == call and products in kernels.operands
        }
        assert amounts == {(products, products): count}


@pytest.mark.full
@pytest.mark.parametrize("layers", [4, 30])
def test_an_engine_takes_a_byte_or_half_of_one_per_quantized_weight(layers, tmp_path, capsys):
    """And no more scratch than in fp16; less of it with a quantized cache, as keys are nowhere
    both exact and divided by their scales. With few layers the builder makes another choice, so
    that is asserted for the whole model alone. Quantizing takes 6 GB of memory at most; its time
    is printed."""
    pytest.importorskip("tensorrt_rtx")
    from packforcing.export.engines import RTX_TARGETS, build_engines

    config = msgspec.structs.replace(MODELS["wan-1.3b"], layers=layers)
    export_bundle(config, random_weights(config), tmp_path / "fp16")
    statistics = invent_statistics(tmp_path / "fp16", tmp_path / "s.safetensors")
    built, lines = {}, []
    cached = (None, "int8"), ("int8", "int8"), ("int4", "int8"), ("fp8", "fp8"), ("nvfp4", "fp8")
    weights_alone = ((weights, None) for weights in WEIGHT_RECIPES)
    for weights, cache in ((None, None), *weights_alone, *cached):
        kind = ", ".join(filter(None, (weights, cache and f"cache {cache}"))) or "fp16"
        if kind != "fp16":
            dtypes = [
                f"--{part}={dtype}"
                for part, dtype in (("weights", weights), ("cache", cache))
                if dtype
            ]
            options = *dtypes, "--calibration", statistics, "--out", tmp_path / kind
            _, seconds, peak = run_measured("quantize", tmp_path / "fp16", *options)
            lines.append(f"quantize to {kind}: {seconds:.0f} s, {peak / 1e9:.2f} GB of memory")
            assert peak <= 6e9
        needed = {dtype for dtype in (weights, cache) if dtype}
        targets = [target for target in RTX_TARGETS if needed <= {*TARGETS[target]}]
        built[kind] = build_engines(tmp_path / kind, targets)["denoiser"]
    count = sum(map(math.prod, layer_matrices(config))) * (layers - 2)
    rest = built["fp16"].weights - 2 * count
    scratch = {kind: max(record.scratch.values()) for kind, record in built.items()}
    bytes_each = {kind: (built[kind].weights - rest) / count for kind in WEIGHT_RECIPES}
    with capsys.disabled():
        print("", *lines, sep="\n")
        print(f"{layers} layers: bytes per quantized weight {bytes_each}, scratch {scratch}")
        print("weights", {kind: record.weights for kind, record in built.items()})
    for dtype in ("int8", "w8a8", "fp8"):
        assert bytes_each[dtype] == pytest.approx(1, rel=0.02)
    assert bytes_each["nvfp4"] <= 0.57
    assert bytes_each["int4"] == pytest.approx(0.52, rel=0.02)
    with_cache = {kind: scratch.pop(kind) for kind in list(scratch) if "cache" in kind}
    assert max(scratch.values()) == scratch["fp16"]
    if config == MODELS["wan-1.3b"]:
        assert all(size < scratch["fp16"] for size in with_cache.values())


@pytest.mark.full
@pytest.mark.parametrize(
    ("targets", "requested"),
    [
        (("sm86", "sm89", "sm120"), None),
        (("sm120",), Precision(compute="fp16", weights="nvfp4", cache="fp8")),
    ],
)
def test_the_whole_history_of_the_full_model_fits_into_4_gib_as_built(
    targets, requested, tmp_path, capsys
):
    """In the precision and with the autoencoder that the plan for 4 GiB names, and in nvfp4."""
    pytest.importorskip("tensorrt_rtx")
    from packforcing.export.engines import build_engines

    planned = choose_plan(MODELS["wan-1.3b"], targets[0], 4 * GIB, precision=requested)
    config, precision = planned.config, planned.config.precision
    assert config.policy == MODELS["wan-1.3b"].policy and not planned.streamed
    half = Precision(compute="fp16", weights="fp16", cache="fp16")
    exact = msgspec.structs.replace(config, precision=half)
    export_bundle(exact, random_weights(exact), tmp_path / "fp16")
    statistics = invent_statistics(tmp_path / "fp16", tmp_path / "s.safetensors")
    small = tmp_path / "small"
    quantize_bundle(tmp_path / "fp16", small, precision.weights, precision.cache, statistics)
    records = build_engines(small, targets)
    built = {name: size for record in records.values() for name, size in record.figures.items()}
    scratch = max(records["denoiser"].scratch.values()) / 1e6
    lines = [
        f"{precision.weights} weights, {precision.cache} cache: {scratch:.1f} MB of scratch, "
        "GiB by the built figures"
    ]
    for target in targets:
        total = make_plan(config, target, built=built).total
        lines.append(f"{target}: {total / GIB:.3f} (planned {planned.total / GIB:.3f})")
        assert total <= 4 * GIB
    with capsys.disabled():
        print("", *lines, sep="\n")
