"""How each part of a model is quantized: the one table of recipes.

Scales are symmetric, with a zero point of zero, which TensorRT requires.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

SNR_FILE = (
    "snr.json"  # in a bundle with quantized weights: SQNR of every matrix in dB, lowest first
)
RECOMMENDED_PROMPTS = 8  # to fit scales of a cache to; benchmarks/ablate_cache.py measures it


class Recipe(NamedTuple):
    """A quantized dtype and how its scales are fitted.

    Attributes:
        dtype: Name in ONNX.
        low: Least quantized value.
        high: Largest quantized value.
        clips: Ends of the range to try, as shares of the largest magnitude; the one with the least
            squared error is used.
    """

    dtype: str
    low: int
    high: int
    clips: tuple[float, ...]


# Weights that share a scale: see `estimate.weight_block`. Clipping gains 0.01 dB in int8, and the
# resolution of fp8 is relative to the value.
WEIGHT_RECIPES = {
    "int8": Recipe("INT8", -127, 127, (1.0,)),
    "int4": Recipe("INT4", -8, 7, tuple(1 - step / 40 for step in range(13))),
    "fp8": Recipe("FLOAT8E4M3FN", -448, 448, (1.0,)),
}
# Inputs of matrices with weights of this dtype; one scale per tensor
INPUT_RECIPES = {"fp8": Recipe("FLOAT8E4M3FN", -448, 448, (1.0,))}
# Keys and values; a scale per layer, head and channel, or RoPE pair of a key
CACHE_RECIPES = {
    "int8": Recipe("INT8", -127, 127, (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)),
    "fp8": Recipe("FLOAT8E4M3FN", -448, 448, (1.0,)),
}


class OutputLoss(msgspec.Struct, frozen=True):
    """The quantization error of an output of a denoiser.

    Attributes:
        snr: SQNR in dB; None where there is no error.
        error: RMS of the error relative to the signal's.
    """

    snr: float | None
    error: float
