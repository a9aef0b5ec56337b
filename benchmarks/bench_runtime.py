"""Time per block: the runtime against the PyTorch reference, eager and compiled, side by side.

    python -m benchmarks.bench_runtime [--json FILE] [--only NAME]
    python -m benchmarks.bench_runtime --against CHECKOUT    # before and after, in one run

With --against, the runtime alone is timed, in alternation with that of another checkout, such as
`git worktree add ../before REVISION`; see `benchmarks/against.py`.

Otherwise all three generate the same video in turn, block by block, in one process on the same
cores; blocks before every partition is full are not counted. The middle size is a transformer of
dim 768 with 12 layers and 390 tokens a frame, random weights. `long` renders 120 s of demo video
and fits how time per block and resident memory grow. `checkpoints` renders as much and says which
part of the time went into what makes a render resumable; both are wall time of one run, so it holds
on a busy machine too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.against import time_against
from packforcing import Config, Policy, model_config
from packforcing.machine import cpu_cores
from packforcing.runtime import Session, demo_bundle, realtime
from packforcing.runtime.allocations import memory_by_purpose
from packforcing.runtime.blocks import BlockInfo
from packforcing.runtime.gpus import known_gpus
from packforcing.runtime.plan import CUDA_CONTEXT
from packforcing.words import encode_words

PROMPT = "a red star over navy stripes"
THREADS = cpu_cores()
MIDDLE = Config(
    name="middle", height=240, width=416, fps=16, dim=768, heads=12, layers=12, ffn_dim=3072,
    block_frames=2, text_encoder="words", text_len=8, text_dim=22,
    compressor_widths=(32, 64, 128, 256), vae_encoder_width=8, vae_decoder_widths=(16, 8, 8, 8),
    timesteps=(1000, 500), policy=Policy(sink=1, mid=2, recent=1),
)  # fmt: skip


def side_by_side(config: Config, weights: Path | None, bundle: Path, blocks: int) -> dict:
    """Median milliseconds per block of each, once every partition is full."""
    import torch

    from packforcing.model import Model, load_model, random_model
    from packforcing.reference import rollout
    from packforcing.sampler import draw_noise

    torch.set_num_threads(THREADS)
    model = load_model(config, weights) if weights else random_model(config)
    compiled = Model(
        config, torch.compile(model.transformer, dynamic=True),
        model.autoencoder, torch.compile(model.compressor),
    )  # fmt: skip
    text = torch.from_numpy(encode_words(PROMPT, config))

    def reference(model: Model) -> Iterator[object]:
        return rollout(model, text, blocks, lambda b, s: draw_noise(config, 0, b, s))

    with Session.open(bundle, threads=THREADS) as session:
        frames = blocks * config.block_pixel_frames - config.trimmed_frames
        inside: list[float] = []
        runs = {
            "runtime": session.stream(PROMPT, frames / config.fps),
            "eager": reference(model),
            "compiled": reference(compiled),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for block in range(blocks):
            for name, run in runs.items():
                graphs = sum(session.graph_seconds().values())
                began = time.perf_counter()
                next(run)
                if block >= config.policy.capacity + 2:
                    times[name].append(time.perf_counter() - began)
                    if name == "runtime":
                        graphs = sum(session.graph_seconds().values()) - graphs
                        inside.append(graphs / times[name][-1])
    median = {name: 1000 * statistics.median(values) for name, values in times.items()}
    return {
        "ms_per_block": {name: round(value, 2) for name, value in median.items()},
        "eager_over_runtime": round(median["eager"] / median["runtime"], 2),
        "compiled_over_runtime": round(median["compiled"] / median["runtime"], 2),
        "percent_outside_graphs": round(100 * (1 - statistics.median(inside)), 2),
    }


def demo() -> dict:
    """The shipped model and bundle."""
    weights = demo_bundle().parent / "model.safetensors"
    return side_by_side(model_config("demo"), weights, demo_bundle(), blocks=40)


def middle() -> dict:
    """dim 768, 12 layers, 390 tokens a frame, random weights."""
    from packforcing.export import export_bundle
    from packforcing.model import random_weights

    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        export_bundle(MIDDLE, random_weights(MIDDLE), bundle)
        return side_by_side(MIDDLE, None, bundle, blocks=9)


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


def imports() -> dict:
    """Seconds of `import packforcing.runtime` in a fresh interpreter, best of five."""
    script = (
        "import time; t = time.perf_counter(); import packforcing.runtime; "
        "print(time.perf_counter() - t)"
    )
    runs = [
        float(
            subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
        )
        for _ in range(5)
    ]
    return {"import_seconds": round(min(runs), 3)}


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


BENCHES = {
    "import": imports,
    "demo": demo,
    "long": long,
    "checkpoints": checkpoints,
    "middle": middle,
    "planner": planner,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=BENCHES, help="one benchmark instead of all")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="time another checkout too"
    )
    args = parser.parse_args()
    results = {}
    benches: dict[str, Callable[[], dict]] = BENCHES
    if args.against:
        benches = {"against": partial(time_against, args.against, THREADS)}
    for name, bench in benches.items():
        if args.against or args.only in (None, name):
            results[name] = bench()
            print(name, json.dumps(results[name], indent=1), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
