"""The page about one render: frames, speed, memory, and what each block read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from packforcing.app.reports.page import (
    picture_url,
    read_paths,
    runtime_versions,
    sample_frames,
    save_page,
)
from packforcing.config import Config
from packforcing.units import format_memory

if TYPE_CHECKING:
    from packforcing.runtime import BlockInfo, RenderSummary

SAMPLES, SAMPLE_WIDTH = 12, 256  # frames on the page, and their largest width in pixels
TIME_TICKS, BLOCK_TICKS = 5, 6  # at most, so that a phone has room for their text
HEADROOM = 1.2  # of the chart of times, over its highest bar or line, for the line's label


def write_report(
    path: Path,
    video: Path,
    prompt: str,
    seed: int,
    config: Config,
    blocks: Sequence[BlockInfo],
    summary: RenderSummary,
    memory: dict[str, int],
    tools: dict[str, str],
) -> None:
    """Write the page about a video.

    Args:
        path: The page.
        video: The video, in the folder of the page.
        prompt: What the video shows.
        seed: Its seed.
        config: The model.
        blocks: The blocks that this process made: after a resume, those since its last snapshot.
        summary: What the render took.
        memory: Bytes by buffer.
        tools: Versions of what exported the bundle.

    Raises:
        OutputError: The page cannot be written.
    """
    generated = [block for block in blocks if not block.recovered]
    save_page(
        path,
        "demo.html.j2",
        prompt=prompt,
        video=video.name,
        video_url=quote(video.name, errors="replace"),
        width=config.width,
        height=config.height,
        pictures=[
            {"url": picture_url(picture, "png"), "time": f"{index / config.fps:.1f} s"}
            for index, picture in sample_frames(video, summary.frames, SAMPLES, SAMPLE_WIDTH)
        ],
        render=_render_facts(seed, config, generated, summary),
        durations=_durations(generated, summary.blocks, config.block_pixel_frames / config.fps),
        reads=read_paths([block.read for block in blocks], config.policy, blocks[0].index)
        if blocks
        else {},
        first_read=blocks[0].index if blocks else 0,
        blocks=summary.blocks,
        time_rows=_time_rows(summary, len(generated)) if generated else {},
        memory_rows=_memory_rows(memory, summary.archive_bytes),
        versions={
            "Rendered with": runtime_versions(),
            "Bundle exported with": ", ".join(f"{name} {tools[name]}" for name in tools),
        },
    )


def _render_facts(
    seed: int, config: Config, generated: Sequence[BlockInfo], summary: RenderSummary
) -> dict[str, str]:
    length_seconds = summary.frames / config.fps
    facts = {
        "Model": f"{config.name}, {config.width}x{config.height}, {config.fps} frames/s",
        "Seed": str(seed),
        "History": str(config.policy),
        "Length": f"{summary.frames} frames, {length_seconds:.1f} s, in {summary.blocks} blocks",
    }
    generated_seconds = summary.frames_generated / config.fps
    if summary.frames_generated < summary.frames:
        rest = (
            f"times are of the remaining {generated_seconds:.1f} s" if generated else "none is new"
        )
        facts["Resumed"] = f"after {summary.frames - summary.frames_generated} frames; {rest}"
    if generated:
        speed = generated_seconds / summary.seconds_generating
        facts["Time"] = f"{summary.seconds_generating:.1f} s, {speed:.1f} times real time"
        block_seconds = [block.seconds for block in generated]
        facts["Time per block"] = (
            f"median {statistics.median(block_seconds) * 1e3:.0f} ms, "
            f"longest {max(block_seconds) * 1e3:.0f} ms"
        )
    return facts


def _time_rows(summary: RenderSummary, blocks: int) -> dict[str, tuple[str, ...]]:
    seconds_by_part = {**summary.seconds_graphs, "writing the video": summary.seconds_video}
    others = summary.seconds_generating - sum(seconds_by_part.values())
    seconds_by_part["everything else"] = max(0.0, others)
    return {
        name: (
            f"{seconds:.2f} s",
            f"{seconds / blocks * 1e3:.1f} ms",
            f"{seconds / summary.seconds_generating:.0%}",
        )
        for name, seconds in seconds_by_part.items()
    }


def _memory_rows(memory: dict[str, int], archive_bytes: int) -> dict[str, tuple[str]]:
    rows = {
        name.replace("_", " "): (format_memory(size),)
        for name, size in memory.items()
        if name != "archive_per_block"
    }
    return {**rows, "archive of this video": (format_memory(archive_bytes),)}


def _durations(
    generated: Sequence[BlockInfo], blocks: int, playing_seconds: float
) -> dict[str, Any] | None:
    """Draw the time per block as bars in a box of 100 by 20, each where its block is.

    Ticks and the label of real time are shares of the box, in percent: text in a box that is
    stretched to the page would be stretched with it.
    """
    if not generated:
        return None
    top = max(playing_seconds, *(block.seconds for block in generated)) * HEADROOM
    step = 100 / blocks
    bars = "".join(
        f"M{block.index * step:.3f} 20h{step * 0.8:.3f}v{-20 * block.seconds / top:.3f}"
        f"h{-step * 0.8:.3f}z"
        for block in generated
    )
    return {
        "bars": bars,
        "first_block": generated[0].index,
        "level": f"{100 * playing_seconds / top:.3f}",
        "playing_ms": f"{playing_seconds * 1e3:,.0f}",
        "times": {
            f"{tick:,.4g}": f"{tick / top / 10:.3f}" for tick in _ticks(top * 1e3, TIME_TICKS)
        },
        "numbers": {
            f"{tick:.0f}": f"{(tick + 0.4) * step:.3f}"
            for tick in _ticks(blocks - 1, BLOCK_TICKS, least=1)
        },
    }


def _ticks(end: float, most: int, least: float = 0) -> list[float]:
    """Return multiples of a round step from 0 to `end`: `most` steps or fewer, of `least` or more.

    Round is 1, 2 or 5 times a power of ten.
    """
    if end <= 0:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(end / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * most >= end)
    step = max(step, least)
    return [step * number for number in range(int(end / step) + 1)]
