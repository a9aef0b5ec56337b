"""A tiny model that differs from the demo on every axis, and its bundle, made once."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from packforcing import Config, Policy
from packforcing.config import Precision

# A shell's background job ignores Ctrl-C, and so would the programs that tests start in one.
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = Config(
    name="tiny", height=64, width=96, fps=8, dim=48, heads=2, layers=2, ffn_dim=64, freq_dim=32,
    block_frames=3, text_encoder="words", text_len=6, text_dim=22, compressor_widths=(8, 8, 8, 8),
    latent_channels=4, vae_encoder_width=8, vae_decoder_widths=(8, 8, 8, 8), sampler="renoise",
    policy=Policy(sink=1, mid=3, recent=2, mid_span=2.5),
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    return TINY


def make_tiny_model():
    """Weights from a seeded numpy generator, scaled so that every part of the model matters:
    torch's own initialisation lets the autoencoder's pictures come out all but black."""
    import torch

    from packforcing.model import random_model

    model = random_model(TINY)
    rng = np.random.Generator(np.random.Philox(7))
    for part in model.parts().values():
        state = part.state_dict()
        for name, tensor in state.items():
            values = rng.standard_normal(tensor.shape, dtype=np.float32)
            scale = (tensor.numel() / tensor.shape[0]) ** -0.5 if tensor.ndim > 1 else 0.1
            state[name] = torch.from_numpy(values * np.float32(scale)) + (tensor.ndim == 1)
        part.load_state_dict(state)
    return model


@pytest.fixture(scope="session")
def tiny_model():
    return make_tiny_model()


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model, tmp_path_factory) -> Path:
    from packforcing.export import export_bundle

    directory = tmp_path_factory.mktemp("bundles") / "tiny"
    export_bundle(tiny_model.config, tiny_model.weights(), directory)
    return directory


@pytest.fixture(scope="session")
def tiny_half_bundle(tiny_model, tmp_path_factory) -> Path:
    """The same weights, computed in float16."""
    import msgspec

    from packforcing.export import export_bundle

    half = Precision(compute="fp16", weights="fp16", cache="fp16")
    config = msgspec.structs.replace(tiny_model.config, precision=half)
    directory = tmp_path_factory.mktemp("bundles") / "tiny-half"
    export_bundle(config, tiny_model.weights(), directory)
    return directory


@pytest.fixture(scope="module", params=["host", "gpu"])
def session(request, tiny_bundle):
    """The tiny model's, on the host and on an emulated GPU."""
    from packforcing.runtime import Session
    from tests.emulated import Cuda, on_gpu

    with Session.open(tiny_bundle) as session:
        if request.param == "gpu":
            session._backend = on_gpu(session._backend, Cuda())
        yield session
