"""One PackForcing rollout in plain NumPy, float64, written from the formulas.

This file is an independent truth for the tests: with `numpy_transformer` and `numpy_autoencoder` it
needs NumPy alone and shares no code with the package. It is written for reading. Where the package
pools, streams, caches or copies, these files compute the formula itself: the history is a list of
blocks, a key is rotated when it is read, and a block's affinity is the mean over all pairs of a
query and a key.

Letters in shapes: F latent frames of a block, C latent channels, h and w latent rows and columns,
n tokens, P numbers in a token's patch, D width, H heads, d numbers in a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.golden.numpy_autoencoder import Memory, decode, encode
from tests.golden.numpy_transformer import (
    Array,
    Context,
    KeyValue,
    Weights,
    cross_key_values,
    from_tokens,
    linear,
    silu,
    to_tokens,
    transformer,
)

Noise = Callable[[int, int], Array]  # (block, draw) to [F, C, h, w]

CELLS = 4  # rows and columns of the token grid that one compressed token stands for


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes, sampler and history policy of a rollout. The weights' shapes have all other sizes."""

    heads: int
    block_frames: int
    grid: tuple[int, int]  # token rows and columns of one latent frame
    patch: int
    text_len: int
    eps: float = 1e-6
    sampler: str  # "renoise" or "euler"
    timesteps: tuple[float, ...]
    first_timesteps: tuple[float, ...] = ()  # of the first block generated, where it takes others
    warp: bool = True  # whether the shift applies to the timesteps
    shift: float
    sink: int  # blocks, as are mid and recent
    mid: int
    recent: int
    positions: str  # "packed" or "absolute"
    mid_span: float | None = None  # latent frames that a compressed block spans when it is read
    commit: str = "clean"  # or "last-step"


@dataclass
class Block:
    """A committed block: what later blocks can read of it."""

    index: int
    full: list[KeyValue]
    queries: list[Array]  # of each layer, [n, H, d] before RoPE
    compressed: list[KeyValue] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """What the rollout yields for one block."""

    latents: Array  # [F, C, h, w]
    frames: Array | None  # [4 F, 3, H, W] in 0..1; None if the weights have no autoencoder
    first_flow: Array | None  # [F, C, h, w], of the first denoising step; None if it was given
    read: list[int]  # the compressed blocks in the context, oldest first


def rollout(
    weights: Weights,
    settings: Settings,
    text: Array,
    blocks: int,
    noise: Noise,
    clip: Sequence[Array] = (),
) -> Iterator[Result]:
    """Generate a video block by block.

    Args:
        weights: Checkpoint names to arrays.
        settings: Sizes, sampler and policy.
        text: Prompt embedding, [rows, text_dim], of at most `settings.text_len` rows.
        blocks: How many blocks to generate.
        noise: Gaussian noise of a block. Draw 0 starts it, draw s is added after its step s.
        clip: Clean blocks [F, C, h, w] that the video begins with; they are committed alone.

    Yields:
        One `Result` per block, in order.
    """
    s = settings
    cross = cross_key_values(weights, text, s.text_len, s.heads, s.eps)
    has_pixels = any(name.startswith("autoencoder.") for name in weights)
    history: list[Block] = []
    selected: list[int] = []
    memory: Memory = {}

    for index in range(blocks):
        context, start = read_context(s, history, selected)
        at = full_positions(s, start)

        # Denoising reads the history and does not change it.
        flows: list[Array] = []
        is_start = index < len(clip)
        x = clip[index] if is_start else noise(index, 0)
        levels = [] if is_start else noise_levels(s, index - len(clip))
        for step, (timestep, level, next_level) in enumerate(levels):
            tokens = to_tokens(x, s.patch)
            output = transformer(weights, s.heads, s.eps, tokens, timestep, at, cross, context)
            flow = from_tokens(output.flow, x.shape, s.patch)
            flows.append(flow)
            if s.sampler == "euler":  # along the flow
                x = x + (next_level - level) * flow
            else:  # to the predicted clean sample, and back to the next level with new noise
                x = x - level * flow
                if next_level > 0:
                    x = (1 - next_level) * x + next_level * noise(index, step + 1)

        # Commit: the clean block at t = 0 in the same context, or what the last step has computed.
        if s.commit == "clean" or is_start:
            output = transformer(
                weights, s.heads, s.eps, to_tokens(x, s.patch), 0.0, at, cross, context
            )
        block = Block(index, output.key_values, output.queries)
        frames = decode(weights, x, memory) if has_pixels else None

        # Mid pass: the compressed block at t = 0 in the same context.
        if s.mid and index >= s.sink:
            assert frames is not None
            tokens, features = compress(weights, s, x, frames)
            at = compressed_positions(s, start, s.block_frames)
            output = transformer(weights, s.heads, s.eps, tokens, 0.0, at, cross, context, features)
            block.compressed = output.key_values

        yield Result(x, frames, flows[0] if flows else None, selected)
        history.append(block)
        selected = select(s, history)


# The history: which blocks are read, and at which positions


def select(s: Settings, history: list[Block]) -> list[int]:
    """Select the compressed blocks that the next block reads: those of the highest affinity.

    The affinity of a block is the mean over layers, heads, queries i of the newest block and keys j
    of the compressed block of q_i . k_j / sqrt(d), without softmax (PackForcing, appendix G).
    """

    def affinity(block: Block) -> float:
        products = [
            np.einsum("ihd,jhd->hij", queries, keys) / np.sqrt(keys.shape[-1])
            for queries, (keys, _) in zip(history[-1].queries, block.compressed)
        ]
        return float(np.mean(products))

    candidates = [
        block for block in history if s.sink <= block.index < len(history) - s.recent and s.mid
    ]
    ranked = sorted(candidates, key=affinity, reverse=True)
    return sorted(block.index for block in ranked[: s.mid])


def read_context(s: Settings, history: list[Block], selected: list[int]) -> tuple[Context, float]:
    """Collect what the next block reads, and the temporal position of its first latent frame.

    Packed positions count what is read, in time order: a full block spans its latent frames, a
    compressed block `mid_span`. Absolute positions are those of the video.
    """
    frames, packed = s.block_frames, s.positions == "packed"
    span = s.mid_span if packed and s.mid_span is not None else frames
    key_values, positions = [], []
    position = 0.0
    for block in history:
        start = position if packed else float(frames * block.index)
        if block.index < s.sink or block.index >= len(history) - s.recent:
            key_values.append(block.full)
            positions.append(full_positions(s, start))
            position += frames
        elif block.index in selected:
            key_values.append(block.compressed)
            positions.append(compressed_positions(s, start, span))
            position += span
    start = position if packed else float(frames * len(history))
    return Context(key_values, positions), start


def full_positions(s: Settings, start: float) -> Array:
    """List the positions (time, row, column) of a block's tokens, [n, 3], frames slowest."""
    rows, columns = s.grid
    return np.array([
        (start + frame, row, column)
        for frame in range(s.block_frames)
        for row in range(rows)
        for column in range(columns)
    ], float)  # fmt: skip


def compressed_positions(s: Settings, start: float, span: float) -> Array:
    """List the positions of a compressed block's tokens, [n, 3]: the centers of their cells.

    A token stands for two latent frames and 4 x 4 grid cells. An odd block repeats its last frame,
    which does not move that frame's center. In time, the cells' centers at 0.5, 1.5, ... of the
    block's F frames are scaled to `span` frames.
    """
    rows, columns = s.grid
    last = s.block_frames - 1
    pairs = [(min(frame, last), min(frame + 1, last)) for frame in range(0, s.block_frames, 2)]
    times = [((first + second) / 2 + 0.5) * span / s.block_frames - 0.5 for first, second in pairs]
    return np.array([
        (start + time, CELLS * row + 1.5, CELLS * column + 1.5)
        for time in times
        for row in range(rows // CELLS)
        for column in range(columns // CELLS)
    ], float)  # fmt: skip


# The sampler


def noise_levels(s: Settings, generated: int) -> list[tuple[float, float, float]]:
    """List the model's timestep, the noise level and the next level of each step of a block.

    A shift maps the level t / 1000 to shift t' / (1 + (shift - 1) t'). With `warp` the model's
    timestep is 1000 times the shifted level. Without it the model's timestep is the listed one, and
    its level is the nearest of those that the whole timesteps 1 to 1000 are shifted to (CausVid).
    The first list is of the first block that is generated: Causal-Forcing's pipeline counts those.
    """
    listed = s.first_timesteps if generated == 0 and s.first_timesteps else s.timesteps

    def shifted(level: float) -> float:
        return s.shift * level / (1 + (s.shift - 1) * level)

    if s.warp:
        levels = [shifted(timestep / 1000) for timestep in listed]
        timesteps = [1000 * level for level in levels]
    else:
        table = np.array([shifted(timestep / 1000) for timestep in range(1, 1001)])
        levels = [float(table[np.abs(table - timestep / 1000).argmin()]) for timestep in listed]
        timesteps = list(listed)
    return list(zip(timesteps, levels, [*levels[1:], 0.0]))


# The compressor


def compress(weights: Weights, s: Settings, latents: Array, frames: Array) -> tuple[Array, Array]:
    """Turn a clean block into the tokens [n, P] and features [n, D] of its compressed block.

    Low branch: pixels averaged over 2 x 4 x 4, encoded and cut into patches. High branch: strided
    convolutions of the latents, kernel = stride = (2, 1, 1) and three times (1, 2, 2), with a SiLU
    after each, then a projection to the width. Both drop cells that fill no compressed token.
    """
    odd = s.block_frames % 2
    frames = np.concatenate((frames, frames[-1:].repeat(4 * odd, 0)))
    t, _, height, width = frames.shape
    small = frames.reshape(t // 2, 2, 3, height // 4, 4, width // 4, 4).mean((1, 4, 6))
    rows, columns = (s.patch * (cells // CELLS) for cells in s.grid)
    tokens = to_tokens(encode(weights, small)[:, :, :rows, :columns], s.patch)

    x = np.concatenate((latents, latents[-1:].repeat(odd, 0))).transpose(0, 2, 3, 1)
    for layer, (t, h, w) in enumerate([(2, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2)]):
        name = f"compressor.high.{2 * layer}"
        frames_out, rows_out, columns_out = x.shape[0] // t, x.shape[1] // h, x.shape[2] // w
        x = x[: frames_out * t, : rows_out * h, : columns_out * w]
        x = x.reshape(frames_out, t, rows_out, h, columns_out, w, -1)
        x = np.einsum("fthiwjc,octij->fhwo", x, weights[f"{name}.weight"])
        x = silu(x + weights[f"{name}.bias"])
    features = linear(x.reshape(-1, x.shape[-1]), weights, "compressor.high.8")
    return tokens, features
