"""The ablations behind docs/results/ run, and their numbers hold what theory demands."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import ablate_attention, recall_per_byte
from benchmarks.ablate_attention import Scheme as Attention
from benchmarks.ablate_cache import SCHEMES, Scheme, measure_schemes
from benchmarks.ablate_layers import measure_parts, measure_products
from benchmarks.against import time_against
from benchmarks.compare_quantizers import measure_tools
from benchmarks.recall_per_byte import AveragedArchive, Result, differences, share_of_way
from packforcing import model_config
from packforcing.calibration.activations import calibrate, load_statistics
from packforcing.calibration.output_error import measure_output_losses
from packforcing.geometry import quantized_layers
from packforcing.runtime import demo_bundle
from packforcing.runtime.bundle import read_manifest
from tests.helpers import CALIBRATION_PROMPTS


@pytest.mark.full
def test_a_bit_more_of_cache_is_worth_6_db():
    costs = {
        bits: list(measure_schemes(demo_bundle(), prompts=1, fit=1, seconds=1, bits=bits))
        for bits in (8, 12)
    }
    unclipped = SCHEMES.index(Scheme("before RoPE", "token", "token", "per token", "absmax"))
    for part in (0, 2):  # keys, values; nothing is clipped, so all of the error is rounding
        gain = costs[12][unclipped].db[part] - costs[8][unclipped].db[part]
        assert gain == pytest.approx(4 * 6.02, abs=0.5)
    for cost in costs[8] + costs[12]:
        keys, worst_keys, values, worst_values = cost.db
        assert worst_keys <= keys and worst_values <= values


@pytest.mark.full
def test_every_part_with_matrices_loses_more_in_4_bits():
    costs = measure_parts(demo_bundle())
    layers = read_manifest(demo_bundle()).config.layers
    parts = {"time_embedding", "time_projection", "head", *(f"blocks.{n}" for n in range(layers))}
    assert {cost.part for cost in costs} == parts
    assert all(0 < cost.errors["int8"] < cost.errors["int4"] / 4 for cost in costs)


@pytest.mark.full
def test_every_product_loses_more_in_fp4_than_in_int8(tmp_path):
    statistics = tmp_path / "s.safetensors"
    calibrate(demo_bundle(), CALIBRATION_PROMPTS, statistics, seconds=1)
    costs = measure_products(demo_bundle(), statistics)
    inner = quantized_layers(read_manifest(demo_bundle()).config)
    assert [cost.matrices for cost in costs] == [8] * len(inner) + [len(inner)] * 8
    assert all(0 < cost.errors["w8a8"] < cost.errors["nvfp4"] for cost in costs)


@pytest.mark.full
def test_parts_of_attention_cost_less_than_all_and_noise_costs_as_it_is_large(
    tmp_path, monkeypatch
):
    calibrate(demo_bundle(), CALIBRATION_PROMPTS, tmp_path / "s.safetensors", seconds=1)
    statistics = load_statistics(tmp_path / "s.safetensors", read_manifest(demo_bundle()))
    schemes = [
        Attention(), Attention(softmax=None, operands=("attention.k",)), Attention(layer=0),
        Attention(parts=2), Attention(noise=1e-2), Attention(noise=1e-3),
    ]  # fmt: skip
    monkeypatch.setattr(ablate_attention, "schemes", lambda layers: schemes)
    variants = ablate_attention.write_variants(tmp_path, demo_bundle(), [], statistics)
    losses = measure_output_losses(demo_bundle(), {str(path): path for path in variants})
    whole, *parts, noisy, quiet = (losses[str(path)]["flow"].snr for path in variants)
    assert all(part > whole + 1 for part in parts)
    assert quiet - noisy == pytest.approx(20, abs=0.5)


def test_our_weights_are_no_worse_than_onnxruntimes():
    means = {
        (error.kind, error.tool): error.mean
        for error in measure_tools(demo_bundle(), prompts=1, seconds=1)
    }
    for kind in ("int8", "int4"):
        assert means[kind, "ours"] >= means[kind, "onnxruntime"] - 0.05


def recalled(recalls):
    return [Result(recall, 1.0, 1000) for recall in recalls]


def test_recall_is_compared_on_the_worlds_that_both_have():
    own, window, full = ([0.6, 0.7, None, 0.8], [0.0, 0.1, 0.2, 0.1], [0.8, 0.8, 0.9, None])
    assert differences(recalled(own), recalled(window)) == pytest.approx([0.6, 0.6, 0.7])
    way = share_of_way(recalled(own), recalled(window), recalled(full))
    assert (way.mean, way.prompts) == (pytest.approx((1.3 - 0.1) / (1.6 - 0.1)), 2)


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_averaged_tokens_keep_the_mean_of_a_block(tokens):
    config = model_config("demo")
    archive = AveragedArchive(config, 8)
    archive.tokens = tokens
    shape, pooled_shape = archive.key_values.shape[1:], archive.pooled_keys.shape[1:]
    stored = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    archive.put(1, stored, np.zeros(pooled_shape, np.float32), ())
    averaged = archive.get(1)
    assert len(np.unique(averaged[0, 0, 0, 0], axis=0)) == tokens
    np.testing.assert_allclose(averaged.mean(-2), stored.mean(-2), atol=1e-6)
    assert tokens < config.compressed_tokens or np.array_equal(averaged, stored)


@pytest.mark.full
def test_recall_is_measured_once_for_each_world(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["", "--out", str(tmp_path), *(
        ["--worlds", "2", "--others", "0", "--seconds", "20", "--seed", "1000"])])  # fmt: skip
    recall_per_byte.main()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "worlds").iterdir()}
    assert len(files) == 2 * recall_per_byte.COMPARED
    *_, first = capsys.readouterr().out.splitlines()
    recall_per_byte.main()
    *_, again = capsys.readouterr().out.splitlines()
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "worlds").iterdir()}
    assert "of the way from sink and window to full history" in first and first == again


def test_two_checkouts_are_timed_in_one_run():
    root = Path(__file__).parents[2]
    times = time_against(root, threads=1, blocks=4)
    for figure in ("ms_per_block", "import_seconds"):
        this, other, ratio = (times[figure][name] for name in ("this", "other", "ratio"))
        assert this > 0 and other > 0
        assert ratio == pytest.approx(this / other, abs=0.01)
