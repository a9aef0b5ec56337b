"""The layers of Wan's video autoencoder, from the config alone (as in diffusers' AutoencoderKLWan).

What the contract needs to know of them, which is what they remember between calls, and what the
estimates need: parameters and operations per latent frame.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from packforcing.config import TEMPORAL_FACTOR, Config

Grid = tuple[int, int, int]  # frames per latent frame, height, width


class Conv(NamedTuple):
    """A convolution: channels, taps over time and within a frame, where it is evaluated, how many
    frames of its input it remembers, and whether a norm comes before it."""

    inputs: int
    outputs: int
    time: int
    space: int
    grid: Grid
    past: int = 0
    normed: bool = False

    @property
    def parameters(self) -> int:
        weights = self.inputs * self.time * self.space
        return self.outputs * (weights + 1) + self.inputs * self.normed

    @property
    def operations(self) -> int:
        taps = self.inputs * self.time * self.space
        return 2 * self.outputs * taps * math.prod(self.grid)


class Attention(NamedTuple):
    """Of all cells of a frame to each other, one head; its projections are convolutions."""

    width: int
    grid: Grid
    parameters: int = 0
    past: int = 0

    @property
    def operations(self) -> int:
        return 4 * self.width * math.prod(self.grid) ** 2


Layers = list[Conv | Attention]


def decoder_layers(config: Config) -> Layers:
    """The decoder over one latent frame that is not the first, in order."""
    (h, w), widths = config.latent_size, config.vae_decoder_widths
    latent, inputs, frames = config.latent_channels, widths[0], 1
    layers: Layers = [
        Conv(latent, latent, 1, 1, (1, h, w)),
        Conv(latent, inputs, 3, 9, (1, h, w), past=2),
        *_middle(inputs, (1, h, w)),
    ]
    for stage, width in enumerate(widths):
        layers += _residual(inputs, width, (frames, h, w))
        layers += 2 * _residual(width, width, (frames, h, w))
        if 2**stage < TEMPORAL_FACTOR:
            layers.append(Conv(width, 2 * width, 3, 1, (frames, h, w), past=2))
            frames *= 2
        if stage < len(widths) - 1:
            h, w, inputs = 2 * h, 2 * w, width // 2
            layers.append(Conv(width, inputs, 1, 9, (frames, h, w)))
    return [*layers, Conv(widths[-1], 3, 3, 9, (frames, h, w), past=2, normed=True)]


def encoder_layers(config: Config, height: int, width: int, *, first: bool = False) -> Layers:
    """The encoder over a latent frame's pixel frames, four, or a video's first one; in order."""
    narrow, frames = config.vae_encoder_width, 1 if first else TEMPORAL_FACTOR
    widths = [narrow * wide // config.vae_decoder_widths[-1] for wide in config.vae_decoder_widths]
    h, w, inputs = height, width, narrow
    layers: Layers = [Conv(3, narrow, 3, 9, (frames, h, w), past=2)]
    for stage, outputs in enumerate(widths[::-1]):
        layers += _residual(inputs, outputs, (frames, h, w))
        layers += _residual(outputs, outputs, (frames, h, w))
        if stage < len(widths) - 1:
            h, w, inputs = h // 2, w // 2, outputs
            layers.append(Conv(outputs, outputs, 1, 9, (frames, h, w)))
        if frames > 1 and stage > 0:
            frames //= 2
            layers.append(Conv(outputs, outputs, 3, 1, (frames, h, w), past=1))
    latent, grid = 2 * config.latent_channels, (1, h, w)  # mean and variance
    return [
        *layers,
        *_middle(widths[0], grid),
        Conv(widths[0], latent, 3, 9, grid, past=2, normed=True),
        Conv(latent, latent, 1, 1, grid),
    ]


def state_shapes(layers: Layers) -> list[tuple[int, ...]]:
    """What is remembered between calls: frames of inputs, and whether there were any yet."""
    pasts = [
        (1, layer.inputs, layer.past, *layer.grid[1:])
        for layer in layers
        if isinstance(layer, Conv) and layer.past
    ]
    return [*pasts, (1,)]


def _residual(inputs: int, outputs: int, grid: Grid) -> Layers:
    shortcut: Layers = [Conv(inputs, outputs, 1, 1, grid)] if inputs != outputs else []
    return [
        *shortcut,
        Conv(inputs, outputs, 3, 9, grid, past=2, normed=True),
        Conv(outputs, outputs, 3, 9, grid, past=2, normed=True),
    ]


def _middle(width: int, grid: Grid) -> Layers:
    residual = _residual(width, width, grid)
    attention: Layers = [
        Conv(width, 3 * width, 1, 1, grid, normed=True),
        Attention(width, grid),
        Conv(width, width, 1, 1, grid),
    ]
    return [*residual, *attention, *residual]
