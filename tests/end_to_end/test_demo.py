"""The demo model as shipped: the bundle is its weights, and its videos show their prompts."""

import importlib
import json
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch

from packforcing import model_config
from packforcing.evaluation import demo_judge
from packforcing.evaluation.video_reader import read_frames
from packforcing.model import load_model
from packforcing.reference import rollout
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime.bundle import check_files, read_manifest
from packforcing.runtime.rollout import Rollout
from packforcing.sampler import draw_noise
from packforcing.words import encode_words, make_prompt, random_attributes

ROOT = Path(__file__).parents[2]
PROMPT = "a yellow star over maroon stripes"


@pytest.fixture(scope="module")
def model():
    return load_model(model_config("demo"), demo_bundle().parent / "model.safetensors")


def expected_blocks(model, blocks):
    text = torch.from_numpy(encode_words(PROMPT, model.config))
    return rollout(model, text, blocks, lambda b, s: draw_noise(model.config, 0, b, s))


def test_the_bundle_is_small_sound_and_of_the_shipped_weights(model):
    manifest = read_manifest(demo_bundle())
    check_files(demo_bundle(), manifest)
    assert manifest.config == model.config == model_config("demo")
    assert sum(path.stat().st_size for path in demo_bundle().iterdir()) <= 12_000_000
    block = next(expected_blocks(model, 1))
    with Session.open(demo_bundle()) as session:
        expected = block.frames[session.config.trimmed_frames :].permute(0, 2, 3, 1).numpy()
        frames = np.concatenate(list(session.stream(PROMPT, len(expected) / session.config.fps)))
    assert np.abs(frames / 255 - expected).max() < 0.01


def test_what_comes_back_into_view_is_read_from_the_history(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "demo_model")
    probe = importlib.import_module("probe_memory").probe
    errors = probe(demo_bundle().parent / "model.safetensors", tours=4, sink=1)
    assert errors["back"] < errors["new"] / 2


@pytest.mark.full
def test_sixty_blocks_of_demo_video_stay_with_the_reference(model):
    """At least 40 dB on frames, the reference's selections replayed."""
    expected = list(expected_blocks(model, 60))
    with Session.open(demo_bundle()) as session:
        run = Rollout(session.config, session.backend)
        run.begin(encode_words(PROMPT, session.config), 60, seed=0)
        run.select = lambda block, _: np.array(expected[min(block + 1, 59)].read, int)
        for block in expected:
            run.next_block()
            error = np.square(run.buffers.pixels.host[0] - block.frames.numpy()).mean()
            assert error < 1e-4, f"block {block.index}: {-10 * np.log10(error):.1f} dB"


@pytest.mark.full
def test_hundred_prompts_are_followed(monkeypatch):
    """Rendered by the runtime, read from pixels: subject color, shape and ground all right in at
    least 90 of 100 random prompts at 5 s. The judge is right on drawn clips, and with another
    clip's prompt it says no."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "demo_model")
    world = importlib.import_module("world")

    rng = np.random.default_rng(2026)
    drawn = [world.make_clip(rng, 80) for _ in range(10)]
    others = [*drawn[1:], drawn[0]]
    assert all(demo_judge.matches(clip.prompt, clip.frames)["both"] for clip in drawn)
    wrong = [
        demo_judge.matches(other.prompt, clip.frames)["both"] for clip, other in zip(drawn, others)
    ]
    assert sum(wrong) <= 2

    right = 0
    with Session.open(demo_bundle()) as session:
        for seed in range(100):
            prompt = make_prompt(**random_attributes(rng))
            frames = np.concatenate(list(session.stream(prompt, 5, seed)))
            right += all(demo_judge.matches(prompt, frames).values())
    print(f"subject color, shape and ground right: {right} of 100")
    assert right >= 90


@pytest.mark.full
def test_long_renders_stay_flat():
    """Beyond the archive, at most 1 MB more resident memory per 100 blocks."""
    from benchmarks.bench_runtime import long

    result = long()
    assert result["resident_mb_per_100_blocks"] <= 1 + result["of_which_archive_mb"]


@pytest.mark.full
@pytest.mark.parametrize(("minutes", "mb"), [(1, 8), (60, 5)])
def test_an_hour_takes_no_more_than_its_archive(tmp_path, minutes, mb):
    """Beyond it, less than 1 MB of resident memory per 10 minutes of video, after the first ten; a
    minute, in which the encoder's memory is still settling, gets 8. No packed position is beyond
    those that a full context has. Time per block and what the last minute looks like are printed:
    `-s` shows them."""
    from benchmarks.bench_runtime import endless

    result = endless(60 * minutes, tmp_path / "video.mp4")
    print(json.dumps(result, indent=1))
    config = model_config("demo")
    whole = config.policy.sink + config.policy.recent
    full = whole * config.block_frames + config.policy.mid * config.mid_span
    assert result["frames"] == 60 * minutes * config.fps
    assert result["largest_packed_position"] == full
    assert result["resident_mb_beyond_archive_in_all"] < mb
    assert sum(1 for _ in read_frames(tmp_path / "video.mp4")) == result["frames"]


@pytest.mark.full
def test_a_fresh_environment_renders_without_torch(tmp_path):
    """`pip install packforcing[cpu]` and nothing else; torch and onnx are not there."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", f"{ROOT}[cpu]"], check=True)
    for module in ("torch", "onnx"):
        assert subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode
    command = [python, "-m", "packforcing.app.cli", "demo", "--seconds", "2", "--out"]
    command.append(tmp_path / "out")
    subprocess.run(command, check=True, cwd=tmp_path)
    assert (tmp_path / "out" / "demo.mp4").stat().st_size > 0
