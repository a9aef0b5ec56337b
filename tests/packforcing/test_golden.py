"""The reference rollout against what Self-Forcing's own code computes (float32, 1e-4)."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from packforcing import Config, Policy
from packforcing.model import random_model
from packforcing.reference import rollout
from packforcing.transformer import patchify, unpatchify
from tests import golden

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
ALL = 100  # more blocks than the clip has

CONFIG = Config(
    name="golden", height=64, width=96, fps=16, dim=256, heads=2, layers=3, ffn_dim=512,
    block_frames=3, text_encoder="umt5-xxl", text_len=16, text_dim=48,
    vae_encoder_width=8, vae_decoder_widths=(8, 8, 8, 8),
    policy=Policy(sink=0, mid=0, recent=ALL, positions="absolute"),
)  # fmt: skip


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="Self-Forcing's own numbers are not shipped here")
@pytest.mark.parametrize(
    ("case", "sink", "recent"), [("full", 0, ALL), ("window9", 0, 2), ("sink3_window12", 1, 2)]
)
def test_rollout_equals_self_forcing(case, sink, recent):
    published = np.load(GOLDEN / "self_forcing_tiny.npz")
    policy = Policy(sink=sink, mid=0, recent=recent, positions="absolute")
    config = msgspec.structs.replace(CONFIG, policy=policy)
    model = random_model(config)
    weights = load_file(GOLDEN / "self_forcing_tiny_weights.safetensors")
    model.transformer.load_state_dict(weights)

    def noise(block: int, step: int) -> np.ndarray:
        frames = slice(block * 3, block * 3 + 3)
        given = (
            published["noise"][:, frames] if step == 0 else published["renoise"][block, step - 1]
        )
        return patchify(torch.from_numpy(given), config.patch)[0].numpy()

    blocks = list(rollout(model, torch.from_numpy(published["text"]), 7, noise))

    latents = torch.cat([block.latents for block in blocks]).numpy()
    np.testing.assert_allclose(latents, published[f"{case}_latents"][0], atol=1e-4)
    for block in blocks:
        flow = unpatchify(block.first_flow[None], config.grid, config.patch)
        expected = published[f"{case}_flow_first"][block.index]
        np.testing.assert_allclose(flow.numpy(), expected, atol=1e-4)


def test_rollout_equals_its_own_written_numbers():
    """PackForcing's policy on a tiny model, block of 3, fractional span: latents, frames, reads."""
    written, found = np.load(golden.FILE), golden.compute()
    np.testing.assert_array_equal(found["reads"], written["reads"])
    np.testing.assert_allclose(found["latents"], written["latents"], atol=1e-4)
    np.testing.assert_allclose(found["frames"], written["frames"], atol=1e-4)
