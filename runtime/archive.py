"""The archive: every compressed block of a video, in host memory or in a file."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import numpy as np

from packforcing.config import Config
from packforcing.errors import OutputError
from packforcing.runtime.allocations import archive_rows
from packforcing.runtime.bundle import DTYPES
from packforcing.units import format_file_size

IN_MEMORY = 4 << 30  # bytes of keys and values; more than that lie in a file


class Archive:
    """Keys and values of the compressed blocks, and the pooled keys that selection reads.

    All of it is reserved at once. Keys and values of more than `IN_MEMORY` bytes lie in a file
    without a name, of which the system keeps in memory what is read often.

    Args:
        config: The config of the rollout.
        blocks: Blocks of the video.
        folder: Where such a file is made; None: the system's folder for temporary files.

    Raises:
        OutputError: The disk has no room for the file.
    """

    def __init__(self, config: Config, blocks: int, folder: Path | None = None) -> None:
        tokens = config.compressed_tokens if config.policy.mid else 0
        shape = (config.layers, 2, 1, config.heads, tokens, config.head_dim)
        pooled_shape = (config.layers, config.heads, config.head_dim)
        dtype = np.dtype(DTYPES[config.precision.cache])
        self.first = config.policy.sink
        rows = archive_rows(config, blocks)
        self.key_values = _zeros((rows, *shape), dtype, folder)
        self.pooled_keys = np.zeros((rows, *pooled_shape), np.float32)

    def put(self, block: int, key_values: np.ndarray, pooled_key: np.ndarray) -> None:
        """Store a block: keys and values [L, 2, 1, H, N_c, d], pooled key [L, H, d]."""
        self.key_values[block - self.first] = key_values
        self.pooled_keys[block - self.first] = pooled_key

    def get(self, block: int) -> np.ndarray:
        """Return the keys and values of a block, [L, 2, 1, H, N_c, d]."""
        return self.key_values[block - self.first]

    def keys(self, blocks: range) -> np.ndarray:
        """Return the pooled keys of consecutive blocks, [blocks, L, H, d], as a view."""
        return self.pooled_keys[blocks.start - self.first : blocks.stop - self.first]


def _zeros(shape: tuple[int, ...], dtype: np.dtype, folder: Path | None) -> np.ndarray:
    """Allocate zeros in memory, or in a file if they are many."""
    size = math.prod(shape) * dtype.itemsize
    if size <= IN_MEMORY:
        return np.zeros(shape, dtype)
    folder = folder or Path(tempfile.gettempdir())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # a mapped file without room on the disk would end the process when written to
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        raise OutputError(
            f"the archive of this video takes {format_file_size(size)}, which {folder} refuses "
            f"({error.strerror}): free some space there, or make the video shorter"
        ) from error
