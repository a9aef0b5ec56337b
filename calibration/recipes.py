"""How each part of a model is quantised: the one table of recipes.

Scales are symmetric, with a zero point of zero, as TensorRT wants them.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from packforcing.config import Config

SNR = "snr.json"  # in a bundle with quantised weights: dB of every matrix, worst first

ENOUGH = 8  # prompts to fit a cache's scales to; benchmarks/ablate_cache.py measures it


class Recipe(NamedTuple):
    """Numbers from `low` to `high` in a format, by its name in ONNX; scales are shared as
    `estimate.weight_block` says. `clips` are the shares of the largest magnitude that are tried as
    the range's end, of which the one with the least squared error is taken."""

    format: str
    low: int
    high: int
    clips: tuple[float, ...]


# Clipping gains 0.01 dB in int8 (docs/results/2026-11-quantization.md); fp8 grids grow with values
WEIGHTS = {
    "int8": Recipe("INT8", -127, 127, (1.0,)),
    "int4": Recipe("INT4", -8, 7, tuple(1 - step / 40 for step in range(13))),
    "fp8": Recipe("FLOAT8E4M3FN", -448, 448, (1.0,)),
}
# what fp8 weights are multiplied with; one scale per tensor
ACTIVATIONS = {"fp8": Recipe("FLOAT8E4M3FN", -448, 448, (1.0,))}
# keys and values of the history; a scale per layer, head and channel, or RoPE pair of a key
CACHE = {
    "int8": Recipe("INT8", -127, 127, (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)),
    "fp8": Recipe("FLOAT8E4M3FN", -448, 448, (1.0,)),
}


class Loss(msgspec.Struct, frozen=True):
    """What an output of a denoiser lost: how far its signal is above its error, in dB (None where
    there is none), and the error's RMS relative to the signal's."""

    snr: float | None
    error: float


def quantised_layers(config: Config) -> range:
    """Layers whose matrices are quantised: not the first, nor the last. What stands around the
    layers, the patch and time embeddings and the head, is left as it is too."""
    return range(1, config.layers - 1)
