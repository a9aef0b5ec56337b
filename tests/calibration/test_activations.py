"""Activation statistics: those of the reference model's rollout, resumed, and never of NaN."""

import math
import re
import shutil
from functools import partial

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from packforcing.calibration.activations import (
    BINS,
    BINS_PER_OCTAVE,
    LOWEST_EXPONENT,
    SOURCE_KEY,
    add_cache_tokens,
    calibrate,
    call_names,
    load_statistics,
    read_statistics,
    second_moments,
)
from packforcing.calibration.quantizer import DENOISER, quantize_bundle
from packforcing.calibration.recipes import RECOMMENDED_PROMPTS
from packforcing.errors import CalibrationError, OutputError
from packforcing.files import file_record
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime.bundle import read_manifest, write_manifest
from packforcing.runtime.device import view
from packforcing.runtime.rollout import Rollout
from packforcing.sampler import StepOverrides
from tests.helpers import CALIBRATION_PROMPTS, TINY, run


@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_statistics_do_not_depend_on_how_tokens_are_split_into_calls(calls, tokens, seed):
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((calls, 2, tokens, 4)).astype(np.float32)
    keys *= 10 ** rng.uniform(-4, 2)
    statistics = {
        "k.largest": np.zeros((3, 2, 4), np.float32),
        "k.counts": np.zeros((3, 2, 4, BINS), np.uint32),
    }
    for call in keys:
        add_cache_tokens(statistics, "k", 1, call)
    magnitude = np.abs(keys).transpose(1, 3, 0, 2).reshape(2, 4, -1)
    np.testing.assert_array_equal(statistics["k.largest"][1], magnitude.max(-1))
    edges = 2.0 ** (np.arange(1, BINS) / BINS_PER_OCTAVE + LOWEST_EXPONENT)
    below = (magnitude[..., None] < edges).sum(2)
    counted_below = statistics["k.counts"][1].cumsum(-1)[..., :-1]
    assert np.abs(counted_below - below).max() <= 1  # of rounding
    for array in statistics.values():
        assert not array[[0, 2]].any()


def test_nan_in_a_key_is_refused():
    tokens = np.zeros((2, 5, 4), np.float32)
    tokens[1, 3, 2] = np.nan
    with pytest.raises(ValueError, match="k of layer 0, head 1, channel 2"):
        add_cache_tokens({"k.largest": np.zeros((1, 2, 4), np.float32)}, "k", 0, tokens)


def test_moments_of_matrix_inputs_are_those_of_the_reference_model(
    tiny_model, tiny_bundle, tmp_path
):
    """By hooks on the PyTorch model's own rollout, matrix by matrix."""
    import torch

    from packforcing.reference import rollout
    from packforcing.sampler import draw_noise
    from packforcing.words import encode_words

    prompt, seed, seconds = "a red star", 4, 11
    path = tmp_path / "s.safetensors"
    source = calibrate(tiny_bundle, [prompt], path, seconds=seconds, seed=seed)
    statistics = load_statistics(path, read_manifest(tiny_bundle))
    products, largest, tokens = {}, {}, []

    def hook(name, module, inputs):
        rows = inputs[0][0].numpy()
        if name == "blocks.0.ffn.0":
            tokens.append(len(rows))
        groups = rows.reshape(len(rows), -1, math.gcd(rows.shape[1], 128)).astype(np.float64)
        products[name] = products.get(name, 0) + np.einsum("nib,nic->ibc", groups, groups)
        largest[name] = np.maximum(largest.get(name, 0), np.abs(rows).max(0))

    modules = [
        module.register_forward_pre_hook(partial(hook, name))
        for name, module in tiny_model.transformer.named_modules()
        if name.startswith("blocks.") and not name.endswith(("cross_attn.k", "cross_attn.v"))
        if isinstance(module, torch.nn.Linear)
    ]
    text = torch.from_numpy(encode_words(prompt, TINY))
    noise = lambda block, step: draw_noise(TINY, seed, block, step)  # noqa: E731
    with torch.no_grad():
        list(rollout(tiny_model, text, source.blocks, noise, seed=seed))
    for module in modules:
        module.remove()
    assert len(products) == 8 * TINY.layers
    for name, sums in products.items():
        _, layer, matrix = name.split(".", 2)
        moments, expected = second_moments(statistics, int(layer), matrix), sums / sum(tokens)
        np.testing.assert_allclose(moments, expected, 1e-2, 1e-2 * expected.max(), err_msg=name)
        shared = matrix if f"{matrix}.largest" in statistics else "self_attn.q"
        np.testing.assert_allclose(
            statistics[f"{shared}.largest"][:, int(layer)].max(0), largest[name], rtol=1e-2
        )
    steps, blocks = len(TINY.timesteps), source.blocks
    full, small = blocks * TINY.block_tokens, (blocks - TINY.policy.sink) * TINY.compressed_tokens
    assert blocks > TINY.policy.capacity
    assert statistics["tokens"].tolist() == [full] * (steps + 1) + [small]
    assert source.calls == call_names(TINY) and len(source.calls) == steps + 2
    assert sum(tokens) == statistics["tokens"].sum()


def test_keys_are_observed_in_the_step_that_commits_them(tiny_bundle, tmp_path):
    """The largest of what a rollout under the same policy leaves in its cache and its archive."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    manifest, commit = read_manifest(bundle), StepOverrides(commit="last-step")
    config = commit.apply(manifest.config)
    config = msgspec.structs.replace(config, first_timesteps=config.timesteps[:2])
    write_manifest(bundle, msgspec.structs.replace(manifest, config=config))
    calibrate(bundle, ["a red star"], tmp_path / "s.safetensors", seconds=6)
    source, statistics = read_statistics(tmp_path / "s.safetensors")
    assert "commit" not in source.calls and len(source.calls) == len(config.timesteps) + 1
    largest = np.float32(0)

    class Watched(Rollout):
        def commit(self, **how):
            nonlocal largest
            block = self.cache.committed
            super().commit(**how)
            if block < source.blocks:
                committed = [view(self.buffers.new)]
                # not from the staging buffer, which the blocks selected next have passed through
                if block >= config.policy.sink:
                    committed.append(self.archive.get(block))
                for new in committed:
                    largest = np.maximum(largest, np.abs(new).max((2, 4)))

    with Session.open(bundle, make_rollout=Watched) as session:
        for _ in session.stream("a red star", 8):
            pass
    np.testing.assert_allclose(statistics["k.largest"], largest[:, 0], rtol=1e-5)
    np.testing.assert_allclose(statistics["v.largest"], largest[:, 1], rtol=1e-5)
    assert statistics["tokens"].tolist()[:2] == [source.blocks * config.block_tokens] * 2


def test_an_interrupted_calibration_resumes_to_the_same_statistics(
    half_bundle, calibrated, tmp_path
):
    path = tmp_path / "s.safetensors"

    def interrupt(done: int, total: int) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(half_bundle, CALIBRATION_PROMPTS, path, seconds=3, on_block=interrupt)
    assert read_statistics(path)[0].done == 1
    with pytest.raises(CalibrationError, match="1 of 2 rollouts"):
        load_statistics(path, read_manifest(half_bundle))
    calibrate(half_bundle, CALIBRATION_PROMPTS, path, seconds=3)
    (one, resumed), (two, expected) = read_statistics(path), read_statistics(calibrated)
    assert one == two
    for name, array in expected.items():
        np.testing.assert_array_equal(resumed[name], array)


def test_a_cache_fitted_to_few_prompts_is_warned_of(half_bundle, calibrated, tmp_path):
    def stderr(*args):
        result = run(*args)
        assert result.exit_code == 0, result.output
        return result.stderr

    options = "--cache", "int8", "--calibration", calibrated, "--out", tmp_path / "few"
    warning = stderr("quantize", half_bundle, *options, "--json")
    assert re.match(r"warning: statistics of 2 prompts: .* with \d+ or more\n$", warning)
    source, statistics = read_statistics(calibrated)
    many = msgspec.structs.replace(
        source, prompts=["x"] * RECOMMENDED_PROMPTS, done=RECOMMENDED_PROMPTS
    )
    save_file(statistics, tmp_path / "s", {SOURCE_KEY: msgspec.json.encode(many).decode()})
    options = "--cache", "int8", "--calibration", tmp_path / "s", "--out", tmp_path / "many"
    assert stderr("quantize", half_bundle, *options) == ""
    options = "--weights", "int4", "--calibration", calibrated, "--out", tmp_path / "weights"
    assert stderr("quantize", half_bundle, *options, "--json") == ""
    (tmp_path / "p").write_text("\n".join(CALIBRATION_PROMPTS))
    options = "--prompts", tmp_path / "p", "--out", calibrated, "--seconds", 3
    assert stderr("calibrate", half_bundle, *options, "--json") == warning


def test_a_missing_folder_is_refused_before_the_rollouts(half_bundle, tmp_path):
    with pytest.raises(OutputError, match="there is no folder"):
        calibrate(half_bundle, ["a red star"], tmp_path / "none" / "s.safetensors", seconds=3)


def test_no_prompts_are_refused(half_bundle, tmp_path):
    with pytest.raises(CalibrationError, match="no prompts"):
        calibrate(half_bundle, [], tmp_path / "s.safetensors")


def test_a_file_of_other_rollouts_is_not_overwritten(half_bundle, calibrated):
    with pytest.raises(CalibrationError, match="another model or other prompts"):
        calibrate(half_bundle, ["a red star"], calibrated, seconds=3)


def test_statistics_that_cannot_be_used_are_refused(half_bundle, calibrated, tmp_path):
    out, path = tmp_path / "out", tmp_path / "s.safetensors"
    with pytest.raises(CalibrationError, match=r"a quantized cache needs .* --calibration"):
        quantize_bundle(half_bundle, out, None, "int8")
    with pytest.raises(CalibrationError, match=r"fp8 needs activation statistics.* --calibration"):
        quantize_bundle(half_bundle, out, "fp8")
    with pytest.raises(CalibrationError, match="cannot read statistics"):
        quantize_bundle(half_bundle, out, None, "int8", path)
    with pytest.raises(CalibrationError, match="of another model"):
        quantize_bundle(demo_bundle(), out, None, "int8", calibrated)
    source, statistics = read_statistics(calibrated)
    metadata = {SOURCE_KEY: msgspec.json.encode(source).decode()}
    save_file({**statistics, "tokens": statistics["tokens"][1:]}, path, metadata)
    with pytest.raises(CalibrationError, match="other arrays than its metadata states"):
        quantize_bundle(half_bundle, out, "int4", None, path)
    statistics["cross_attn.o.moments"][2] = 0
    save_file(statistics, path, metadata)
    with pytest.raises(CalibrationError, match=r"input of blocks\.2\.cross_attn\.o was zero"):
        quantize_bundle(half_bundle, out, "int4", None, path)
    assert not out.exists()


def test_nan_in_a_rollout_is_reported_with_its_call_and_matrix(half_bundle, tmp_path):
    broken = shutil.copytree(half_bundle, tmp_path / "broken")
    model = ir.load(broken / DENOISER)
    name = next(n for n in model.graph.initializers if "blocks.2.self_attn.v.bias" in n)
    value = model.graph.initializers[name]
    array = value.const_value.numpy().copy()
    array[1] = np.nan
    value.const_value = ir.tensor(array, name=name)
    ir.save(model, broken / DENOISER)
    manifest = read_manifest(broken)
    manifest.files[DENOISER] = file_record(broken / DENOISER)
    write_manifest(broken, manifest)
    prompts, out = tmp_path / "prompts.txt", tmp_path / "s.safetensors"
    prompts.write_text("a red star\n")
    result = run("calibrate", broken, "--prompts", prompts, "--out", out)
    assert result.exit_code == 2
    location = "step 1 of block 0 of 'a red star': input channel 1 of blocks.2.self_attn.o"
    assert f"NaN or infinity in {location}" in result.stderr
    assert not out.exists()
