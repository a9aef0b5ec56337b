"""Compare a video with a reference frame by frame: PSNR, SSIM and GMSD.

GMSD stands for a perceptual distance. Those that rank pictures still more as people do, like LPIPS,
need a network's weights, which nothing here downloads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from packforcing.evaluation.video_reader import read_frames
from packforcing.extras import optional_imports

with optional_imports("comparing videos", "evaluate"):
    import cv2
    from skimage.metrics import structural_similarity

PREWITT = np.array([[1, 0, -1]] * 3) / 3
STABILITY = 170  # of GMSD's quotient, for values up to 255


class Fidelity(NamedTuple):
    """How close a video is to its reference.

    Attributes:
        psnr: Peak signal-to-noise ratio in dB, of the mean squared error over all frames. None
            where the frames are equal.
        ssim: Structural similarity, mean over frames; 1 where they are equal.
        gmsd: Gradient magnitude similarity deviation, mean over frames; 0 where they are equal.
    """

    psnr: float | None
    ssim: float
    gmsd: float


def video_fidelity(video: Path, reference: Path, frames: int) -> Fidelity:
    """Compare the first frames of two videos of one size.

    Args:
        video: A video file.
        reference: The file it is compared with.
        frames: Number of frames.

    Raises:
        VideoError: A file is damaged.
    """
    return frame_fidelity(*(islice(read_frames(path), frames) for path in (video, reference)))


def frame_fidelity(frames: Iterable[np.ndarray], reference: Iterable[np.ndarray]) -> Fidelity:
    """Compare frames with reference frames.

    Args:
        frames: Frames, uint8 RGB [H, W, 3].
        reference: As many frames of the same size.

    Raises:
        ValueError: One of them has more frames.
    """
    squared, similarities, deviations = [], [], []
    for a, b in zip(frames, reference, strict=True):
        squared.append(np.mean((a.astype(np.float32) - b) ** 2, dtype=np.float64))
        similarities.append(ssim(a, b))
        deviations.append(gmsd(a, b))
    error = float(np.mean(squared))
    psnr = 10 * math.log10(255**2 / error) if error else None
    return Fidelity(psnr, float(np.mean(similarities)), float(np.mean(deviations)))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Return the structural similarity of two pictures' luma (Wang et al., 2004, equation 13).

    With the paper's Gaussian window of 11x11 pixels and its constants, over windows that lie
    inside the picture.

    Args:
        a: A picture, uint8 RGB [H, W, 3].
        b: Another one of the same size.
    """
    return float(
        structural_similarity(
            _luma(a),
            _luma(b),
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def gmsd(a: np.ndarray, b: np.ndarray) -> float:
    """Return the gradient magnitude similarity deviation of two pictures' luma.

    Xue et al. (2014), equations 1 to 6: at half the size, over windows inside the picture.

    Args:
        a: A picture, uint8 RGB [H, W, 3].
        b: Another one of the same size.
    """
    x, y = _gradient_magnitude(a), _gradient_magnitude(b)
    return float(np.std((2 * x * y + STABILITY) / (x**2 + y**2 + STABILITY)))


def _luma(picture: np.ndarray) -> np.ndarray:
    """Luma of an RGB picture, float64 [H, W]."""
    return cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float64)


def _gradient_magnitude(picture: np.ndarray) -> np.ndarray:
    """Prewitt gradients of luma at half the size."""
    luma = _luma(picture)
    h, w = luma.shape[0] // 2, luma.shape[1] // 2
    half = luma[: 2 * h, : 2 * w].reshape(h, 2, w, 2).mean((1, 3))
    along, across = (cv2.filter2D(half, -1, kernel) for kernel in (PREWITT, PREWITT.T))
    return np.hypot(along, across)[1:-1, 1:-1]
