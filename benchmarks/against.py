"""Time the runtime of two checkouts in alternation, so that a busy machine slows both.

    python -m benchmarks.against CHECKOUT    # such as of `git worktree add ../before REVISION`

A worker per checkout renders the same demo video with that checkout's code and bundle. The workers
make a block in turn, and every second round the other one begins.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from packforcing.machine import cpu_cores

HERE = Path(__file__).parents[1]
BLOCKS, WARM, IMPORTS = 80, 12, 7  # blocks of a video, those not counted, imports
IMPORT = (
    "import time; began = time.perf_counter(); import packforcing.runtime; "
    "print(time.perf_counter() - began)"
)
WORKER = """
import sys, time
from packforcing.runtime import Session, demo_bundle
blocks, threads = map(int, sys.argv[1:])
with Session.open(demo_bundle(), threads=threads) as session:
    config = session.config
    seconds = (blocks * config.block_pixel_frames - config.trimmed_frames) / config.fps
    stream = session.stream("a red star over navy stripes", seconds)
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        next(stream)
        print(time.perf_counter() - began, flush=True)
"""


def time_against(other: Path, threads: int, blocks: int = BLOCKS) -> dict[str, dict[str, float]]:
    """Time blocks of demo video and the import of the runtime in this and another checkout.

    Args:
        other: Folder of the other checkout.
        threads: Threads of each session; one of the two works at a time.
        blocks: Blocks of the video.

    Returns:
        Median milliseconds per block and least seconds of the import: "this", "other" and the
        "ratio" of this to the other, below 1 where this checkout is faster.
    """
    checkouts = {"this": HERE, "other": other.resolve()}
    environments = {
        name: {**os.environ, "PYTHONPATH": str(path)} for name, path in checkouts.items()
    }
    times: dict[str, list[float]] = {name: [] for name in checkouts}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", WORKER, str(blocks), str(threads)],
                    cwd=checkouts[name], env=environments[name],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                )
            )
            for name in checkouts
        }  # fmt: skip
        for worker in workers.values():
            _answer(worker)
        for block in range(blocks):
            for name in sorted(workers, reverse=block % 2 == 0):
                worker = workers[name]
                assert worker.stdin is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
                seconds = float(_answer(worker))
                if block >= min(WARM, blocks // 2):
                    times[name].append(seconds)
    imports: dict[str, list[float]] = {name: [] for name in checkouts}
    for _ in range(IMPORTS):
        for name in checkouts:
            command = [sys.executable, "-c", IMPORT]
            done = subprocess.run(command, cwd=checkouts[name], env=environments[name],
                                  stdout=subprocess.PIPE, check=True)  # fmt: skip
            imports[name].append(float(done.stdout))
    return {
        "ms_per_block": _ratio({n: 1e3 * statistics.median(part) for n, part in times.items()}),
        "import_seconds": _ratio({name: min(part) for name, part in imports.items()}),
    }


def _answer(worker: subprocess.Popen[str]) -> str:
    """The next line of a worker."""
    assert worker.stdout is not None
    line = worker.stdout.readline().strip()
    if not line:
        raise RuntimeError(f"a worker ended early: its arguments were {worker.args}")
    return line


def _ratio(values: dict[str, float]) -> dict[str, float]:
    return {
        **{name: round(value, 6) for name, value in values.items()},
        "ratio": round(values["this"] / values["other"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="folder of the other checkout")
    print(json.dumps(time_against(parser.parse_args().checkout, cpu_cores()), indent=1))


if __name__ == "__main__":
    main()
