"""Blocks that are given, not generated: how a clip becomes them, and what the next one takes.

TAEHV's rule is stated in NumPy (`tests.golden.numpy_autoencoder` has its layers): `encode_video`
repeats a clip's last frame until its length is a multiple of four, `decode_video` drops the first
three frames. Causal-Forcing's rule is written as a table: its pipeline counts the blocks that it
generates, and the list of the first chunk is that of number 0.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from packforcing import Config, Policy
from packforcing.errors import RenderStopped, ResumeError
from packforcing.export.exporter import save_graph
from packforcing.export.graphs import export_graph
from packforcing.model import Model
from packforcing.prompts import Switch
from packforcing.reference import rollout
from packforcing.runtime import Session
from packforcing.runtime.backends.onnxruntime import OnnxGraph
from packforcing.runtime.bundle import contract
from packforcing.runtime.encoder import encode_start
from packforcing.runtime.rollout import Rollout
from packforcing.sampler import StepOverrides, draw_noise
from packforcing.words import encode_words
from tests.golden import cases as golden
from tests.golden.numpy_autoencoder import decode, encode
from tests.golden.numpy_rollout import rollout as numpy_rollout
from tests.golden.weights import draw_weights
from tests.helpers import PROMPT, SEED, TINY, frames_of, make_model, stop_after

# Autoencoders


WAN_LATENTS = {**golden.TINY, "latent_channels": 16}
WEIGHTS = draw_weights(WAN_LATENTS, seed=3)
# of Wan2.1's latents, per channel (vae.py of Wan2.1)
MEAN = np.array([
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
])[:, None, None]  # fmt: skip
STD = np.array([
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
])[:, None, None]  # fmt: skip


def tiny_config(vae: str, **changes) -> Config:
    policy = Policy(sink=1, mid=1, recent=1)
    return Config(**{**WAN_LATENTS, "policy": policy, "vae": vae, **changes})


def encode_video(frames: np.ndarray, vae: str) -> np.ndarray:
    """Encode frames [n, 3, H, W] in 0..1 as TAEHV does, to a model's latents."""
    padded = np.concatenate((frames, frames[-1:].repeat(-len(frames) % 4, 0)))
    latents = encode(WEIGHTS, padded)
    return (latents - MEAN) / STD if vae == "lighttae" else latents


def decode_video(latents: np.ndarray, vae: str) -> np.ndarray:
    """Decode a model's latents as TAEHV does, to 4 T - 3 frames."""
    return decode(WEIGHTS, latents * STD + MEAN if vae == "lighttae" else latents, {})[3:]


def random_clip(frames: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, 64, 96, 3), np.uint8)


@pytest.fixture(scope="module", params=["taehv", "lighttae"])
def encoder(request, tmp_path_factory) -> tuple[Config, OnnxGraph]:
    """The exported encoder of one of Wan's tiny autoencoders, with its config."""
    config = tiny_config(request.param)
    path: Path = tmp_path_factory.mktemp("encoder") / "vae_encoder.onnx"
    weights = make_model(config, WEIGHTS).weights()
    save_graph(export_graph(config, weights, "vae_encoder"), path)
    return config, OnnxGraph(path, contract(config)["vae_encoder"], threads=1)


@pytest.mark.parametrize("frames", [1, 5, 9, 12, 20, 21, 33])
def test_a_clip_is_shown_frame_for_frame_by_wans_tiny_autoencoders(encoder, frames):
    """Whatever the length, output frame k is what TAEHV shows of the clip's frame k.

    A clip is used in whole blocks of three latent frames: 9, 21 or 33 frames. A shorter one holds
    its last frame.
    """
    config, graph = encoder
    clip = random_clip(frames)
    start = encode_start(config, graph, clip, blocks=10)
    latents = start.reshape(-1, *start.shape[2:])
    pixels = clip[np.minimum(np.arange(max(9, frames)), frames - 1)].transpose(0, 3, 1, 2) / 255
    expected = decode_video(encode_video(pixels, config.vae), config.vae)
    shown = decode_video(latents, config.vae)
    assert len(shown) == {20: 9, 21: 21, 33: 33}.get(frames, 9)
    assert expected.std() > 0.05
    np.testing.assert_allclose(shown, expected[: len(shown)], atol=1e-4)


@torch.inference_mode()
def test_a_video_begins_with_its_start_clip_and_not_three_frames_late(encoder):
    config, graph = encoder
    clip = random_clip(21)
    pixels = clip.transpose(0, 3, 1, 2) / 255
    expected = decode_video(encode_video(pixels, config.vae), config.vae)
    latents = torch.from_numpy(encode_start(config, graph, clip, blocks=2)).flatten(0, 1)
    text = torch.zeros(1, config.text_len, config.text_dim)
    noise = lambda block, step: draw_noise(config, SEED, block, step)  # noqa: E731
    blocks = rollout(make_model(config, WEIGHTS), text, 3, noise, clip=latents)
    frames = torch.cat([block.frames for block in blocks])[3:].numpy()
    np.testing.assert_allclose(frames[:21], expected, atol=1e-4)
    assert np.abs(frames[3:21] - expected[:18]).mean() > 0.05  # what a delay would give


@pytest.mark.parametrize("vae", ["taehv", "lighttae"])
@pytest.mark.parametrize("block_frames", [1, 2, 3, 4])
@torch.inference_mode()
def test_compressed_pixels_are_given_to_the_encoder_as_a_clip_is(vae, block_frames):
    """Compressed latent 0 stands for pooled frame 3, latent j for 4 j to 4 j + 3, as in Wan's."""
    config = tiny_config(vae, block_frames=block_frames)
    model = make_model(config, WEIGHTS)
    pixels = np.random.default_rng(1).random((4 * block_frames, 3, 64, 96))
    tokens = model.compressor.low_branch(torch.from_numpy(pixels[None]).float())[0].numpy()
    odd = block_frames % 2
    padded = np.concatenate((pixels, pixels[-1:].repeat(4 * odd, 0)))
    small = padded.reshape(-1, 2, 3, 16, 4, 24, 4).mean((1, 4, 6))
    latents = encode_video(small[3:], vae)[:, :, :2, :2]  # 2 x 3 latent cells, one 2 x 2 token
    np.testing.assert_allclose(tokens, latents.reshape(len(latents), -1), atol=1e-4)


# The first block that is generated


FEW_STEPS = msgspec.structs.replace(
    TINY, timesteps=(1000, 500), first_timesteps=(1000, 750, 500, 250),
    policy=Policy(sink=0, mid=0, recent=3, positions="absolute"),
)  # fmt: skip
CUT = [Switch(0, PROMPT), Switch(45 / TINY.fps, "a blue circle", "cut")]  # with block 4
KEEP = [Switch(0, PROMPT), Switch(45 / TINY.fps, "a blue circle")]
RESTART = Policy(sink=0, mid=0, recent=2, restart=3)
BLOCKS = 7


class CountingRollout(Rollout):
    """Notes the timesteps of every block that it generates."""

    def begin(self, *args, **options):
        super().begin(*args, **options)
        self.timesteps: dict[int, list[float]] = {}

    def predict_flow(self, timestep, where):
        block = self.scene + self.cache.committed
        self.timesteps.setdefault(block, []).append(timestep)
        return super().predict_flow(timestep, where)


@pytest.fixture
def open_few_steps(tiny_bundle):
    """Opens sessions whose first block takes four steps, and later ones two."""
    sessions = []

    def open_session(policy=None):
        session = Session.open(tiny_bundle, threads=1, make_rollout=CountingRollout)
        sessions.append(session)
        manifest = msgspec.structs.replace(session.manifest, config=FEW_STEPS)
        policy = policy or FEW_STEPS.policy
        return Session(manifest, session.backend, policy=policy, make_rollout=CountingRollout)

    yield open_session
    for session in sessions:
        session.close()


def warped(*timesteps: float) -> list[float]:
    """Shift timesteps by 5, as Self-Forcing's scheduler does."""
    return [5000 * t / (1000 + 4 * t) for t in timesteps]


@pytest.mark.parametrize(
    ("start_blocks", "schedule", "policy", "expected"),
    [
        # Causal-Forcing's pipeline is called once for a video, and its block 0 is generated
        (0, PROMPT, None, {0: 4, 1: 2, 2: 2, 3: 2, 4: 2, 5: 2, 6: 2}),
        (1, PROMPT, None, {1: 4, 2: 2, 3: 2, 4: 2, 5: 2, 6: 2}),
        (3, PROMPT, None, {3: 4, 4: 2, 5: 2, 6: 2}),
        (7, PROMPT, None, {}),
        (2, KEEP, None, {2: 4, 3: 2, 4: 2, 5: 2, 6: 2}),
        # a cut begins a video of its own: another call, in which nothing is given
        (0, CUT, None, {0: 4, 1: 2, 2: 2, 3: 2, 4: 4, 5: 2, 6: 2}),
        (2, CUT, None, {2: 4, 3: 2, 4: 4, 5: 2, 6: 2}),
        # rollouts in a row: of each but the first, one block is given by the one before
        (0, PROMPT, RESTART, {0: 4, 1: 2, 2: 2, 3: 4, 4: 2, 5: 4, 6: 2}),
        (1, PROMPT, RESTART, {1: 4, 2: 2, 3: 4, 4: 2, 5: 4, 6: 2}),
        (4, PROMPT, RESTART, {4: 4, 5: 4, 6: 2}),
        (0, CUT, RESTART, {0: 4, 1: 2, 2: 2, 3: 4, 4: 4, 5: 2, 6: 2}),
    ],
)
def test_first_timesteps_are_of_the_first_block_generated(
    open_few_steps, start_blocks, schedule, policy, expected
):
    session = open_few_steps(policy)
    start = random_clip(12 * start_blocks - 3) if start_blocks else None
    frames = 12 * BLOCKS - 3 - 3 * (schedule is CUT)
    for _ in session.stream(schedule, frames / TINY.fps, SEED, start=start):
        pass
    lists = {4: warped(1000, 750, 500, 250), 2: warped(1000, 500)}
    assert list(session.rollout.timesteps) == list(expected)
    for block, timesteps in session.rollout.timesteps.items():
        np.testing.assert_allclose(timesteps, lists[expected[block]])


@pytest.mark.parametrize(
    "policy",
    [None, RESTART, msgspec.structs.replace(RESTART, commit="last-step")],
    ids=["window", "restarts", "restarts, last step"],
)
@torch.inference_mode()
def test_the_reference_generates_the_runtimes_frames_after_a_start(
    open_few_steps, tiny_model, policy
):
    session, start = open_few_steps(policy), random_clip(21)
    config, graph = session.config, session.backend.graphs["vae_encoder"]
    model = Model(config, tiny_model.transformer, tiny_model.autoencoder, tiny_model.compressor)
    text = torch.from_numpy(encode_words(PROMPT, config))
    clip = torch.from_numpy(encode_start(config, graph, start, BLOCKS)).flatten(0, 1)
    noise = lambda block, step: draw_noise(config, SEED, block, step)  # noqa: E731
    blocks = list(rollout(model, text, BLOCKS, noise, seed=SEED, clip=clip))
    expected = torch.cat([block.frames for block in blocks])[3:].permute(0, 2, 3, 1).numpy()
    stream = session.stream(PROMPT, len(expected) / config.fps, SEED, start=start)
    assert np.abs(np.concatenate(list(stream)) / 255 - expected).max() < 0.01


@pytest.mark.parametrize("start_blocks", [1, 2])
@torch.inference_mode()
def test_the_reference_equals_numpys_rollout_after_a_start(start_blocks):
    case = golden.CASES["sink-window"]
    assert case.sampler["first_timesteps"] == FEW_STEPS.first_timesteps
    config = Config(**case.model, **case.sampler, policy=Policy(**case.policy))
    weights, text = golden.make_weights(case.model), golden.make_text(case.model)
    shape = (start_blocks, *golden.latent_shape(case))
    start = np.random.default_rng(1).standard_normal(shape, np.float32)
    expected = numpy_rollout(
        weights, golden.settings(case), text, start_blocks + 3, golden.make_noise(case),
        start.astype(np.float64),
    )  # fmt: skip
    noise = lambda block, step: draw_noise(config, case.seed, block, step)  # noqa: E731
    clip = torch.from_numpy(start).flatten(0, 1)
    model, embedding = make_model(config, weights), torch.from_numpy(text)[None]
    blocks = rollout(model, embedding, start_blocks + 3, noise, clip=clip)
    for block, truth in zip(blocks, expected, strict=True):
        np.testing.assert_allclose(block.latents.numpy(), truth.latents, rtol=0, atol=1e-4)
        np.testing.assert_allclose(block.frames.numpy(), truth.frames, rtol=0, atol=1e-4)
        assert (block.first_flow is None) == (truth.first_flow is None)


def test_a_resumed_render_takes_the_first_list_once(open_few_steps, tmp_path):
    """The blocks after a snapshot are generated again from latents that were kept."""
    session, start = open_few_steps(), random_clip(9)
    whole = np.concatenate(list(session.stream(PROMPT, 10, SEED, start=start)))
    request = {"prompt": PROMPT, "seconds": 10, "path": tmp_path / "a.mkv", "seed": SEED}
    with pytest.raises(RenderStopped):
        session.render(**request, start=start, on_block=stop_after(session, 1))
    with pytest.raises(RenderStopped):
        session.render(**request, start=start, on_block=stop_after(session, 4), resume=True)
    session.render(**request, start=start, resume=True)
    np.testing.assert_array_equal(frames_of(tmp_path / "a.mkv"), whole)


def test_other_steps_are_those_of_a_bundle_that_has_them(open_few_steps, tiny_bundle, tmp_path):
    """Whether a bundle was exported with them or a session is opened with them, the frames are the
    same; a render that was begun with other ones is not resumed."""
    exported, start = open_few_steps(), random_clip(9)
    expected = np.concatenate(list(exported.stream(PROMPT, 6, SEED, start=start)))
    steps = StepOverrides(FEW_STEPS.timesteps, FEW_STEPS.first_timesteps)
    request = {"prompt": PROMPT, "seconds": 6, "path": tmp_path / "a.mkv", "seed": SEED}
    with Session.open(tiny_bundle, policy=FEW_STEPS.policy, steps=steps, threads=1) as session:
        frames = np.concatenate(list(session.stream(PROMPT, 6, SEED, start=start)))
        np.testing.assert_array_equal(frames, expected)
        with pytest.raises(RenderStopped):
            session.render(**request, on_block=stop_after(session, 1))
    with (
        Session.open(tiny_bundle, policy=FEW_STEPS.policy, threads=1) as session,
        pytest.raises(ResumeError, match=r"denoising was renoise at 1000 500 .*, now none"),
    ):
        session.render(**request, resume=True)
