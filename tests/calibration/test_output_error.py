"""Losses of quantized outputs are those that the reference model gives."""

import math

import pytest

from packforcing.calibration.activations import calibrate, read_statistics
from packforcing.calibration.output_error import measure_output_losses
from packforcing.calibration.quantizer import quantize_bundle
from packforcing.calibration.recipes import CACHE_RECIPES, OutputLoss
from packforcing.calibration.scales import fit_cache_scales
from packforcing.export import export_bundle
from packforcing.export.oracle import PROMPT, SEED, recorded_blocks
from tests.helpers import CALIBRATION_PROMPTS, DEEP, quantized_matrices


def test_losses_of_outputs_are_those_of_the_reference_model(tmp_path):
    """Two transformers in PyTorch, side by side on the reference's own rollout: one with the
    exported weights, one with the dequantized ones, whose history and new keys and values are
    rounded to multiples of their scales."""
    import torch

    from packforcing.model import random_model
    from packforcing.reference import rollout
    from packforcing.sampler import draw_noise
    from packforcing.words import encode_words

    exact, rounded, bundle = random_model(DEEP), random_model(DEEP), tmp_path / "quantized"
    export_bundle(DEEP, exact.weights(), tmp_path / "deep")
    path = tmp_path / "s.safetensors"
    calibrate(tmp_path / "deep", CALIBRATION_PROMPTS, path, seconds=3)
    quantize_bundle(tmp_path / "deep", bundle, "int8", "int8", path)
    scales = fit_cache_scales(read_statistics(path)[1], CACHE_RECIPES["int8"])
    for name, (matrix, _) in quantized_matrices(bundle).items():
        weight = rounded.transformer.get_parameter(f"{name}.weight")
        weight.copy_(torch.from_numpy(matrix.T.copy()))
    signal, noise = {}, {}

    def round_tokens(tokens, kind, layer):
        scale = torch.from_numpy(scales[kind][layer][:, None].copy())
        return (tokens / scale).round().clamp(-128, 127) * scale

    def compare_with_rounded(module, inputs, outputs):
        tokens, extra, time, cross, rope, context, context_rope = inputs
        context = [
            tuple(map(round_tokens, pair, "kv", (layer, layer)))
            for layer, pair in enumerate(context)
        ]
        results = rounded.transformer(tokens, extra, time, cross, rope, context, context_rope)
        pairs = {"flow": (outputs[0], results[0])}
        if time == 0:
            pairs = {"q_pool": (outputs[2], results[2]), "k_pool": (outputs[3], results[3])}
            for layer, (new, old) in enumerate(zip(results[1], outputs[1])):
                for kind, a, b in zip("kv", old, new):
                    pairs[f"{kind}_new.{layer}"] = a, round_tokens(b, kind, layer)
        for name, (a, b) in pairs.items():
            signal[name] = signal.get(name, 0) + a.double().square().sum().item()
            noise[name] = noise.get(name, 0) + (a - b).double().square().sum().item()

    exact.transformer.register_forward_hook(compare_with_rounded)
    text, blocks = torch.from_numpy(encode_words(PROMPT, DEEP)), recorded_blocks(DEEP)[1] + 1
    draw = lambda block, step: draw_noise(DEEP, SEED, block, step)  # noqa: E731
    list(rollout(exact, text, blocks, draw, seed=SEED))
    losses = measure_output_losses(
        tmp_path / "deep", {"quantized": bundle, "same": tmp_path / "deep"}
    )
    assert losses["quantized"].keys() == signal.keys()
    for name, loss in losses["quantized"].items():
        assert loss.snr == pytest.approx(10 * math.log10(signal[name] / noise[name]), abs=0.1), name
        assert loss.error == pytest.approx((noise[name] / signal[name]) ** 0.5, rel=0.02), name
    assert all(loss == OutputLoss(None, 0.0) for loss in losses["same"].values())
    backwards = measure_output_losses(bundle, {"deep": tmp_path / "deep"})["deep"]
    assert backwards["flow"].snr == pytest.approx(losses["quantized"]["flow"].snr, abs=1)
