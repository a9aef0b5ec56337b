"""Geometry against the torch modules that have these layers: shapes, parameters, operations."""

import msgspec
import pytest
import torch

from packforcing import MODELS
from packforcing.autoencoder import TinyAutoencoder
from packforcing.compressor import Compressor
from packforcing.geometry import (
    compressor_layers,
    decoder_layers,
    decoder_state_shapes,
    encoder_layers,
    encoder_state_shapes,
    layer_matrices,
    operations,
    parameters,
)
from packforcing.model import weight_shapes
from packforcing.transformer import Transformer
from tests.helpers import CONFIGS, WAN, is_prompt_weight


def modules(config):
    with torch.device("meta"):
        autoencoder = TinyAutoencoder(config)
        return Transformer(config), autoencoder, Compressor(config, autoencoder.encode)


def count(tensors):
    return sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_parameters_are_those_of_the_modules(config):
    """Graph by graph, exactly; the transformer's halves are a Wan checkpoint."""
    transformer, autoencoder, compressor = modules(config)
    named = dict(transformer.named_parameters())
    encoder = count(autoencoder.encoder.parameters())
    assert parameters(config) == {
        "prompt": count(tensor for name, tensor in named.items() if is_prompt_weight(name)),
        "denoiser": count(tensor for name, tensor in named.items() if not is_prompt_weight(name)),
        "compressor": encoder + count(compressor.parameters()),
        "vae_decoder": count(autoencoder.decoder.parameters()),
        "vae_encoder": encoder,
    }
    if config is WAN:
        assert count(named.values()) == 1_418_996_800


@pytest.mark.parametrize("name", CONFIGS)
def test_operations_are_those_of_the_modules(name):
    """PyTorch's own count of the matrix products, call by call. (Of the full block's call only
    the number of new tokens differs. Strips of the decoder overlap, by 1%, which is left out.)"""
    from torch.utils.flop_counter import FlopCounterMode

    config = msgspec.structs.replace(CONFIGS[name], layers=2, vae_strips=1)
    transformer, autoencoder, compressor = modules(config)
    counts = operations(config)

    def counted(module, *inputs):
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            module(*inputs)
        return counter.get_total_flops()

    def zeros(*shape):
        return torch.zeros(*shape, device="meta")

    def pairs(n):
        return [(zeros(1, config.heads, n, config.head_dim),) * 2] * config.layers

    latents = zeros(1, config.block_frames, config.latent_channels, *config.latent_size)
    state = [zeros(*tensor.shape) for tensor in autoencoder.decoder_state()]
    assert counted(autoencoder.decode_frame, latents[0, :1], state) == counts["vae_decoder"]
    pixels = zeros(1, config.block_pixel_frames, 3, config.height, config.width)
    assert counted(compressor, latents, pixels) == counts["compressor"]
    n, c = config.compressed_tokens, config.context_tokens
    inputs = (
        zeros(1, n, config.token_dim), zeros(1, n, config.dim), zeros(1), pairs(config.text_len),
        (zeros(n, config.head_dim // 2),) * 2, pairs(c), (zeros(c, config.head_dim // 2),) * 2,
    )  # fmt: skip
    assert counted(transformer, *inputs) == counts["denoiser.compressed"]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_state_shapes_are_those_of_the_tiny_autoencoder(config):
    _, autoencoder, _ = modules(config)
    with torch.device("meta"):
        decoder = autoencoder.decoder_state()
        encoder = autoencoder.encoder_state(config.height, config.width)
    assert [tuple(past.shape) for past in decoder] == decoder_state_shapes(config)
    assert [tuple(past.shape) for past in encoder] == encoder_state_shapes(config)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_layers_are_the_convolutions_of_the_modules(config):
    """In order, channels and taps of each; and the matrices of a transformer layer."""
    shapes = {name: shape for name, shape in weight_shapes(config).items() if len(shape) > 2}

    def convolutions(prefix):
        return [shape for name, shape in shapes.items() if name.startswith(prefix)]

    for prefix, layers in (
        ("autoencoder.decoder.", decoder_layers(config)),
        ("autoencoder.encoder.", encoder_layers(config, config.height, config.width)),
        ("compressor.high.", compressor_layers(config)),
    ):
        expected = [(out, channels, taps) for channels, out, taps, *_ in layers]
        weights = convolutions(prefix)
        actual = [(shape[0], shape[1], torch.Size(shape[2:]).numel()) for shape in weights]
        assert actual == expected, prefix
    matrices = {
        name: shape[::-1]
        for name, shape in weight_shapes(config).items()
        if name.startswith("transformer.blocks.0.")
        and len(shape) == 2
        and not is_prompt_weight(name)
    }
    assert sorted(matrices.values()) == sorted(layer_matrices(config))


def test_every_published_model_counts_its_weights():
    for config in MODELS.values():
        shapes = weight_shapes(config)
        transformer = [s for name, s in shapes.items() if name.startswith("transformer.")]
        counts = parameters(config)
        total = sum(torch.Size(shape).numel() for shape in transformer)
        assert counts["prompt"] + counts["denoiser"] == total
