"""A tiny model that differs from the demo on every axis, and its bundle, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from packforcing import Config, Policy

TINY = Config(
    name="tiny", height=64, width=96, fps=8, dim=48, heads=2, layers=2, ffn_dim=64, freq_dim=32,
    block_frames=3, text_encoder="words", text_len=6, text_dim=22, compressor_widths=(8, 8, 8, 8),
    latent_channels=4, vae_encoder_width=8, vae_decoder_widths=(8, 8, 8, 8), sampler="renoise",
    policy=Policy(sink=1, mid=3, recent=2, mid_span=2.5),
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    return TINY


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    from packforcing.model import random_model

    return random_model(tiny_config)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model, tmp_path_factory) -> Path:
    from packforcing.export import export_bundle

    directory = tmp_path_factory.mktemp("bundles") / "tiny"
    export_bundle(tiny_model, directory)
    return directory
