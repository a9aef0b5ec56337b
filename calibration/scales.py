"""Fit scales: of weights to the matrix and the moments of its inputs, of a cache to histograms."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import onnx_ir as ir

from packforcing.calibration.activations import BIN_MAGNITUDES, Statistics
from packforcing.calibration.recipes import Recipe
from packforcing.errors import CalibrationError

# Keys are divided by their scales in fp16, which ends at 65,504. So even in the head's smallest
# channel a key may be 4 times as large as the largest observed in any, for int8; twice for fp8.
MAX_SCALE_RATIO = 64
ONE = np.float32(1)


def fit_weight_scales(
    matrix: np.ndarray,
    group: int,
    recipe: Recipe,
    dtype: np.dtype,
    name: str,
    moments: np.ndarray | None = None,
    unit: np.float32 = ONE,
) -> tuple[np.ndarray, float]:
    """Fit the scales of a matrix.

    An error e of the weights of an output gives it the mean squared error e' M e, where M are the
    second moments of the inputs.

    Args:
        matrix: float32 [inputs, outputs].
        group: Inputs that share a scale.
        recipe: Of the weights.
        dtype: Of the scales.
        name: The matrix, for error messages.
        moments: Second moments of every two inputs of a group, [groups, width, width]; different
            groups count as uncorrelated. `width` is `group` where the recipe has several clips.
            None: minimize the error of the weights.
        unit: Scales are stored as multiples of it.

    Returns:
        The scales in units, [inputs / group, outputs], and the SQNR in dB: of the outputs with
        `moments`, otherwise of the weights.

    Raises:
        ValueError: A weight is NaN or infinite.
    """
    groups = matrix.reshape(-1, group, matrix.shape[1])

    def power(weights: np.ndarray) -> np.ndarray:
        """Return the mean square of outputs, or the sum of squared weights, [groups, outputs]."""
        if moments is None:
            return np.einsum("ibo,ibo->io", weights, weights)
        weights = weights.reshape(len(moments), -1, matrix.shape[1])
        return np.einsum("ibo,ibo->io", weights, np.matmul(moments, weights))

    largest = np.abs(groups).max(1)
    if not np.isfinite(largest).all():
        raise ValueError(f"{name} has weights that are NaN or infinite; export sound weights")
    smallest = ml_dtypes.finfo(dtype).smallest_subnormal  # a group of zeros has a scale too
    scale = error = np.empty(0)
    for clip in recipe.clips:
        candidate = (largest * np.float32(clip / recipe.high) / unit).astype(dtype)
        candidate = np.maximum(candidate, smallest)
        steps = candidate.astype(np.float32) * unit
        difference = round_to_scales(matrix, group, steps, recipe)
        difference *= steps[:, None]
        difference -= groups
        candidate_error = power(difference)
        if scale.size:
            better = candidate_error < error
            candidate = np.where(better, candidate, scale)
            candidate_error = np.where(better, candidate_error, error)
        scale, error = candidate, candidate_error
    signal, noise = power(groups).sum(dtype=np.float64), error.sum(dtype=np.float64)
    return scale, 10 * math.log10(signal / noise) if noise else math.inf


def round_to_scales(
    matrix: np.ndarray, group: int, scale: np.ndarray, recipe: Recipe
) -> np.ndarray:
    """Divide a matrix by its scales and round to the nearest values of the recipe's dtype.

    Args:
        matrix: float32 [inputs, outputs].
        group: Inputs that share a scale.
        scale: [inputs / group, outputs].
        recipe: Of the weights.

    Returns:
        Quantized values, float32 [inputs / group, group, outputs].
    """
    groups = matrix.reshape(-1, group, matrix.shape[1]) / scale[:, None].astype(np.float32)
    np.clip(groups, recipe.low, recipe.high, out=groups)
    if recipe.dtype.startswith("INT"):
        return np.rint(groups, out=groups)
    return groups.astype(ir.DataType[recipe.dtype].numpy()).astype(np.float32)


def fit_cache_scales(statistics: Statistics, recipe: Recipe) -> dict[str, np.ndarray]:
    """Fit the scales of keys and values.

    Of the recipe's clips, the one with the least squared error over the histogram is used. The two
    channels of a RoPE pair of keys share a scale. No scale of a key is below the largest in its
    head divided by `MAX_SCALE_RATIO`.

    Args:
        statistics: Of a model.
        recipe: Of the cache.

    Returns:
        Scales of "k" and "v", float32 [L, H, d].

    Raises:
        CalibrationError: A channel was zero throughout.
    """
    scales = {}
    for kind in "kv":
        largest, counts = statistics[f"{kind}.largest"], statistics[f"{kind}.counts"]
        shared = 2 if kind == "k" else 1  # channels of a RoPE pair
        largest = largest.reshape(*largest.shape[:-1], -1, shared).max(-1)
        counts = counts.reshape(*largest.shape, shared, -1).sum(-2)
        if not largest.all():
            layer, head, channel = np.argwhere(largest == 0)[0]
            raise CalibrationError(
                f"{kind} of layer {layer}, head {head}, channel {channel * shared} was zero "
                "throughout: calibrate with more prompts, or check the model's weights"
            )
        least_error = np.full(largest.shape, np.inf)
        best = np.zeros((*largest.shape, shared), np.float32)
        for clip in recipe.clips:
            end = (largest * np.float32(clip))[..., None]
            scale = end / recipe.high
            squared = np.where(end < BIN_MAGNITUDES, (BIN_MAGNITUDES - end) ** 2, scale**2 / 12)
            error = (squared * counts).sum(-1)
            best = np.where((error < least_error)[..., None], scale, best)
            least_error = np.minimum(least_error, error)
        best = np.broadcast_to(best, (*largest.shape, shared))
        scales[kind] = best.reshape(statistics[f"{kind}.largest"].shape)
    scales["k"] = np.maximum(scales["k"], scales["k"].max(-1, keepdims=True) / MAX_SCALE_RATIO)
    return scales
