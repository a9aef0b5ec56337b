"""Time what a viewer of the live video waits for, and what encoding and sending take.

    python -m benchmarks.bench_stream --json stream.json

Runs `packforcing serve` on the demo bundle and is its viewers, on the same machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

PROMPTS = "a red star over navy stripes", "a blue circle over sand dots"
ROUNDS = 20
BLOCKS = 100  # over which shares are taken
VIEWERS = 10

Messages = Iterator[dict[str, Any]]


@contextmanager
def serving() -> Iterator[tuple[str, psutil.Process]]:
    """Run a server; yield its address and its process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "packforcing.app.cli", "serve", "--port", "0"]
        command += ["--out", folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            try:
                yield process.stdout.readline().strip().rstrip("/"), psutil.Process(process.pid)
            finally:
                process.terminate()


def post(url: str, route: str, **fields: object) -> Any:
    headers = {"content-type": "application/json"}
    body = msgspec.json.encode(fields) if fields else None
    request = urllib.request.Request(f"{url}/v1/live{route}", body, headers, method="POST")
    with urllib.request.urlopen(request) as response:
        return json.loads(response.read())


@contextmanager
def watching(url: str) -> Iterator[Messages]:
    address = url.replace("http", "ws") + "/v1/live/stream"
    with connect(address, max_size=None, max_queue=None, compression=None) as viewer:
        yield read_messages(viewer)


def read_messages(viewer: ClientConnection) -> Messages:
    """Yield messages, each when all of it has arrived."""
    with suppress(ConnectionClosed):
        while True:
            message = json.loads(viewer.recv())
            if message["type"] != "state":
                viewer.recv()
            yield message


def next_block(messages: Messages, first: int = 0) -> dict[str, Any]:
    """Return the next block whose index is `first` at least."""
    return next(m for m in messages if m["type"] == "block" and m["index"] >= first)


def time_beginnings(url: str, messages: Messages) -> list[float]:
    """Measure seconds from a click on begin until the first block has arrived."""
    seconds = []
    for seed in range(ROUNDS):
        began = time.perf_counter()
        video = post(url, "", prompt=PROMPTS[0], seed=seed)["video"]["id"]
        next(m for m in messages if m["type"] == "header" and m["id"] == video)
        next_block(messages)
        seconds.append(time.perf_counter() - began)
        post(url, "/stop")
        next(m for m in messages if m["type"] == "state" and m["video"]["state"] == "stopped")
    return seconds


def time_switches(url: str, messages: Messages) -> list[float]:
    """Measure seconds from a click on switch until the first block that follows has arrived."""
    seconds, bundle = [], post(url, "", prompt=PROMPTS[0], seed=7)["bundle"]
    block_seconds = bundle["block_frames"] / bundle["fps"]
    for number in range(ROUNDS):
        next_block(messages)
        time.sleep(number / ROUNDS * block_seconds)  # clicks come at any time within a block
        began = time.perf_counter()
        first = post(url, "/switch", prompt=PROMPTS[(number + 1) % 2])["block"]
        next_block(messages, first)
        seconds.append(time.perf_counter() - began)
    return seconds


def measure_shares(url: str, server: psutil.Process, messages: Messages) -> dict[str, float]:
    """Measure medians of making and encoding a block, and the CPU time of sending it, in ms."""

    def sending_seconds() -> float:  # the event loop is the main thread; it does little else
        times = next(thread for thread in server.threads() if thread.id == server.pid)
        return times.user_time + times.system_time

    def watch_on(viewer: Messages) -> None:
        for _ in viewer:
            pass

    result = {}
    for viewers in (1, VIEWERS):
        with ExitStack() as stack:
            for _ in range(viewers - 1):
                more = stack.enter_context(watching(url))
                threading.Thread(target=watch_on, args=(more,), daemon=True).start()
            next_block(messages)
            before = sending_seconds()
            blocks = [next_block(messages) for _ in range(BLOCKS)]
            result[f"send_ms_{viewers}"] = (sending_seconds() - before) / BLOCKS * 1e3
    result["block_ms"] = statistics.median(block["seconds"] for block in blocks) * 1e3
    result["encode_ms"] = statistics.median(block["encode_seconds"] for block in blocks) * 1e3
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    target = parser.parse_args().json
    with serving() as (url, server), watching(url) as messages:
        begin, switch = time_beginnings(url, messages), time_switches(url, messages)
        result = {
            "first_frame_ms": statistics.median(begin) * 1e3,
            "first_frame_ms_longest": max(begin) * 1e3,
            "switch_ms": statistics.median(switch) * 1e3,
            "switch_ms_longest": max(switch) * 1e3,
            **measure_shares(url, server, messages),
        }
    print(text := json.dumps(result, indent=1))
    if target:
        target.write_text(text)


if __name__ == "__main__":
    main()
