"""Time from a stop until the video has ended, in units of the longest call of a graph.

    python -m benchmarks.bench_stop --json stop.json

Stops live videos of the demo model at random moments, from another thread, as a viewer does.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

from packforcing.runtime import Session, Video, demo_bundle
from packforcing.runtime.backends import LoadedGraph
from packforcing.runtime.buffers import Arrays

PROMPT = "a red star over navy stripes"
BLOCKS = 4  # of a video before the one that it is stopped in, at most


def time_calls(graph: LoadedGraph, seconds: list[float]) -> None:
    """Have each call of a graph add its duration to a list."""
    bind = graph.bind

    def bind_timed(arrays: Arrays) -> Callable[[], None]:
        call = bind(arrays)

        def timed() -> None:
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)

        return timed

    graph.bind = bind_timed  # type: ignore[method-assign]


def time_stop(video: Video, moment: float) -> float:
    """Stop a video so many seconds after it began; return the seconds until it has ended."""
    ended = []

    def watch() -> None:
        for _ in video:
            pass
        ended.append(time.perf_counter())

    viewer = threading.Thread(target=watch)
    viewer.start()
    time.sleep(moment)
    began = time.perf_counter()
    video.stop()
    viewer.join()
    return ended[0] - began


def measure(stops: int, seed: int) -> dict[str, float]:
    """Stop so many videos; return milliseconds, and ratios to the longest call of a graph."""
    calls: list[float] = []
    with Session.open(demo_bundle()) as session:
        for graph in session.backend.graphs.values():
            time_calls(graph, calls)
        video = session.begin(PROMPT, seed, lead=None)
        block_seconds = [next(video).info.seconds for _ in range(BLOCKS)][-1]  # warms up as well
        video.close()
        moments = random.Random(seed)
        waits = [
            time_stop(
                session.begin(PROMPT, number, lead=None),
                moments.uniform(0, BLOCKS * block_seconds),
            )
            for number in range(stops)
        ]
    longest = max(calls)
    return {
        "stops": stops,
        "longest_call_ms": longest * 1e3,
        "block_ms": block_seconds * 1e3,
        "wait_ms_median": statistics.median(waits) * 1e3,
        "wait_ms_longest": max(waits) * 1e3,
        "ratio_median": statistics.median(waits) / longest,
        "ratio_longest": max(waits) / longest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stops", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    args = parser.parse_args()
    print(text := json.dumps(measure(args.stops, args.seed), indent=1))
    if args.json:
        args.json.write_text(text)


if __name__ == "__main__":
    main()
