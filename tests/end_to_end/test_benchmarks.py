"""The ablations behind docs/results/ run, and their numbers hold what theory demands."""

from pathlib import Path

import pytest

from benchmarks import ablate_attention
from benchmarks.ablate_attention import Scheme as Attention
from benchmarks.ablate_cache import SCHEMES, Scheme, measure_schemes
from benchmarks.ablate_layers import measure_parts, measure_products
from benchmarks.against import time_against
from benchmarks.compare_quantizers import measure_tools
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


def test_two_checkouts_are_timed_in_one_run():
    root = Path(__file__).parents[2]
    times = time_against(root, threads=1, blocks=4)
    for figure in ("ms_per_block", "import_seconds"):
        this, other, ratio = (times[figure][name] for name in ("this", "other", "ratio"))
        assert this > 0 and other > 0
        assert ratio == pytest.approx(this / other, abs=0.01)
