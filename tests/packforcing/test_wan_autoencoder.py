"""Wan's autoencoder as a stream, against diffusers' own on whole clips; the scale of latents."""

from __future__ import annotations

import math
import re

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner

from packforcing import Policy
from packforcing.app.cli import main
from packforcing.autoencoder import LATENT_MEAN, LATENT_STD, TinyAutoencoder
from packforcing.errors import ConfigError, PlanError
from packforcing.export import export_bundle
from packforcing.geometry import decoder_state_shapes, encoder_state_shapes, operations, parameters
from packforcing.model import load_model, random_model, random_weights, weight_shapes
from packforcing.presets import PAPER, with_autoencoder
from packforcing.reference import rollout
from packforcing.runtime import Session
from packforcing.runtime.bundle import contract
from packforcing.runtime.estimate import weight_bytes
from packforcing.runtime.plan import choose_plan, estimates, make_plan
from packforcing.sampler import draw_noise
from packforcing.units import GIB
from packforcing.words import encode_words
from tests.helpers import TINY, builder_figures, is_close_estimate

pytest.importorskip("diffusers")
WAN = with_autoencoder(PAPER, "wan")
NARROW = {"vae": "wan", "vae_encoder_width": 4, "vae_decoder_widths": (16, 16, 8, 4)}
CONFIG = msgspec.structs.replace(
    TINY, **NARROW, latent_channels=16, layers=1, block_frames=2,
    policy=Policy(sink=1, mid=2, recent=1),
)  # fmt: skip
PROMPT, SEED = "a red circle over a blue stripes", 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random weights, of which the stream is told everything: biases, gains and all."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("wan") / "model.safetensors"
    save_file(dict(random_weights(CONFIG).items()), path)
    return load_model(CONFIG, path)


@pytest.fixture(scope="module")
def theirs(model):
    """diffusers' autoencoder with the same weights."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=CONFIG.vae_encoder_width, decoder_base_dim=CONFIG.vae_decoder_widths[-1]
    ).eval()
    vae.load_state_dict(model.autoencoder.state_dict())
    return vae.requires_grad_(False)


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("wan") / "bundle"
    export_bundle(CONFIG, model.weights(), directory)
    return directory


def latents(count):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 16, *CONFIG.latent_size, generator=generator)


def pixels(count):
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, 3, CONFIG.height, CONFIG.width, generator=generator)


def decoded(vae, latents):
    """A whole clip [T, C, h, w] by diffusers, from a model's latents to 1 + 4 (T - 1) frames."""
    raw = latents * LATENT_STD + LATENT_MEAN
    return vae.decode(raw.transpose(0, 1)[None]).sample[0].transpose(0, 1) / 2 + 0.5


def encoded(vae, frames):
    """A whole clip of 1 + 4 n frames by diffusers, to latents in a model's scale."""
    raw = vae.encode(2 * frames.transpose(0, 1)[None] - 1).latent_dist.mode()
    return (raw[0].transpose(0, 1) - LATENT_MEAN) / LATENT_STD


def test_decoding_a_latent_frame_at_a_time_is_decoding_the_whole_clip(model, theirs):
    """The first latent frame gives its one frame four times, so the three trimmed ones are it."""
    clip = latents(6)
    state, frames = model.autoencoder.decoder_state(), []
    for latent in clip:
        four, state = model.autoencoder.decode_frame(latent[None], state)
        frames.append(four)
    whole = decoded(theirs, clip)
    assert whole.std() > 0.05
    torch.testing.assert_close(torch.cat(frames)[3:], whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(frames[0], whole[:1].expand(4, -1, -1, -1), atol=1e-4, rtol=0)


def test_encoding_four_frames_at_a_time_is_encoding_the_whole_clip(model, theirs):
    """Of the first four only the last is seen, be the others noise; in one go, as the compressor
    does it, no less."""
    frames = pixels(20)
    state, result = model.autoencoder.encoder_state(CONFIG.height, CONFIG.width), []
    for four in frames.split(4):
        latent, state = model.autoencoder.encode_frame(four, state)
        result.append(latent)
    whole = encoded(theirs, frames[3:])
    assert whole.std() > 0.05
    torch.testing.assert_close(torch.cat(result), whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.autoencoder.encode(frames[None])[0], whole, atol=1e-4, rtol=0)


def test_sizes_are_the_published_ones():
    """194 tensors, 126,892,531 parameters, 944,286,720 numbers of state (SF: constant.py)."""
    shapes = {n: s for n, s in weight_shapes(WAN).items() if n.startswith("autoencoder.")}
    assert len(shapes) == 194
    assert sum(map(math.prod, shapes.values())) == 126_892_531
    *state, started = decoder_state_shapes(WAN)
    assert sum(map(math.prod, state)) == 944_286_720 and started == (1,)
    assert state.count((1, 384, 2, 60, 104)) == 11 and state.count((1, 96, 2, 480, 832)) == 7
    assert len(state) == 32 and len(encoder_state_shapes(WAN)) == 24 + 1
    assert 13.5e12 < operations(WAN)["vae_decoder"] < 13.6e12


@pytest.mark.parametrize("size", [(64, 96), (80, 112)])
def test_contract_knows_what_is_remembered(size):
    """Of diffusers' own list, whatever the size."""
    height, width = size
    config = msgspec.structs.replace(CONFIG, height=height, width=width)
    autoencoder = random_model(config).autoencoder
    states = autoencoder.decoder_state(), autoencoder.encoder_state(height, width)
    expected = decoder_state_shapes(config), encoder_state_shapes(config)
    assert [[tuple(past.shape) for past in state] for state in states] == list(expected)


def test_parameters_and_operations_are_those_of_the_modules():
    """By PyTorch's own count, on tensors without memory."""
    from torch.utils.flop_counter import FlopCounterMode

    def counted(module, *inputs):
        with FlopCounterMode(display=False) as counter:
            module(*inputs)
        return counter.get_total_flops()

    model = random_model(CONFIG)
    names = {name: tensor.numel() for name, tensor in model.autoencoder.state_dict().items()}
    result = parameters(CONFIG)
    assert result["vae_encoder"] + result["vae_decoder"] == sum(names.values())
    assert result["vae_decoder"] == sum(
        count for name, count in names.items() if name.startswith(("decoder.", "post_quant_conv."))
    )
    assert weight_bytes(WAN)["vae_decoder"] == 2 * 73_295_603
    autoencoder, (latent, *_) = model.autoencoder, latents(1)
    assert (
        counted(autoencoder.decode_frame, latent[None], autoencoder.decoder_state())
        == operations(CONFIG)["vae_decoder"]
    )
    clips = [torch.rand(spec.shape) for spec in contract(CONFIG)["compressor"].inputs]
    assert counted(model.compressor, *clips) == operations(CONFIG)["compressor"]


@pytest.mark.parametrize("name", ["vae_decoder", "vae_encoder"])
def test_graphs_give_what_the_modules_give(bundle, model, name):
    """Four calls on ONNX Runtime, each on the state of the one before."""
    spec, session = contract(CONFIG)[name], onnxruntime.InferenceSession(bundle / f"{name}.onnx")
    autoencoder = model.autoencoder
    if name == "vae_decoder":
        step, after, calls = autoencoder.decode_frame, autoencoder.decoder_state(), latents(4)
    else:
        step, calls = autoencoder.encode_frame, pixels(16)
        after = autoencoder.encoder_state(CONFIG.height, CONFIG.width)
    state = [past.numpy() for past in after]
    for call in calls.split(spec.inputs[0].shape[0]):
        expected, after = step(call, after)
        feed = zip((tensor.name for tensor in spec.inputs), (call.numpy(), *state))
        result, *state = session.run(None, dict(feed))
        np.testing.assert_allclose(result, expected, atol=1e-4)
        for past, other in zip(state, after):
            np.testing.assert_allclose(past, other, atol=1e-4 * max(1, other.abs().max()))


def test_a_bundle_renders_what_the_reference_does(bundle, model, theirs):
    """Starting from a clip, so that encoder, decoder, compressor and transformer all take part:
    its first frame is a latent frame of its own."""
    rng = np.random.default_rng(0)
    start = rng.integers(0, 256, (1 + 4 * 3, CONFIG.height, CONFIG.width, 3), np.uint8)
    clip = encoded(theirs, torch.from_numpy(start).permute(0, 3, 1, 2) / 255)
    noise = lambda block, step: draw_noise(CONFIG, SEED, block, step)  # noqa: E731
    text = torch.from_numpy(encode_words(PROMPT, CONFIG))
    blocks = list(rollout(model, text, 6, noise, seed=SEED, clip=clip))
    assert any(block.read for block in blocks)
    expected = decoded(theirs, torch.cat([block.latents for block in blocks]))
    with Session.open(bundle) as session:
        seconds = len(expected) / CONFIG.fps
        result = np.concatenate(list(session.stream(PROMPT, seconds, SEED, start=start)))
    assert result.shape == (len(expected), CONFIG.height, CONFIG.width, 3)
    assert np.abs(result / 255 - expected.permute(0, 2, 3, 1).numpy()).max() < 0.01


def test_lighttae_works_in_the_scale_of_wans_latents():
    """taew2_1 is given z, lighttaew2_1 z std + mean; backwards, (latent - mean) / std. Channel 7:
    0.5 x 2.0743 + 1.5508 = 2.58795."""
    config = msgspec.structs.replace(CONFIG, vae="taehv", vae_decoder_widths=(8, 8, 8, 8))
    plain = TinyAutoencoder(config)
    light = TinyAutoencoder(msgspec.structs.replace(config, vae="lighttae"))
    light.load_state_dict(plain.state_dict())
    z = torch.full((1, 16, *config.latent_size), 0.5)
    raw = z * LATENT_STD + LATENT_MEAN
    assert raw[0, 7, 0, 0].item() == pytest.approx(2.58795)
    assert raw[0, 0, 0, 0].item() == pytest.approx(0.5 * 2.8184 - 0.7571)
    state = plain.decoder_state()
    for result, expected in zip(light.decode_frame(z, state), plain.decode_frame(raw, state)):
        torch.testing.assert_close(result, expected)
    torch.testing.assert_close(light.decode(z[None]), plain.decode(raw[None]))
    frames, state = pixels(4), plain.encoder_state(config.height, config.width)
    expected = (plain.encode_frame(frames, state)[0] - LATENT_MEAN) / LATENT_STD
    torch.testing.assert_close(light.encode_frame(frames, state)[0], expected)
    torch.testing.assert_close(light.encode(frames[None])[0], expected)


@torch.inference_mode()
def test_a_graph_of_lighttae_has_the_scale_in_it(tmp_path):
    """The runtime knows nothing of it."""
    from packforcing.export.exporter import save_graph
    from packforcing.export.graphs import export_graph

    config = msgspec.structs.replace(CONFIG, vae="lighttae", vae_decoder_widths=(8, 8, 8, 8))
    weights = random_weights(config)
    save_graph(export_graph(config, weights, "vae_decoder"), tmp_path / "decoder.onnx")
    autoencoder = TinyAutoencoder(config)
    own = {name: weights[f"autoencoder.{name}"] for name in autoencoder.state_dict()}
    autoencoder.load_state_dict(own)
    z, state = latents(1), autoencoder.decoder_state()
    names = [tensor.name for tensor in contract(config)["vae_decoder"].inputs]
    session = onnxruntime.InferenceSession(tmp_path / "decoder.onnx")
    result = session.run(None, dict(zip(names, (z.numpy(), *(past.numpy() for past in state)))))[0]
    np.testing.assert_allclose(result, autoencoder.decode_frame(z, state)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 4}, "'wan' needs 16 latent_channels"),
        ({"vae_patch": 2}, "'wan' needs 16 latent_channels and a vae_patch of 1"),
        ({"vae_strips": 6}, "needs vae_strips of 1"),
        ({"vae_decoder_widths": (12, 16, 8, 8)}, "even multiples of the last"),
    ],
)
def test_a_config_that_wans_autoencoder_cannot_have_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        msgspec.structs.replace(CONFIG, **changes)


# Plans


def test_a_plan_counts_the_state_twice():
    """944,286,720 numbers and the one that says whether they count, in fp16, in and out."""
    assert make_plan(WAN, "sm86").device["autoencoder_state"] == 2 * 2 * 944_286_721


def test_wans_autoencoder_is_chosen_only_where_nothing_else_goes():
    """A byte less than it takes with all else whole, and the tiny one is planned with."""
    enough = make_plan(WAN, "sm86").total
    assert choose_plan(PAPER, "sm86", enough, any_autoencoder=True).config == WAN
    less = choose_plan(PAPER, "sm86", enough - 1, any_autoencoder=True)
    assert less.config == PAPER and less.total < enough
    assert choose_plan(PAPER, "sm86", enough).config == PAPER  # only if it may
    demo = msgspec.structs.replace(PAPER, vae_patch=2)  # its latents are not Wan's
    assert choose_plan(demo, "sm86", 80 * GIB, any_autoencoder=True).config == demo


def test_a_budget_too_small_for_wans_autoencoder_names_the_tiny_one():
    with pytest.raises(PlanError, match=r"or [\d.]+ with the tiny autoencoder") as caught:
        choose_plan(WAN, "sm86", 4 * GIB)
    named = re.search(r"or ([\d.]+) with the tiny", str(caught.value))
    assert float(named[1]) * GIB < caught.value.smallest


def test_the_command_says_which_autoencoder_fits():
    def plan(*options):
        result = CliRunner().invoke(main, ["plan", "--model", "wan-1.3b", *options])
        return result.stdout + result.stderr

    assert "fp16 cache, Wan's autoencoder" in plan("--budget", "16")
    eight = plan("--budget", "8")
    assert "fp16 cache, the tiny autoencoder" in eight and "total with Wan's autoencoder" in eight
    assert "tiny" not in plan("--vae", "wan") and "Wan's" not in plan("--vae", "taehv")
    rows = [line.split() for line in plan("--budget", "8,16").splitlines() if " + 16 + " in line]
    assert [row[-2] for row in rows[:2]] == ["taehv", "wan"]


@pytest.mark.parametrize(
    "size",
    [(256, 256), *(pytest.param(s, marks=pytest.mark.full) for s in [(832, 480), (640, 368)])],
)
def test_estimates_are_close_to_what_the_builder_says(size, tmp_path):
    width, height = size
    config = msgspec.structs.replace(
        WAN, layers=1, dim=64, heads=1, ffn_dim=64, width=width, height=height
    )
    expected = estimates(config)
    for graph in ("vae_decoder", "compressor"):
        (result,) = builder_figures(config, tmp_path, graph)
        assert all(
            is_close_estimate(f"wan.{width}.{name}", expected[name], size, 128 << 20)
            for name, size in result.items()
        )
