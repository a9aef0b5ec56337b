"""The few-step sampler and its noise. Plain arithmetic on NumPy arrays or torch tensors.

Flow matching: x_s = (1 - s) x0 + s noise, and the model predicts flow = noise - x0. Few-step
models are distilled without classifier-free guidance, so a step is one forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import msgspec
import numpy as np

from packforcing.config import Config
from packforcing.errors import ConfigError

Array = Any  # numpy or torch


@dataclass(frozen=True)
class StepOverrides:
    """Denoising steps in place of a model's own; None leaves the model's.

    Attributes:
        timesteps: Before the shift, decreasing from at most 1000 to at least 1.
        first_timesteps: Of the first block that is generated.
        shift: Of the noise levels, above 0.
        commit: What a block leaves to the history, see `Policy`.
    """

    timesteps: tuple[float, ...] | None = None
    first_timesteps: tuple[float, ...] | None = None
    shift: float | None = None
    commit: Literal["clean", "last-step"] | None = None

    def apply(self, config: Config) -> Config:
        """Return the config with these steps.

        Raises:
            ConfigError: A list or the shift is impossible.
        """
        changes: dict[str, Any] = {}
        for name in ("timesteps", "first_timesteps"):
            if (timesteps := getattr(self, name)) is not None:
                changes[name] = tuple(map(float, timesteps))
                _check_timesteps(changes[name])
        if self.shift is not None:
            changes["shift"] = float(self.shift)
        if self.commit is not None:
            changes["policy"] = msgspec.structs.replace(config.policy, commit=self.commit)
        return msgspec.structs.replace(config, **changes)


def _check_timesteps(timesteps: tuple[float, ...]) -> None:
    """Raise `ConfigError` unless timesteps can be denoised at, one after the other."""
    listed = ",".join(f"{timestep:g}" for timestep in timesteps)
    if not timesteps:
        raise ConfigError("a list of steps is empty: name one at least, like 1000,750,500,250")
    if timesteps[-1] == 0:
        raise ConfigError(f"the steps {listed} end in 0, which is no step: leave it out")
    if not all(1 <= timestep <= 1000 for timestep in timesteps):
        raise ConfigError(f"the steps {listed} are not all from 1 to 1000")
    if not all(before > after for before, after in pairwise(timesteps)):
        raise ConfigError(f"the steps {listed} do not decrease: begin with the noisiest, 1000")


def describe_steps(config: Config) -> str:
    """Describe the denoising steps of a model in a line, exactly."""

    def exact(value: float) -> str:
        return repr(float(value)).removesuffix(".0")

    def listed(timesteps: tuple[float, ...]) -> str:
        return " ".join(map(exact, timesteps))

    first = config.first_timesteps
    return (
        f"{config.sampler} at {listed(config.timesteps)}"
        + (f" (the first block generated at {listed(first)})" if first else "")
        + f", shift {exact(config.shift)}{'' if config.warp else ', not warped'}"
    )


def denoising_steps(config: Config, generated: int) -> list[tuple[float, float, float]]:
    """Return the denoising steps of a block.

    Noise levels are shifted: shift s / (1 + (shift - 1) s) at s = timestep / 1000. The model's
    timestep is 1000 times the level. Where the config's timesteps are not warped (CausVid), they
    are the model's, and the level is the nearest one that a shifted whole timestep has.

    Args:
        config: The model.
        generated: Blocks that its rollout generated before this one. `config.first_timesteps`
            are of the first block that is generated: one that was given has no steps.

    Returns:
        Per step the model's timestep, the noise level, and the level after the step.
    """

    def shifted(t: float) -> float:
        s = t / 1000
        return config.shift * s / (1 + (config.shift - 1) * s)

    first = generated == 0 and config.first_timesteps
    timesteps = config.first_timesteps if first else config.timesteps
    if config.warp:
        levels = [shifted(t) for t in timesteps]
        inputs = [1000 * level for level in levels]
    else:
        table = [shifted(t) for t in range(1, 1001)]
        levels = [min(table, key=lambda level: abs(1000 * level - t)) for t in timesteps]
        inputs = list(timesteps)
    return list(zip(inputs, levels, [*levels[1:], 0.0]))


def advance(config: Config, x: Array, flow: Array, noise: Array, now: float, then: float) -> Array:
    """Advance a sample from one noise level to the next.

    "renoise" (distilled models: Self-Forcing's few-step loop) takes the predicted x0 and adds
    fresh noise. "euler" follows the flow and needs no noise.

    Args:
        config: The model, which names the sampler.
        x: The sample at level `now`.
        flow: The flow predicted there, of the same shape.
        noise: Gaussian noise of the same shape; not read by "euler" or at the last step.
        now: Noise level of `x`, from 0 to 1.
        then: Noise level of the result.
    """
    if config.sampler == "euler":
        return x + (then - now) * flow
    x0 = x - now * flow
    return x0 if then == 0 else (1 - then) * x0 + then * noise


def draw_noise(config: Config, seed: int, block: int, step: int) -> np.ndarray:
    """Draw the Gaussian noise of one step of one block.

    The generator is counter-based: the noise depends on (seed, block, step) alone, so that a
    resumed or reordered rollout draws the same.

    Returns:
        float32 [N, P].
    """
    bits = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=[0, 0, step, block])
    size = (config.block_tokens, config.token_dim)
    return np.random.Generator(bits).standard_normal(size, dtype=np.float32)
