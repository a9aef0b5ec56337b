"""The archive: every compressed block of a video, in host memory or in a file."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from packforcing.config import Config
from packforcing.errors import OutputError
from packforcing.runtime.allocations import archive_rows
from packforcing.runtime.bundle import DTYPES
from packforcing.selection import evict
from packforcing.units import format_file_size

IN_MEMORY = 4 << 30  # bytes of keys and values; more than that lie in a file
ZEROS_BYTES = 1 << 20  # written at a time


class Archive:
    """Keys and values of the compressed blocks, and the pooled keys that selection reads.

    Address space for all of it is reserved at once; memory is taken as blocks are stored. Keys and
    values of more than `IN_MEMORY` bytes lie in a file without a name, of which the system keeps in
    memory what is read often.

    Attributes:
        limit: Blocks that it holds at most; None: all.
        rows: The row of each stored block in `key_values` and `pooled_keys`, in order of blocks.
            As long as none was evicted, the rows are in order too.
    """

    def __init__(
        self,
        config: Config,
        blocks: int | None,
        folder: Path | None = None,
        limit: int | None = None,
    ) -> None:
        """Reserve an archive.

        Args:
            config: The config of the rollout.
            blocks: Blocks of the video; None: no end, and `limit` is set.
            folder: Where such a file is made; None: the system's folder for temporary files.
            limit: Blocks to hold at most; None: all.

        Raises:
            OutputError: The disk has no room for the file.
        """
        tokens = config.compressed_tokens if config.policy.mid else 0
        shape = (config.layers, 2, 1, config.heads, tokens, config.head_dim)
        pooled_shape = (config.layers, config.heads, config.head_dim)
        dtype = np.dtype(DTYPES[config.precision.cache])
        self.limit, self.rows = limit, dict[int, int]()
        self._first = config.policy.sink  # the first block that is archived
        count = stored_blocks(config, blocks, limit)
        self.key_values = _zeros((count, *shape), dtype, folder)
        self.pooled_keys = np.zeros((count, *pooled_shape), np.float32)

    def clear(self) -> None:
        """Forget all blocks."""
        self.rows.clear()

    def put(
        self, block: int, key_values: np.ndarray, pooled_key: np.ndarray, needed: Collection[int]
    ) -> None:
        """Store a block; a full archive evicts another one for it.

        Args:
            block: Its number; blocks are stored in order.
            key_values: [L, 2, 1, H, N_c, d].
            pooled_key: [L, H, d].
            needed: Blocks that are not evicted, fewer than the limit.
        """
        row = len(self.rows)
        if row == self.limit:
            row = self.rows.pop(evict([*self.rows], needed))
        self.rows[block] = row
        self.key_values[row] = key_values
        self.pooled_keys[row] = pooled_key

    def restore(self, blocks: Sequence[int]) -> None:
        """Take blocks as stored, the first in row 0 and so on; the caller fills the rows."""
        self.rows = {block: row for row, block in enumerate(blocks)}

    @property
    def _is_whole(self) -> bool:
        """Whether no block was evicted, not even the first."""
        return not self.rows or next(reversed(self.rows)) == self._first + len(self.rows) - 1

    def get(self, block: int) -> np.ndarray:
        """Return the keys and values of a block, [L, 2, 1, H, N_c, d]."""
        return self.key_values[self.rows[block]]

    def stored(self, blocks: range) -> Sequence[int]:
        """Return those of consecutive blocks that have not been evicted."""
        if self._is_whole:
            return blocks
        return [block for block in self.rows if block in blocks]

    def keys(self, blocks: Sequence[int]) -> np.ndarray:
        """Return the pooled keys of stored blocks, [blocks, L, H, d].

        They are a view as long as no block was evicted: `blocks` are consecutive then.
        """
        if self._is_whole:
            first = self.rows[blocks[0]] if blocks else 0
            return self.pooled_keys[first : first + len(blocks)]
        return self.pooled_keys[[self.rows[block] for block in blocks]]


def stored_blocks(config: Config, blocks: int | None, limit: int | None) -> int:
    """Return the largest number of blocks that a video's archive holds.

    Args:
        config: The config of the rollout.
        blocks: Blocks of the video; None: no end, and `limit` is set.
        limit: Blocks to hold at most; None: all.
    """
    assert blocks is not None or limit is not None
    if not config.policy.mid:
        return 0
    counts = (None if blocks is None else archive_rows(config, blocks), limit)
    return min(count for count in counts if count is not None)


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
            else:  # on macOS and Windows: a file that is only made longer may have holes there
                zeros = bytes(ZEROS_BYTES)
                for begin in range(0, size, ZEROS_BYTES):
                    file.write(zeros[: size - begin])
                file.flush()
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        raise OutputError(
            f"the archive of this video takes {format_file_size(size)}, which {folder} refuses "
            f"({error.strerror}): free some space there, or make the video shorter"
        ) from error
