"""Every published model at tiny widths, and weights in its layouts."""

from pathlib import Path

import msgspec
import pytest
import torch

from packforcing import MODELS
from packforcing.checkpoints.published import (
    PUBLISHED,
    published_config,
)
from packforcing.model import random_weights
from packforcing.presets import AUTOENCODERS, PAPER
from tests.packforcing.checkpoints.layouts import (
    NARROW,
    TINY,
    TINY_SHAPES,
)


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    """Every published model at tiny widths, with all of its layers."""
    for kind in PUBLISHED:
        config = msgspec.structs.replace(published_config(kind), **TINY)
        monkeypatch.setitem(MODELS, kind, config)
    tiny = {name: size for name, size in TINY.items() if name.startswith("vae_")}
    for name, sizes in (("taehv", tiny), ("lighttae", tiny), ("wan", NARROW)):
        monkeypatch.setitem(AUTOENCODERS, name, sizes)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """A transformer in Wan's names."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: 0.2 * torch.randn(shape, generator=generator) for name, shape in TINY_SHAPES.items()
    }


@pytest.fixture(scope="module")
def tiny_autoencoder(tmp_path_factory) -> Path:
    """The tiny autoencoder's weights in float16, as TAEHV publishes them."""
    config = msgspec.structs.replace(PAPER, **TINY)
    path = tmp_path_factory.mktemp("taehv") / "taew2_1.pth"
    tensors = random_weights(config)
    torch.save(
        {
            name.removeprefix("autoencoder."): tensors[name].half()
            for name in tensors
            if name.startswith("autoencoder.")
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def wan_vae() -> dict[str, torch.Tensor]:
    """Wan's autoencoder in diffusers' names."""
    config = msgspec.structs.replace(PAPER, **TINY | NARROW, vae="wan")
    tensors = random_weights(config)
    return {
        name.removeprefix("autoencoder."): tensors[name]
        for name in tensors
        if name.startswith("autoencoder.")
    }
