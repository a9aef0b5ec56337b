"""What long videos cost beyond their blocks, and how long the planner takes.

    python -m benchmarks.bench_runtime [--json FILE] [--only NAME]

`long` renders 120 s of demo video and fits how time per block and resident memory grow.
`checkpoints` renders as much and says which part of the time went into what makes a render
resumable; both are wall time of one run, so it holds on a busy machine too. `packforcing bench`
times blocks and calls, `benchmarks.peers` other libraries beside the runtime.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np

from packforcing import model_config
from packforcing.runtime import Session, demo_bundle, realtime
from packforcing.runtime.allocations import memory_by_purpose
from packforcing.runtime.blocks import BlockInfo
from packforcing.runtime.gpus import known_gpus
from packforcing.runtime.plan import CUDA_CONTEXT

PROMPT = "a red star over navy stripes"


def long() -> dict:
    """120 s of demo video rendered to h264; growth over 600 s, once every partition is full."""
    times: list[float] = []
    resident: list[int] = []
    with tempfile.TemporaryDirectory() as folder, Session.open(demo_bundle()) as session:
        summary = session.render(PROMPT, 120, Path(folder) / "long.mp4")
        for _ in session.stream(PROMPT, 600, on_block=lambda info: times.append(info.seconds)):
            resident.append(_resident_bytes())
        full = session.config.policy.capacity + 10
        archive = memory_by_purpose(session.config)["archive_per_block"]
    typical = statistics.median(times[full:])
    return {
        "render_seconds_of_120": round(summary.seconds_total, 1),
        "times_real_time": round(120 / summary.seconds_total, 2),
        "percent_slower_per_100_blocks": round(100 * 100 * _slope(times[full:]) / typical, 2),
        "resident_mb_per_100_blocks": round(100 * _slope(resident[full:]) / 1e6, 3),
        "of_which_archive_mb": round(100 * archive / 1e6, 3),
    }


def endless(seconds: float, video: Path) -> dict:
    """Demo video of this length rendered to h264, with its checkpoints: what grows after its first
    ten minutes, or its first half, and what its last minute looks like. (Every segment has a new
    encoder, whose memory settles at some 7 MB within a dozen of them.)"""
    from packforcing.evaluation.compare import end_values
    from packforcing.evaluation.measures import evaluate_video

    with Session.open(demo_bundle()) as session:
        config = session.config
        blocks = config.blocks(config.frames(seconds))
        times, resident, starts = np.zeros((3, blocks))  # taken now, so that they do not grow later
        times += 1

        def note(info: BlockInfo) -> None:
            times[info.index], resident[info.index] = info.seconds, _resident_bytes()
            starts[info.index] = session.rollout.cache.layout().start  # of the next block

        summary = session.render(PROMPT, seconds, video, on_block=note)
        archive = memory_by_purpose(config)["archive_per_block"]
    ten_minutes = config.blocks(config.frames(600))
    settled = min(ten_minutes, blocks // 2)
    tenth = max(1, (blocks - settled) // 10)
    early, late = (statistics.median(part) for part in (times[settled:][:tenth], times[-tenth:]))
    grown = _slope(resident[settled:]) - archive
    return {
        "frames": summary.frames,
        "blocks": blocks,
        "archive_mb": round(summary.archive_bytes / 1e6, 2),
        "resident_mb_beyond_archive_per_10_minutes": round(ten_minutes * grown / 1e6, 3),
        "resident_mb_beyond_archive_in_all": round((blocks - settled) * grown / 1e6, 3),
        "largest_packed_position": float(starts.max()),
        "ms_per_block_early": round(1000 * early, 2),
        "ms_per_block_late": round(1000 * late, 2),
        "times_real_time": round(seconds / summary.seconds_total, 2),
        "last_minute": end_values(evaluate_video(video, PROMPT).segments, 60),
    }


def checkpoints() -> dict:
    """120 s of demo video: time in checkpoints, latents, flushing to disk and joining segments."""
    from packforcing.runtime import resume, video_files

    spent: dict[str, float] = {}

    def timed(owner: object, name: str) -> object:
        inner = getattr(owner, name)

        def call(*args: object) -> object:
            began, within = time.perf_counter(), sum(spent.values())
            try:
                return inner(*args)
            finally:  # what is timed inside counts once
                inside = sum(spent.values()) - within
                spent[name] = spent.get(name, 0) + time.perf_counter() - began - inside

        return mock.patch.object(owner, name, call)

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        session = stack.enter_context(Session.open(demo_bundle()))
        for name in ("add_latents", "save", "write", "check", "segments", "remove"):
            stack.enter_context(timed(resume.RenderFolder, name))
        for name in ("join_segments", "flush", "flush_folder"):
            stack.enter_context(timed(video_files, name))
        summary = session.render(PROMPT, 120, folder / "long.mp4")
        every = resume.snapshot_interval(session.config, resume.SNAPSHOT_SECONDS)
    return {
        "checkpoints": (summary.blocks - 1) // every,
        "percent_of_render_time": round(100 * sum(spent.values()) / summary.seconds_total, 2),
        "seconds": {name: round(seconds, 3) for name, seconds in spent.items()},
        "seconds_total": round(summary.seconds_total, 1),
    }


def _slope(values: list[float] | list[int]) -> float:
    """Growth per block by Theil and Sen: the median over pairs, deaf to a busy moment."""
    array, half = np.asarray(values, float), len(values) // 2
    return float(np.median((array[half : 2 * half] - array[:half]) / half))


def planner() -> dict:
    """CPU seconds in which `plan --fps` lists its candidates and chooses, for one GPU, for all."""
    gpus, config = known_gpus(), model_config("wan-1.3b")

    def choose(names: list[str]) -> float:
        start = time.process_time()
        options = realtime.candidates(config)
        for name in names:
            gpu = gpus[name]
            realtime.first_candidate(options, gpu, config.fps, gpu.memory_bytes - CUDA_CONTEXT)
        return time.process_time() - start

    first = choose(["RTX 4090"])  # nothing is cached yet
    return {
        "candidates": len(realtime.candidates(config)),
        "one_gpu_seconds": round(first, 3),
        "all_gpus_seconds_more": round(choose(list(gpus)), 3),
    }


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


BENCHES: dict[str, Callable[[], dict]] = {
    "long": long,
    "checkpoints": checkpoints,
    "planner": planner,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=BENCHES, help="one benchmark instead of all")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    results = {}
    for name, bench in BENCHES.items():
        if args.only in (None, name):
            results[name] = bench()
            print(name, json.dumps(results[name], indent=1), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
