"""The few-step sampler and its noise. Plain arithmetic on numpy arrays or torch tensors.

Flow matching: x_s = (1 - s) x0 + s noise, and the model predicts flow = noise - x0. Few-step
models are distilled without classifier-free guidance, so a step is one forward.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from packforcing.config import Config

Array = Any  # numpy or torch


def schedule(config: Config, block: int) -> list[tuple[float, float, float]]:
    """The steps of a block: the timestep the model is told, the noise level, the level after it.

    Levels are shifted, shift s / (1 + (shift - 1) s) at s = timestep / 1000, and the model is
    told 1000 times the level. Where the config's timesteps are not warped, it is told those, at
    the nearest level that a shifted whole timestep has (CausVid).
    """

    def shifted(t: float) -> float:
        s = t / 1000
        return config.shift * s / (1 + (config.shift - 1) * s)

    given = config.first_timesteps if block == 0 and config.first_timesteps else config.timesteps
    if config.warp:
        levels = [shifted(t) for t in given]
        told = [1000 * level for level in levels]
    else:
        table = [shifted(t) for t in range(1, 1001)]
        levels = [min(table, key=lambda level: abs(1000 * level - t)) for t in given]
        told = list(given)
    return list(zip(told, levels, [*levels[1:], 0.0]))


def advance(config: Config, x: Array, flow: Array, noise: Array, now: float, then: float) -> Array:
    """The sample at noise level `then` from the one at `now` and the flow predicted there.

    "renoise" (distilled models: Self-Forcing's few-step loop) goes to the predicted x0 and adds
    fresh `noise`; "euler" follows the flow and needs none.
    """
    if config.sampler == "euler":
        return x + (then - now) * flow
    x0 = x - now * flow
    return x0 if then == 0 else (1 - then) * x0 + then * noise


def draw_noise(config: Config, seed: int, block: int, step: int) -> np.ndarray:
    """Gaussian noise of one step of one block, float32 [N, P].

    Counter-based: it depends on (seed, block, step) alone, so a resumed or reordered rollout
    draws the same.
    """
    bits = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=[0, 0, step, block])
    size = (config.block_tokens, config.token_dim)
    return np.random.Generator(bits).standard_normal(size, dtype=np.float32)
