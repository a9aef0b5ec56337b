"""How near one video is to another, frame by frame: PSNR, SSIM and GMSD. NumPy and OpenCV.

GMSD stands for a perceptual distance. Those that rank pictures still more as people do, like LPIPS,
need a network's weights, which nothing here downloads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from packforcing.evaluation.measures import read_frames

WINDOW, SIGMA = (11, 11), 1.5  # of SSIM, in pixels
STABLE = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # of its two quotients
PREWITT = np.array([[1, 0, -1]] * 3) / 3
STEADY = 170  # of GMSD's quotient, for values up to 255


class Fidelity(NamedTuple):
    psnr: float | None  # dB, of the mean squared error over all frames; None where they are equal
    ssim: float  # mean over frames; 1 where they are equal
    gmsd: float  # mean over frames; 0 where they are equal


def fidelity(video: Path, reference: Path, frames: int) -> Fidelity:
    """Of the first frames of two videos of one size; raises `VideoError`."""
    return compare_frames(*(islice(read_frames(path), frames) for path in (video, reference)))


def compare_frames(given: Iterable[np.ndarray], wanted: Iterable[np.ndarray]) -> Fidelity:
    """Of frames, uint8 RGB [H, W, 3]; raises `ValueError` where there are more of one."""
    squared, likeness, deviation = [], [], []
    for a, b in zip(given, wanted, strict=True):
        squared.append(np.mean((a.astype(np.float32) - b) ** 2, dtype=np.float64))
        likeness.append(ssim(a, b))
        deviation.append(gmsd(a, b))
    error = float(np.mean(squared))
    psnr = 10 * math.log10(255**2 / error) if error else None
    return Fidelity(psnr, float(np.mean(likeness)), float(np.mean(deviation)))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two pictures' luma: Wang et al., Image quality assessment (2004),
    equation 13, with its Gaussian window and constants, over windows that lie inside."""
    x, y = (cv2.cvtColor(one, cv2.COLOR_RGB2GRAY).astype(np.float64) for one in (a, b))
    edge = WINDOW[0] // 2

    def local(values: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(values, WINDOW, SIGMA)[edge:-edge, edge:-edge]

    mean_x, mean_y = local(x), local(y)
    spread_x, spread_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    together = local(x * y) - mean_x * mean_y
    c1, c2 = STABLE
    return float(
        np.mean(
            (2 * mean_x * mean_y + c1) * (2 * together + c2)
            / ((mean_x**2 + mean_y**2 + c1) * (spread_x + spread_y + c2))
        )
    )  # fmt: skip


def gmsd(a: np.ndarray, b: np.ndarray) -> float:
    """Gradient magnitude similarity deviation of two pictures' luma: Xue et al., Gradient magnitude
    similarity deviation (2014), equations 1 to 6, at half the size, over windows inside it."""

    def gradient(picture: np.ndarray) -> np.ndarray:
        luma = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float64)
        h, w = luma.shape[0] // 2, luma.shape[1] // 2
        half = luma[: 2 * h, : 2 * w].reshape(h, 2, w, 2).mean((1, 3))
        along, across = (cv2.filter2D(half, -1, kernel) for kernel in (PREWITT, PREWITT.T))
        return np.hypot(along, across)[1:-1, 1:-1]

    x, y = gradient(a), gradient(b)
    return float(np.std((2 * x * y + STEADY) / (x**2 + y**2 + STEADY)))
