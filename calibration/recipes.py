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
# resolution of fp8 is relative to the value. In nvfp4, whose values are coarsest from 4 to 6, the
# best end may lie beyond the largest magnitude.
WEIGHT_RECIPES = {
    "int8": Recipe("INT8", -127, 127, (1.0,)),
    "w8a8": Recipe("INT8", -127, 127, (1.0,)),
    "int4": Recipe("INT4", -8, 7, tuple(1 - step / 40 for step in range(13))),
    "fp8": Recipe("FLOAT8E4M3FN", -448, 448, (1.0,)),
    "nvfp4": Recipe("FLOAT4E2M1", -6, 6, (0.8, 0.85, 0.9, 0.95, 1.0, 1.1, 1.25, 1.5)),
}
# Inputs of matrices with weights of this dtype; one static scale per tensor, and in nvfp4 a scale
# per block besides, computed in every call
INPUT_RECIPES = {
    "w8a8": Recipe("INT8", -127, 127, (1.0,)),
    "fp8": Recipe("FLOAT8E4M3FN", -448, 448, (1.0,)),
    "nvfp4": Recipe("FLOAT4E2M1", -6, 6, (1.0,)),
}
# Strengths to try, beside none, with which the range of inputs moves into the weights
MIGRATION_STRENGTHS = {"w8a8": (0.25, 0.5, 0.75)}
# Keys and values; a scale per layer, head and channel, or RoPE pair of a key
CACHE_RECIPES = {
    "int8": Recipe("INT8", -127, 127, (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)),
    "fp8": Recipe("FLOAT8E4M3FN", -448, 448, (1.0,)),
}
# Queries, keys and values of attention over the context; one scale per tensor
ATTENTION_RECIPES = {"fp8": Recipe("FLOAT8E4M3FN", -448, 448, (1.0,))}


class OutputLoss(msgspec.Struct, frozen=True):
    """The quantization error of an output of a denoiser.

    Attributes:
        snr: SQNR in dB; None where there is no error.
        error: RMS of the error relative to the signal's.
    """

    snr: float | None
    error: float
