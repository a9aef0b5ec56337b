"""Check what a video is asked to be, before any graph is loaded or run."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from packforcing.config import TEMPORAL_FACTOR, Config, Policy
from packforcing.errors import ConfigError
from packforcing.machine import total_memory
from packforcing.prompts import Prompts, Timeline, plan_prompts, plan_switches
from packforcing.runtime.allocations import archive_bytes, memory_by_purpose
from packforcing.runtime.archive import IN_MEMORY
from packforcing.runtime.arguments import check_integer, check_number, check_type
from packforcing.runtime.plan import LONGEST
from packforcing.units import format_memory


@dataclass(frozen=True)
class VideoRequest:
    """A checked request for one video."""

    timeline: Timeline
    frames: int
    seed: int
    start: np.ndarray | None  # frames that the video begins with, uint8 RGB [T, H, W, 3]


def check_request(config: Config, prompt: Prompts, seconds: float, seed: int) -> Timeline:
    """Check a request and encode its prompts, each once. Needs no graph.

    Args:
        config: Of the bundle.
        prompt: Words, where the model's text encoder is "words", an embedding, a schedule of
            them, or the result of an earlier call for the same video.
        seconds: Length of the video.
        seed: Of the noise.

    Returns:
        When the video follows which prompt. `Session.render` and `Session.stream` take it in
        place of the prompt.

    Raises:
        PromptError: A prompt or a switch cannot be followed.
        ConfigError: The length or the seed is impossible.
    """
    check_schedule(config, prompt, seconds, seed)
    return plan_prompts(prompt, config, config.frames(check_seconds(config, seconds)))


def check_schedule(config: Config, prompt: Prompts, seconds: float, seed: int) -> None:
    """Check what `check_request` does, except the words of prompts. Needs no text encoder."""
    seconds = check_seconds(config, seconds)
    check_seed(seed)
    plan_switches(prompt, config, config.frames(seconds))


def check_seconds(config: Config, seconds: float) -> float:
    """Return the length of a video; raise `ConfigError` unless it is possible."""
    bounds = f"above 0, at least one frame and at most {LONGEST:.0f}"
    length = check_number("seconds", seconds, LONGEST, bounds)
    if not config.frames(length):
        raise ConfigError(f"seconds must be {bounds}; it is {length:g}")
    return length


def check_seed(seed: int) -> int:
    """Return the seed of a video; raise `ConfigError` unless it is possible."""
    return check_integer("seed", seed, 0, 2**64 - 1, "from 0 to 2^64 - 1, an integer")


def check_memory(config: Config, policy: Policy, blocks: int) -> None:
    """Refuse a video that this machine's memory cannot hold, like a long one under full history.

    Args:
        config: Of the bundle.
        policy: The policy that the video is made under.
        blocks: Blocks of the video.

    Raises:
        ConfigError: The machine has less memory.
    """
    config = msgspec.structs.replace(config, policy=policy.fit_to_video(blocks, config.policy))
    archive = min(archive_bytes(config, blocks), IN_MEMORY)
    needed_bytes = sum(memory_by_purpose(config).values()) + archive
    machine_bytes = total_memory()
    if needed_bytes > machine_bytes:
        raise ConfigError(
            f"this video needs {format_memory(needed_bytes)} of memory under its policy, this "
            f"process can have {format_memory(machine_bytes)}: shorten it or choose another policy"
        )


def check_start(config: Config, start: np.ndarray, timeline: Timeline) -> np.ndarray:
    """Check the frames that a video begins with.

    Args:
        config: Of the bundle.
        start: An image, uint8 RGB [H, W, 3], or a clip, [T, H, W, 3].
        timeline: Of the video.

    Returns:
        The clip; an image becomes a clip of one frame.

    Raises:
        ConfigError: Shape or dtype differ, or a cut falls into the blocks that the clip fills.
    """
    size = (config.height, config.width, 3)
    shape = f"uint8 [T, {size[0]}, {size[1]}, 3]"
    check_type("start frames", start, np.ndarray, f"a NumPy array, {shape}")
    clip = start[None] if start.ndim == 3 else start
    if clip.ndim != 4 or not len(clip) or clip.shape[1:] != size or clip.dtype != np.uint8:
        raise ConfigError(
            f"start frames must be {shape}; they are {start.dtype} {list(start.shape)}"
        )
    clip_blocks = start_blocks(config, len(clip), timeline.blocks)
    for block, switch in timeline.switches.items():
        if switch.history == "cut" and block < clip_blocks:
            raise ConfigError(
                f"the cut at {switch.time:g} s falls into the start that the video begins "
                f"with, {clip_blocks} blocks: set it later"
            )
    return clip


def start_blocks(config: Config, frames: int, blocks: int) -> int:
    """Count the blocks that start frames fill in a video of `blocks` blocks.

    As in Wan, the first latent frame stands for one pixel frame, each later one for four.
    """
    whole = (1 + (frames - 1) // TEMPORAL_FACTOR) // config.block_frames
    return min(max(1, whole), blocks)


def is_cut(timeline: Timeline, block: int) -> bool:
    """Tell whether a block begins a scene other than the first."""
    return block in timeline.switches and timeline.switches[block].history == "cut"


def frames_before(block: int, timeline: Timeline, config: Config) -> int:
    """Count the frames of all blocks before one; the first block of each scene is trimmed."""
    scenes = sum(
        first == 0 or is_cut(timeline, first) for first in timeline.switches if first < block
    )
    return block * config.block_pixel_frames - scenes * config.trimmed_frames
