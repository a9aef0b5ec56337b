"""Three-axis rotary position embedding, as in Wan (public code: wan/modules/model.py).

A head's channels are adjacent pairs, split over (time, row, column). Each axis has its own
frequencies. Tables are computed in float64 and returned as real cos and sin, so that positions may
be fractional and unbounded, and no complex number enters a graph. NumPy only.
"""

from __future__ import annotations

import numpy as np

from packforcing.config import Config

THETA = 10000.0


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Return the channel pairs of time, row and column: 22, 21, 21 for a head of 128."""
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


def rope_table(positions: np.ndarray, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the cos and sin tables of positions.

    Args:
        positions: [N, 3] as (time, row, column), fractions allowed.
        head_dim: Channels of one attention head.

    Returns:
        cos and sin, float32 [N, head_dim / 2].
    """
    angles = [
        positions[:, axis : axis + 1] * THETA ** (-np.arange(pairs, dtype=np.float64) / pairs)
        for axis, pairs in enumerate(axis_pairs(head_dim))
    ]
    angle = np.concatenate(angles, axis=1)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def block_positions(config: Config, start: float) -> np.ndarray:
    """Return the positions of a full block whose first frame is at `start`, float64 [N, 3]."""
    return _grid(start + np.arange(config.block_frames), *map(np.arange, config.grid))


def compressed_positions(config: Config, start: float, span: float) -> np.ndarray:
    """Return the positions of a compressed block.

    Each token is at the center, on the full grid, of the cells that it stands for.

    Args:
        config: The model.
        start: Temporal position of the block's first frame.
        span: Latent frames that the block spans in time, to which its own frames are scaled.

    Returns:
        float64 [N_c, 3].
    """
    t, h, w = config.compressed_grid
    frames = np.minimum(np.arange(2 * t), config.block_frames - 1).reshape(t, 2)
    time = (frames.mean(1) + 0.5) * (span / config.block_frames) - 0.5
    return _grid(start + time, 4 * np.arange(h) + 1.5, 4 * np.arange(w) + 1.5)


def _grid(time: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    axes = np.meshgrid(time, rows, columns, indexing="ij")
    return np.stack(axes, axis=-1).reshape(-1, 3).astype(np.float64)
