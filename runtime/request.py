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
from packforcing.runtime.archive import IN_MEMORY, stored_blocks
from packforcing.runtime.arguments import check_integer, check_number, check_type, show_value
from packforcing.runtime.plan import LONGEST
from packforcing.units import format_memory, parse_memory


@dataclass(frozen=True)
class VideoRequest:
    """A checked request for one video.

    Attributes:
        timeline: When it follows which prompt.
        policy: Which history blocks read.
        frames: Its length; None: no end.
        seed: Of the noise.
        start: Frames that it begins with, uint8 RGB [T, H, W, 3].
        archive_limit: Blocks that the archive holds at most; None: all.
    """

    timeline: Timeline
    policy: Policy
    frames: int | None
    seed: int
    start: np.ndarray | None = None
    archive_limit: int | None = None


def make_request(
    manifest_config: Config,
    policy: Policy,
    prompt: Prompts,
    seconds: float | None,
    seed: int,
    start: np.ndarray | None = None,
    archive_limit: int | str | None = None,
) -> VideoRequest:
    """Check what a video is asked to be, and encode its prompts.

    Args:
        manifest_config: Of the bundle.
        policy: The policy that the video is made under.
        prompt: As for `check_request`.
        seconds: Length of the video; None: no end. The prompt is then a single one.
        seed: Of the noise.
        start: Frames that it begins with.
        archive_limit: Blocks that the archive holds at most, or an amount of memory like "512 MiB"
            for them. None: all, or where the video has no end those that fit into `IN_MEMORY` or a
            quarter of this machine's memory.

    Raises:
        PromptError: A prompt or a switch cannot be followed.
        ConfigError: Length, seed, start frames or limit are impossible, or memory is too small.
    """
    config = msgspec.structs.replace(manifest_config, policy=policy)
    timeline = check_request(config, prompt, seconds, seed)
    clip = None if start is None else check_start(config, start, timeline)
    limit = check_archive_limit(config, archive_limit, endless=seconds is None)
    check_memory(manifest_config, policy, timeline.blocks, limit)
    frames = _frames(config, seconds)
    return VideoRequest(timeline, policy, frames, check_seed(seed), clip, limit)


def check_archive_limit(config: Config, limit: int | str | None, *, endless: bool) -> int | None:
    """Check the limit of a video's archive.

    Args:
        config: The bundle's, with the policy of the video.
        limit: Blocks that the archive holds at most, or an amount of memory like "512 MiB" for
            them; None: as many as are right.
        endless: Whether the video has no end, so that its archive needs a limit.

    Returns:
        The limit in blocks; None: no limit.

    Raises:
        ConfigError: It is too small for the policy, or no amount.
    """
    policy = config.policy
    least = policy.mid + policy.recent + 1  # what is read, what will be, and one to give up
    row_bytes = max(1, archive_bytes(config, policy.sink + 1))
    if limit is None:
        memory = min(IN_MEMORY, total_memory() // 4)
        return max(least, memory // row_bytes) if endless else None
    bounds = f"{least} blocks or more: {policy.mid} to read, {policy.recent} recent, 1 to give up"
    if isinstance(limit, str):
        limit_bytes = parse_memory(limit)
        if limit_bytes is None or limit_bytes < least * row_bytes:
            raise ConfigError(
                f"archive_limit must be {bounds}; or memory for them, "
                f"{format_memory(least * row_bytes)} or more; it is {show_value(limit)}"
            )
        return limit_bytes // row_bytes
    return check_integer("archive_limit", limit, least, 2**63, bounds)


def check_request(config: Config, prompt: Prompts, seconds: float | None, seed: int) -> Timeline:
    """Check a request and encode its prompts, each once. Needs no graph.

    Args:
        config: Of the bundle.
        prompt: Words, where the model's text encoder is "words", an embedding, a schedule of
            them, or the result of an earlier call for the same video.
        seconds: Length of the video; None: no end, for a single prompt.
        seed: Of the noise.

    Returns:
        When the video follows which prompt. `Session.render` and `Session.stream` take it in
        place of the prompt.

    Raises:
        PromptError: A prompt or a switch cannot be followed.
        ConfigError: The length or the seed is impossible.
    """
    check_schedule(config, prompt, seconds, seed)
    return plan_prompts(prompt, config, _frames(config, seconds))


def check_schedule(config: Config, prompt: Prompts, seconds: float | None, seed: int) -> None:
    """Check what `check_request` does, except the words of prompts. Needs no text encoder."""
    check_seed(seed)
    plan_switches(prompt, config, _frames(config, seconds))


def _frames(config: Config, seconds: float | None) -> int | None:
    return None if seconds is None else config.frames(check_seconds(config, seconds))


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


def check_memory(
    config: Config, policy: Policy, blocks: int | None, archive_limit: int | None = None
) -> None:
    """Refuse a video that this machine's memory cannot hold, like a long one under full history.

    Args:
        config: Of the bundle.
        policy: The policy that the video is made under.
        blocks: Blocks of the video; None: no end.
        archive_limit: Blocks that the archive holds at most; None: all.

    Raises:
        ConfigError: The machine has less memory.
    """
    if blocks is not None:
        policy = policy.fit_to_video(blocks, config.policy)
    config = msgspec.structs.replace(config, policy=policy)
    archive = archive_memory(config, blocks, archive_limit)
    needed_bytes = sum(memory_by_purpose(config).values()) + archive
    machine_bytes = total_memory()
    if needed_bytes > machine_bytes:
        raise ConfigError(
            f"this video needs {format_memory(needed_bytes)} of memory under its policy, this "
            f"process can have {format_memory(machine_bytes)}: shorten it or choose another policy"
        )


def archive_memory(config: Config, blocks: int | None, archive_limit: int | None) -> int:
    """Return the bytes of host memory that a video's archive takes at most.

    Args:
        config: Of the bundle, with the policy of the video.
        blocks: Blocks of the video; None: no end.
        archive_limit: Blocks that the archive holds at most; None: all.
    """
    rows = stored_blocks(config, blocks, archive_limit)
    return min(archive_bytes(config, config.policy.sink + rows), IN_MEMORY)


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


def start_blocks(config: Config, frames: int, blocks: int | None) -> int:
    """Count the blocks that start frames fill in a video of `blocks` blocks; None: no end.

    As in Wan, the first latent frame stands for one pixel frame, each later one for four.
    """
    whole = (1 + (frames - 1) // TEMPORAL_FACTOR) // config.block_frames
    return max(1, whole) if blocks is None else min(max(1, whole), blocks)


def is_cut(timeline: Timeline, block: int) -> bool:
    """Tell whether a block begins a scene other than the first."""
    return block in timeline.switches and timeline.switches[block].history == "cut"


def frames_before(block: int, timeline: Timeline, config: Config) -> int:
    """Count the frames of all blocks before one; the first block of each scene is trimmed."""
    scenes = sum(
        first == 0 or is_cut(timeline, first) for first in timeline.switches if first < block
    )
    return block * config.block_pixel_frames - scenes * config.trimmed_frames
