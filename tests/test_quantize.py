"""`packforcing quantize`: what becomes of each weight, and that everything downstream knows it."""

import json
import math
import shutil

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from packforcing.calibration.quantize import matrices, quantize_bundle, scales, stored
from packforcing.calibration.recipes import WEIGHTS
from packforcing.cli import main
from packforcing.errors import BundleError, ConfigError
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime.bundle import file_record, graph_file, read_manifest, write_manifest
from packforcing.runtime.estimate import weight_block
from tests.conftest import TINY

DENOISER = graph_file("denoiser")
DEEP = msgspec.structs.replace(TINY, name="deep", layers=4)
KINDS = ("int8", "int4")


@pytest.fixture(scope="module")
def half_bundle(tmp_path_factory):
    """Four layers in fp16, of which two can be quantised."""
    from packforcing.config import Precision
    from packforcing.export import export_bundle
    from packforcing.model import random_weights

    half = Precision(compute="fp16", weights="fp16", cache="fp16")
    config = msgspec.structs.replace(DEEP, precision=half)
    directory = tmp_path_factory.mktemp("bundles") / "deep"
    export_bundle(config, random_weights(config), directory)
    return directory


@pytest.fixture(scope="module", params=KINDS)
def quantised(request, half_bundle, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundles") / request.param
    quantize_bundle(half_bundle, directory, request.param)
    return directory


def weights(bundle) -> dict[str, np.ndarray]:
    """The layers' matrices as a MatMul reads them, DequantizeLinear by its definition."""
    graph = ir.load(bundle / DENOISER).graph
    config = read_manifest(bundle).config
    found = {}
    for node in graph:
        if node.op_type == "DequantizeLinear":
            numbers, scale = (value.const_value.numpy().astype(np.float32) for value in node.inputs)
            if node.attributes["axis"].as_int() == 0:
                scale = np.repeat(scale, node.attributes["block_size"].as_int(), axis=0)
            found[str(node.inputs[0].name).rpartition(".")[0]] = (
                numbers * scale,
                scale + 0 * numbers,
            )
    if found:
        return found
    return {
        name: stored(node.inputs[1]).const_value.numpy().astype(np.float32)
        for name, node in matrices(graph, config).items()
    }


def test_int8_is_off_by_half_a_step_at_most_and_int4_only_where_it_clips(half_bundle, quantised):
    kind = read_manifest(quantised).config.precision.weights
    exact, found = weights(half_bundle), weights(quantised)
    assert exact.keys() == found.keys() and len(exact) == 8 * (DEEP.layers - 2)
    for name, matrix in exact.items():
        read, step = found[name]
        assert not np.array_equal(read, matrix)
        within = np.abs(read - matrix) <= step * 0.5001
        if kind == "int4":
            recipe = WEIGHTS[kind]
            numbers = np.rint(read / step)
            within |= (numbers == recipe.high) & (matrix > read)
            within |= (numbers == recipe.low) & (matrix < read)
        assert within.all(), name


def test_all_else_is_what_it_was(half_bundle, quantised):
    before, after = (ir.load(path / DENOISER).graph for path in (half_bundle, quantised))
    names = before.initializers.keys() & after.initializers.keys()
    changed = set(matrices(before, read_manifest(half_bundle).config).values())
    assert len(names) == len(before.initializers) - len(changed)
    for name in names:
        one, two = (graph.initializers[name].const_value.numpy() for graph in (before, after))
        np.testing.assert_array_equal(one, two)
    old, new = read_manifest(half_bundle), read_manifest(quantised)
    assert new.graphs == old.graphs  # tensors between graphs are the same
    kind = new.config.precision.weights
    assert new.config == msgspec.structs.replace(
        old.config, precision=msgspec.structs.replace(old.config.precision, weights=kind)
    )
    others = [name for name in old.files if name != DENOISER]
    assert all(new.files[name] == old.files[name] for name in others)
    assert new.files[DENOISER].bytes < old.files[DENOISER].bytes


@pytest.mark.parametrize(("precision", "kind"), [("fp32", "int4"), ("fp16", "int8")])
def test_verify_passes_and_would_notice_activations_in_int8(precision, kind, half_bundle, tmp_path):
    """The oracle is the quantised graph in fp32. ONNX Runtime's own default is to round what
    quantised weights are multiplied with to int8: hundreds of times what is allowed."""
    from packforcing.export.verify import verify

    source = demo_bundle() if precision == "fp32" else half_bundle
    quantize_bundle(source, tmp_path / kind, kind)
    found = verify(tmp_path / kind)
    assert found.precision.weights == kind
    assert found.missed == []


@pytest.mark.parametrize(("kind", "least"), [("int8", 35), ("int4", 15)])
def test_the_demo_model_renders_with_quantised_weights(kind, least, tmp_path):
    out = tmp_path / kind
    result = CliRunner().invoke(
        main, ["quantize", str(demo_bundle()), "--weights", kind, "--out", str(out), "--json"]
    )
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    ratios = list(said["snr"].values())
    assert ratios == sorted(ratios) and len(ratios) == 32
    assert said["after"] < said["before"]
    videos = []
    for bundle in (demo_bundle(), out):
        with Session.open(bundle) as session:
            frames = session.stream("a green circle over gray dots", seconds=1)
            videos.append(np.concatenate(list(frames)).astype(np.float32))
    noise = np.mean(np.square(videos[0] - videos[1]))
    assert least < 10 * math.log10(255**2 / noise) < 80


@given(
    hnp.arrays(np.float32, (8, 3), elements=st.floats(-100, 100, width=32)),
    st.sampled_from(KINDS),
    st.sampled_from([4, 8]),
)
def test_no_weight_has_a_larger_error_than_the_least_clipping_leaves(matrix, kind, block):
    """Constant and empty channels included; int4 is at least as good as without clipping."""
    recipe = WEIGHTS[kind]
    scale, snr = scales(matrix, block, recipe, np.dtype(np.float16), "w")
    assert scale.shape == (8 // block, 3) and (scale > 0).all()
    step = np.repeat(scale.astype(np.float64), block, axis=0)
    read = np.clip(np.rint(matrix / step), recipe.low, recipe.high) * step
    largest = np.abs(matrix).reshape(-1, block, 3).max(1)
    plain = np.maximum((largest / recipe.high).astype(np.float16), np.float16(6e-8))
    coarse = np.repeat(plain.astype(np.float64), block, axis=0)
    rough = np.clip(np.rint(matrix / coarse), recipe.low, recipe.high) * coarse
    assert ((read - matrix) ** 2).sum() <= ((rough - matrix) ** 2).sum() * 1.001 + 1e-9
    assert snr > 0 or not matrix.any() or np.abs(matrix).max() < 1e-5


def test_blocks_are_never_cut():
    assert [weight_block("int4", *shape) for shape in ((192, 640), (640, 192))] == [64, 128]
    assert [weight_block("int4", *shape) for shape in ((1536, 8960), (8960, 1536))] == [128, 128]
    assert [weight_block("int8", *shape) for shape in ((192, 640), (640, 192))] == [96, 640]


def test_a_graph_with_its_weights_beside_it_can_become_one_without(
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
    monkeypatch.setattr("packforcing.export.bundle.LARGEST_INSIDE", 1000)
    quantize_bundle(source, tmp_path / "beside", "int8")
    assert f"{DENOISER}.data" not in read_manifest(tmp_path / "inside").files
    assert f"{DENOISER}.data" in read_manifest(tmp_path / "beside").files
    videos = []
    for name in ("inside", "beside"):
        with Session.open(tmp_path / name) as session:
            videos.append(np.concatenate(list(session.stream("a red star", seconds=0.5))))
    np.testing.assert_array_equal(*videos)


def test_mistakes_are_explained(half_bundle, quantised, tiny_bundle, tmp_path):
    with pytest.raises(ConfigError, match=r"holds int[48] weights already"):
        quantize_bundle(quantised, tmp_path / "out", "int8")
    with pytest.raises(ConfigError, match="choose another folder"):
        quantize_bundle(half_bundle, half_bundle, "int8")
    with pytest.raises(ConfigError, match="no layer between its first and its last"):
        quantize_bundle(tiny_bundle, tmp_path / "out", "int8")
    broken = shutil.copytree(half_bundle, tmp_path / "broken")
    model = ir.load(broken / DENOISER)
    value = stored(next(iter(matrices(model.graph, DEEP).values())).inputs[1])
    array = value.const_value.numpy().copy()
    array[3, 5] = np.nan
    value.const_value = ir.tensor(array, name=value.name)
    ir.save(model, broken / DENOISER)
    with pytest.raises(BundleError, match="damaged"):
        quantize_bundle(broken, tmp_path / "out", "int8")
    manifest = read_manifest(broken)
    manifest.files[DENOISER] = file_record(broken / DENOISER)
    write_manifest(broken, manifest)
    with pytest.raises(BundleError, match=r"blocks\.1\.self_attn\.q holds weights that are no num"):
        quantize_bundle(broken, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(
        main, ["quantize", str(quantised), "--weights", "int8", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 2 and "already" in result.stderr
