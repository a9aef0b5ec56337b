"""Layers, parameters, operations and state shapes of every part of a model, from its config alone.

Free of torch. `transformer.py`, `compressor.py`, `autoencoder.py` and `wan_autoencoder.py` are the
modules with these layers; tests compare them.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

from packforcing.config import TEMPORAL_FACTOR, Config

Grid = tuple[int, int, int]  # frames per call, height, width


class Conv(NamedTuple):
    """A convolution, evaluated at every position of a grid."""

    inputs: int  # channels
    outputs: int
    taps: int  # of its kernel, over time and space
    grid: Grid
    past: int = 0  # input frames of earlier calls that it reads
    bias: bool = True
    normed: bool = False  # an RMS norm with a gain per channel precedes it

    @property
    def parameters(self) -> int:
        """Weights and biases, gains of the norm included."""
        return self.outputs * (self.inputs * self.taps + self.bias) + self.inputs * self.normed

    @property
    def operations(self) -> int:
        """Multiplications and additions of one call."""
        return 2 * self.outputs * self.inputs * self.taps * math.prod(self.grid)


class Attention(NamedTuple):
    """Single-head attention between all cells of a frame; its projections are convolutions."""

    width: int
    grid: Grid
    parameters: int = 0
    past: int = 0

    @property
    def operations(self) -> int:
        """Multiplications and additions of one call."""
        return 4 * self.width * math.prod(self.grid) ** 2


Layers = list[Conv | Attention]


# Autoencoders


def decoder_layers(config: Config) -> Layers:
    """List the decoder's layers over one latent frame (for Wan's, not the first), in order."""
    return _wan_decoder(config) if config.vae == "wan" else _tiny_decoder(config)


def encoder_layers(config: Config, height: int, width: int, *, first: bool = False) -> Layers:
    """List the encoder's layers over the four pixel frames of a latent frame, in order.

    Args:
        config: The model.
        height: Of the frames, in pixels.
        width: Of the frames, in pixels.
        first: Whether it is a video's first latent frame, for which Wan's encoder sees one pixel
            frame.
    """
    if config.vae == "wan":
        return _wan_encoder(config, height, width, 1 if first else TEMPORAL_FACTOR)
    return _tiny_encoder(config, height, width)


def decoder_state_shapes(config: Config) -> list[tuple[int, ...]]:
    """Return the shapes of what the decoder carries from call to call, in layer order."""
    return _state_shapes(config, decoder_layers(config))


def encoder_state_shapes(config: Config) -> list[tuple[int, ...]]:
    """Return the shapes of what the encoder carries from call to call, in layer order."""
    return _state_shapes(config, encoder_layers(config, config.height, config.width))


def _state_shapes(config: Config, layers: Layers) -> list[tuple[int, ...]]:
    convs = [layer for layer in layers if isinstance(layer, Conv) and layer.past]
    if config.vae == "wan":  # input frames of each, and whether there were any yet
        return [*((1, conv.inputs, conv.past, *conv.grid[1:]) for conv in convs), (1,)]
    # half of the input channels of a MemBlock are the frame before, as many as its outputs
    return [(1, conv.outputs, *conv.grid[1:]) for conv in convs]


def _tiny_decoder(config: Config) -> Layers:
    widths, frames = config.vae_decoder_widths, 1
    h, w = config.latent_size
    layers: Layers = [Conv(config.latent_channels, widths[0], 9, (1, h, w))]
    for wide, narrow, stride in zip(widths, widths[1:], (1, 2, 2)):
        layers += 3 * _mem_block(wide, (frames, h, w))
        h, w = 2 * h, 2 * w
        layers.append(Conv(wide, wide * stride, 1, (frames, h, w), bias=False))
        frames *= stride
        layers.append(Conv(wide, narrow, 9, (frames, h, w), bias=False))
    return [*layers, Conv(widths[3], 3 * config.vae_patch**2, 9, (frames, h, w))]


def _tiny_encoder(config: Config, height: int, width: int) -> Layers:
    e, frames = config.vae_encoder_width, TEMPORAL_FACTOR
    h, w = height // config.vae_patch, width // config.vae_patch
    layers: Layers = [Conv(3 * config.vae_patch**2, e, 9, (frames, h, w))]
    for stride in (2, 2, 1):
        frames //= stride
        layers.append(Conv(stride * e, e, 1, (frames, h, w), bias=False))
        h, w = -(-h // 2), -(-w // 2)
        layers.append(Conv(e, e, 9, (frames, h, w), bias=False))
        layers += 3 * _mem_block(e, (frames, h, w))
    return [*layers, Conv(e, config.latent_channels, 9, (1, h, w))]


def _mem_block(width: int, grid: Grid) -> Layers:
    first = Conv(2 * width, width, 9, grid, past=1)
    return [first, Conv(width, width, 9, grid), Conv(width, width, 9, grid)]


def _wan_decoder(config: Config) -> Layers:
    (h, w), widths = config.latent_size, config.vae_decoder_widths
    latent, inputs, frames = config.latent_channels, widths[0], 1
    layers: Layers = [
        Conv(latent, latent, 1, (1, h, w)),
        Conv(latent, inputs, 27, (1, h, w), past=2),
        *_wan_middle(inputs, (1, h, w)),
    ]
    for stage, width in enumerate(widths):
        layers += _wan_residual(inputs, width, (frames, h, w))
        layers += 2 * _wan_residual(width, width, (frames, h, w))
        if 2**stage < TEMPORAL_FACTOR:
            layers.append(Conv(width, 2 * width, 3, (frames, h, w), past=2))
            frames *= 2
        if stage < len(widths) - 1:
            h, w, inputs = 2 * h, 2 * w, width // 2
            layers.append(Conv(width, inputs, 9, (frames, h, w)))
    return [*layers, Conv(widths[-1], 3, 27, (frames, h, w), past=2, normed=True)]


def _wan_encoder(config: Config, height: int, width: int, frames: int) -> Layers:
    narrow = config.vae_encoder_width
    widths = [narrow * wide // config.vae_decoder_widths[-1] for wide in config.vae_decoder_widths]
    h, w, inputs = height, width, narrow
    layers: Layers = [Conv(3, narrow, 27, (frames, h, w), past=2)]
    for stage, outputs in enumerate(widths[::-1]):
        layers += _wan_residual(inputs, outputs, (frames, h, w))
        layers += _wan_residual(outputs, outputs, (frames, h, w))
        if stage < len(widths) - 1:
            h, w, inputs = h // 2, w // 2, outputs
            layers.append(Conv(outputs, outputs, 9, (frames, h, w)))
        if frames > 1 and stage > 0:
            frames //= 2
            layers.append(Conv(outputs, outputs, 3, (frames, h, w), past=1))
    latent, grid = 2 * config.latent_channels, (1, h, w)  # mean and variance
    return [
        *layers,
        *_wan_middle(widths[0], grid),
        Conv(widths[0], latent, 27, grid, past=2, normed=True),
        Conv(latent, latent, 1, grid),
    ]


def _wan_residual(inputs: int, outputs: int, grid: Grid) -> Layers:
    shortcut: Layers = [Conv(inputs, outputs, 1, grid)] if inputs != outputs else []
    return [
        *shortcut,
        Conv(inputs, outputs, 27, grid, past=2, normed=True),
        Conv(outputs, outputs, 27, grid, past=2, normed=True),
    ]


def _wan_middle(width: int, grid: Grid) -> Layers:
    residual = _wan_residual(width, width, grid)
    attention: Layers = [
        Conv(width, 3 * width, 1, grid, normed=True),
        Attention(width, grid),
        Conv(width, width, 1, grid),
    ]
    return [*residual, *attention, *residual]


# Compressor


def compressor_layers(config: Config) -> Layers:
    """List the layers of the compressor's high branch over a block, in order."""
    if not config.compressor_widths:
        return []
    channels = (config.latent_channels, *config.compressor_widths)
    times, (h, w) = config.compressed_grid[0], config.latent_size
    layers: Layers = []
    for number, (inputs, outputs) in enumerate(pairwise(channels)):
        if number:
            h, w = h // 2, w // 2
        layers.append(Conv(inputs, outputs, 4 if number else 2, (times, h, w)))
    return [*layers, Conv(channels[-1], config.dim, 1, (times, h, w))]


def low_branch_clip(config: Config) -> Grid:
    """Return frames, height and width of the pooled pixels that the low branch encodes."""
    frames = config.compressed_grid[0] * TEMPORAL_FACTOR
    return frames, config.height // 4, config.width // 4


# Transformer


def layer_matrices(config: Config) -> list[tuple[int, int]]:
    """List (inputs, outputs) of the matrices of a denoiser layer, in the graph's order.

    Keys and values of cross-attention belong to the `prompt` graph.
    """
    square = (config.dim, config.dim)
    return [*[square] * 6, (config.dim, config.ffn_dim), (config.ffn_dim, config.dim)]


def quantized_layers(config: Config) -> range:
    """Return the layers whose matrices may be quantized: all but the first and the last.

    The embeddings of patches and time and the head are not quantized either.
    """
    return range(1, config.layers - 1)


# Of the graphs of a bundle


def parameters(config: Config) -> dict[str, int]:
    """Count the parameters of each graph, biases and norms included.

    `compressor` and `vae_encoder` both hold the autoencoder's encoder. `prompt` and `denoiser`
    together are the transformer of a Wan checkpoint.
    """
    d, layers = config.dim, config.layers

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    layer = sum(linear(*matrix) for matrix in layer_matrices(config))
    layer += 3 * d + 2 * d + 6 * d  # norms of q, k and the cross q; the norm before; modulation
    ends = linear(config.token_dim, d) + linear(d, config.token_dim) + 2 * d
    time = linear(config.freq_dim, d) + linear(d, d) + linear(d, 6 * d)
    encoder = sum(layer.parameters for layer in encoder_layers(config, config.height, config.width))
    return {
        "prompt": linear(config.text_dim, d) + linear(d, d) + layers * (2 * linear(d, d) + d),
        "denoiser": ends + time + layers * layer,
        "compressor": encoder + sum(layer.parameters for layer in compressor_layers(config)),
        "vae_decoder": sum(layer.parameters for layer in decoder_layers(config)),
        "vae_encoder": encoder,
    }


def denoiser_operations(config: Config, new_tokens: int) -> dict[str, int]:
    """Count the multiplications and additions of a call of the denoiser, with a full context.

    Args:
        config: The model.
        new_tokens: Tokens that the call computes.

    Returns:
        By kind: "quantizable", the products with matrices of the inner layers, whose dtype
        `Precision.weights` says; "self_attention"; and "other" matrix products, among them those
        that spread the channels of queries and keys before they are rounded.
    """
    d, layers = config.dim, config.layers
    layer = 2 * new_tokens * sum(map(math.prod, layer_matrices(config)))
    ends = 2 * new_tokens * 2 * config.token_dim * d
    time = 2 * (config.freq_dim * d + d * d + 6 * d * d)
    cross_attention = 4 * new_tokens * config.text_len * d * layers
    spread = 2 * (2 * new_tokens + config.context_tokens) * config.head_dim * d * layers
    inner = len(quantized_layers(config))
    return {
        "quantizable": inner * layer,
        "self_attention": 4 * new_tokens * (new_tokens + config.context_tokens) * d * layers,
        "other": (layers - inner) * layer
        + ends
        + time
        + cross_attention
        + (spread if config.precision.attention else 0),
    }


def operations(config: Config) -> dict[str, int]:
    """Count the multiplications and additions of one call of each graph, with a full context.

    Only matrix products and convolutions count. The denoiser is called with a full block and with
    a compressed one.
    """
    frames, height, width = low_branch_clip(config)
    low_branch = [
        layer
        for latent in range(frames // TEMPORAL_FACTOR)
        for layer in encoder_layers(config, height, width, first=latent == 0)
    ]
    return {
        "denoiser.block": sum(denoiser_operations(config, config.block_tokens).values()),
        "denoiser.compressed": sum(denoiser_operations(config, config.compressed_tokens).values()),
        "compressor": sum(layer.operations for layer in (*compressor_layers(config), *low_branch)),
        "vae_decoder": sum(layer.operations for layer in decoder_layers(config)),
    }
