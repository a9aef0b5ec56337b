"""How each part of a model is quantised: the one table of recipes.

Scales are symmetric, with a zero point of zero, as TensorRT wants them.
"""

from __future__ import annotations

from typing import NamedTuple

from packforcing.config import Config

SNR = "snr.json"  # in a bundle with quantised weights: dB of every matrix, worst first


class Recipe(NamedTuple):
    """Whole numbers from `low` to `high`; scales are shared as `estimate.weight_block` says.
    `clips` are the shares of the largest magnitude that are tried as the range's end, of which
    the one with the least squared error is taken."""

    low: int
    high: int
    clips: tuple[float, ...]


WEIGHTS = {
    "int8": Recipe(-127, 127, (1.0,)),
    "int4": Recipe(-8, 7, (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)),
}
# keys and values of the history; a scale per layer, head and channel, or RoPE pair of a key
CACHE = {"int8": Recipe(-127, 127, (1.0, 0.9, 0.8, 0.7, 0.6, 0.5))}


def quantised_layers(config: Config) -> range:
    """Layers whose matrices are quantised: not the first, nor the last. What stands around the
    layers, the patch and time embeddings and the head, is left as it is too."""
    return range(1, config.layers - 1)
