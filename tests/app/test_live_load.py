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
PHASE_SECONDS = min(15.0, SECONDS / 8)
VIEWERS, STALLED = 40, 10
KEEP_ALIVE_SECONDS = 3.0  # below the server's


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


async def run_phase(url, kind):
    """Run the clients of one phase; return the seconds of its blocks."""
    port = int(url.rpartition(":")[2])
    views = [[] for _ in range(VIEWERS)]
    if kind == "watched":
        paths = ["/v1/live/stream", "/v1/live/video"] * (STALLED // 2)
        works = [watch(port, view) for view in views] + [stall(port, path) for path in paths]
    else:
        works = [stay(port) for _ in range(VIEWERS + STALLED)]
    async with clients(works):
        await asyncio.sleep(PHASE_SECONDS / 10)  # until all of them are there
        first = (await asyncio.to_thread(call_route, url, "/v1/live", "GET"))["video"]["block"]
        await asyncio.sleep(PHASE_SECONDS)
        state = await asyncio.to_thread(call_route, url, "/v1/live", "GET")
    assert state["video"]["viewers"] == (VIEWERS + STALLED if kind == "watched" else 0)
    if kind == "watched":
        for view in views:
            indices = [index for index, _ in view]
            assert indices == [*range(indices[0], indices[0] + len(view))]
            assert indices[-1] >= state["video"]["block"] - 3 and view[-1][1] == 0
    return [block["seconds"] for block in state["blocks"] if block["index"] > first]


async def measure(url, process):
    """Alternate phases; return the medians of each four of them, and resident bytes after each."""
    medians, resident = {"watched": [], "idle": []}, []
    for _ in range(round(SECONDS / PHASE_SECONDS / 4)):
        seconds = {"watched": [], "idle": []}
        for kind in ("watched", "idle", "idle", "watched"):
            seconds[kind] += await run_phase(url, kind)
            resident.append(process.memory_info().rss)
        for kind in medians:
            medians[kind].append(statistics.median(seconds[kind]))
    return medians, resident


@pytest.mark.full
def test_fifty_viewers_cost_the_renderer_nothing(tmp_path):
    command = [sys.executable, "-m", "packforcing.app.cli", "serve", "--port", "0"]
    command += ["--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            url = server.stdout.readline().strip().rstrip("/")
            # a policy without an archive, which grows by 25 kB a block
            call_route(url, "/v1/live", prompt="a red star", seed=7, policy="sink-window")
            call_route(url, "/v1/live/record")  # without it, an unwatched video rests
            medians, resident = asyncio.run(measure(url, psutil.Process(server.pid)))
        finally:
            server.terminate()
    # load of other programs comes and goes: of each minute, its own ratio
    ratio = statistics.median(w / i for w, i in zip(medians["watched"], medians["idle"]))
    later = resident[len(resident) // 2 :]
    growth = statistics.mean(later[len(later) // 2 :]) - statistics.mean(later[: len(later) // 2])
    result = {
        "viewers": VIEWERS + STALLED,
        "stalled": STALLED,
        "minutes": SECONDS / 60,
        "ms_per_block_watched": statistics.median(medians["watched"]) * 1e3,
        "ms_per_block_idle": statistics.median(medians["idle"]) * 1e3,
        "ratio": ratio,
        "resident_mb": statistics.mean(later) / 1e6,
        "resident_mb_growth_in_second_half": growth / 1e6,
    }
    print(json.dumps(result, indent=1))
    assert ratio < 1.10
    assert abs(growth) < 4e6
