"""Fifty viewers, ten of whom take nothing: the renderer does not notice, and memory stays.

PACKFORCING_LOAD_SECONDS sets how long; ten minutes by default.
"""

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
from contextlib import asynccontextmanager, suppress

import psutil
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.serving import call_route

SECONDS = float(os.environ.get("PACKFORCING_LOAD_SECONDS", "600"))
PHASE_SECONDS = min(20.0, SECONDS / 4)
VIEWERS, STALLED = 40, 10
KEEP_ALIVE_SECONDS = 3.0  # below the server's
MEGABYTE = 1 << 20


async def watch(port, blocks):
    """Watch the stream; take note of each block's index and of what was lost."""
    url = f"ws://127.0.0.1:{port}/v1/live/stream"
    with suppress(ConnectionClosed):
        async with connect(url, max_size=None, compression=None) as socket_:
            async for message in socket_:
                if isinstance(message, str) and message.startswith('{"type":"block"'):
                    block = json.loads(message)
                    blocks.append((block["index"], block["lost"]))


async def stall(port, path):
    """Ask for the stream and read none of it."""
    loop, connection = asyncio.get_running_loop(), socket.socket()
    connection.setblocking(False)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with connection:
        await loop.sock_connect(connection, ("127.0.0.1", port))
        lines = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{port}"]
        if path.endswith("stream"):
            lines += ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"]
            lines += ["Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="]
        await loop.sock_sendall(connection, "\r\n".join([*lines, "", ""]).encode())
        await asyncio.Event().wait()


async def stay(port):
    """Keep a connection alive and watch nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while True:
            writer.write(f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            await reader.readuntil(b"}")
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
    finally:
        writer.close()


@asynccontextmanager
async def clients(works):
    """Run clients until the block ends; one that fails fails the test."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield
        assert not [task.exception() for task in tasks if task.done()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def measure(url, process):
    """Alternate phases; return seconds per block by kind of phase, and resident bytes over time."""
    port, seconds = int(url.rstrip("/").rpartition(":")[2]), {"watched": [], "idle": []}
    resident, views = [], []
    order = ["watched", "idle", "idle", "watched"]
    for number in range(round(SECONDS / PHASE_SECONDS)):
        kind = order[number % 4]
        views = [[] for _ in range(VIEWERS)]
        works = [stay(port) for _ in range(VIEWERS + STALLED)]
        if kind == "watched":
            for work in works:
                work.close()
            paths = ["/v1/live/stream", "/v1/live/video"] * (STALLED // 2)
            works = [watch(port, blocks) for blocks in views] + [stall(port, p) for p in paths]
        async with clients(works):
            await asyncio.sleep(PHASE_SECONDS / 10)  # until all of them are there
            first = (await asyncio.to_thread(call_route, url, "/v1/live", "GET"))["video"]["block"]
            for _ in range(8):
                await asyncio.sleep(PHASE_SECONDS / 10)
                resident.append(process.memory_info().rss)
            state = await asyncio.to_thread(call_route, url, "/v1/live", "GET")
        assert state["video"]["viewers"] == (VIEWERS + STALLED if kind == "watched" else 0)
        blocks = [block["seconds"] for block in state["blocks"] if block["index"] >= first]
        assert len(blocks) > PHASE_SECONDS
        seconds[kind] += blocks
        if kind == "watched":
            for seen in views:
                indices = [index for index, _ in seen]
                assert indices == [*range(indices[0], indices[0] + len(seen))]
                assert indices[-1] >= state["blocks"][-1]["index"] - 2 and seen[-1][1] == 0
    return seconds, resident


@pytest.mark.full
def test_fifty_viewers_cost_the_renderer_nothing(tmp_path):
    command = [sys.executable, "-m", "packforcing.app.cli", "serve", "--port", "0"]
    command += ["--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            url = server.stdout.readline().strip()
            # a policy without an archive, which grows by 25 kB a block
            call_route(url, "/v1/live", prompt="a red star", seed=7, policy="sink-window")
            call_route(url, "/v1/live/record")  # without it, an unwatched video rests
            seconds, resident = asyncio.run(measure(url, psutil.Process(server.pid)))
        finally:
            server.terminate()
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    ratio = medians["watched"] / medians["idle"]
    half = len(resident) // 2
    growth = statistics.median(resident[-half // 2 :]) - statistics.median(
        resident[half : -half // 2]
    )
    print(
        f"\n{len(seconds['watched'])} blocks with {VIEWERS} viewers and {STALLED} stalled ones: "
        f"{medians['watched'] * 1e3:.1f} ms; {len(seconds['idle'])} with idle clients: "
        f"{medians['idle'] * 1e3:.1f} ms; ratio {ratio:.3f}. Resident memory "
        f"{statistics.median(resident[half:]) / MEGABYTE:.1f} MiB, in the last quarter "
        f"{growth / MEGABYTE:+.1f} MiB"
    )
    assert ratio < 1.10
    assert growth < 4 * MEGABYTE
