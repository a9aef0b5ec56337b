"""The tiny video autoencoder (TAEHV, `taew2_1`) in plain NumPy, float64.

Layers have the names of the published weights, with the prefix `autoencoder.`. A latent frame
stands for four pixel frames. The decoder carries the last input of each memory block from block to
block of a video. The encoder starts every clip without a past.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Weights = Mapping[str, Array]
Memory = dict[str, Array]  # the last input of each memory block, [1, channels, rows, columns]


def decode(weights: Weights, latents: Array, memory: Memory) -> Array:
    """Decode latents [T, C, h, w] to frames [4 T, 3, 8 h, 8 w] in 0..1, and update `memory`."""
    x = 3 * np.tanh(latents / 3)
    x = relu(convolve(x, weights, "autoencoder.decoder.1"))
    for first, frames in ((3, 1), (9, 2), (15, 2)):  # index of the stage's first layer
        for layer in range(first, first + 3):
            x = memory_block(x, weights, f"autoencoder.decoder.{layer}", memory)
        x = x.repeat(2, 2).repeat(2, 3)
        x = convolve(x, weights, f"autoencoder.decoder.{first + 4}")
        x = x.reshape(-1, x.shape[1] // frames, *x.shape[2:])  # channels become frames
        x = convolve(x, weights, f"autoencoder.decoder.{first + 5}")
    x = convolve(relu(x), weights, "autoencoder.decoder.22")
    return np.clip(x, 0, 1)


def encode(weights: Weights, frames: Array) -> Array:
    """Encode frames [4 T, 3, H, W] in 0..1 to latents [T, C, h, w].

    Rows and columns are halved three times and rounded up.
    """
    memory: Memory = {}
    x = relu(convolve(frames, weights, "autoencoder.encoder.0"))
    for first, frames_in in ((2, 2), (7, 2), (12, 1)):
        x = x.reshape(-1, x.shape[1] * frames_in, *x.shape[2:])  # frames become channels
        x = convolve(x, weights, f"autoencoder.encoder.{first}")
        x = convolve(x, weights, f"autoencoder.encoder.{first + 1}", stride=2)
        for layer in range(first + 2, first + 5):
            x = memory_block(x, weights, f"autoencoder.encoder.{layer}", memory)
    return convolve(x, weights, "autoencoder.encoder.17")


def memory_block(x: Array, weights: Weights, name: str, memory: Memory) -> Array:
    """Apply a residual block to each frame and the one before it, which is zero at the start."""
    before = np.concatenate((memory.get(name, np.zeros_like(x[:1])), x[:-1]))
    memory[name] = x[-1:]
    h = np.concatenate((x, before), 1)
    h = relu(convolve(h, weights, f"{name}.conv.0"))
    h = relu(convolve(h, weights, f"{name}.conv.2"))
    return relu(convolve(h, weights, f"{name}.conv.4") + x)


def convolve(x: Array, weights: Weights, name: str, stride: int = 1) -> Array:
    """Convolve frames [T, C, rows, columns], zero-padded by half the kernel.

    A 1x1 kernel may stand under the name of the layer's own convolution, `name.conv`.
    """
    name = name if f"{name}.weight" in weights else f"{name}.conv"
    kernel = weights[f"{name}.weight"]
    side = kernel.shape[-1]
    rows, columns = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (side // 2, side // 2), (side // 2, side // 2)))
    y = sum(
        np.einsum(
            "tchw,oc->tohw",
            padded[:, :, i : i + rows : stride, j : j + columns : stride],
            kernel[:, :, i, j],
            optimize=True,
        )
        for i in range(side)
        for j in range(side)
    )
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias[:, None, None]


def relu(x: Array) -> Array:
    """Compute max(x, 0)."""
    return np.maximum(x, 0)
