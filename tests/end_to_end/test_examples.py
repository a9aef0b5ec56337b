"""The programs in examples/ do what they say, run as a reader would run them."""

import asyncio
import importlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from packforcing.errors import PromptError
from packforcing.runtime import Session, demo_bundle

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPTS = ("a red star over navy stripes", "a green circle over gray dots")


def run(name, *args, **extra):
    command = [sys.executable, EXAMPLES / name, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **extra)


@pytest.fixture
def embed(monkeypatch):
    pytest.importorskip("tkinter")
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("embed_in_a_window")


def test_a_display_shows_every_frame_and_switches_the_prompt(embed):
    """Typed while block 2 is shown; what was made renders again from the record."""
    shown, videos = [], []

    def display(frames, video, fps):
        videos.append(video)
        for number, frame in enumerate(frames):
            shown.append(frame)
            if number == 20:
                video.switch(PROMPTS[1], over=2)

    with Session.open(demo_bundle(), threads=1) as session:
        embed.play(session, PROMPTS[0], 4, display)
        (video,) = videos
        assert [switch.prompt for switch in video.schedule] == list(PROMPTS)
        frames = np.concatenate(list(session.stream(video.schedule, 4)))
    assert np.array_equal(shown, frames)


def test_closing_the_display_stops_the_render(embed):
    """Of a video that has no end."""
    with Session.open(demo_bundle(), threads=1) as session:
        embed.play(session, PROMPTS[0], None, lambda frames, video, fps: next(frames))
        with pytest.raises(PromptError, match="fox"):  # a mistake is the caller's, at once
            embed.play(session, "a fox", 1, lambda frames, video, fps: list(frames))


def test_a_service_sends_frames_until_the_viewer_leaves(monkeypatch):
    """Real connections: JPEG after JPEG to one, the reason to one with a word nobody knows."""
    monkeypatch.syspath_prepend(EXAMPLES)
    service = importlib.import_module("serve_frames")
    left = asyncio.Event()

    async def watch(session):
        async def serve(reader, writer):
            await service.serve_viewer(session, reader, writer)
            left.set()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            address = server.sockets[0].getsockname()[:2]

            async def get(query):
                reader, writer = await asyncio.open_connection(*address)
                writer.write(f"GET /?prompt={query} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
                return reader, writer

            reader, writer = await get("a+green+circle+over+gray+dots")
            head = await reader.readuntil(b"\r\n\r\n")
            parts = [await reader.readuntil(b"\r\n--frame") for _ in range(6)]
            writer.close()
            await asyncio.wait_for(left.wait(), 60)
            left.clear()
            reader, writer = await get("a+fox")
            refused = await reader.read()
            writer.close()
            return head, parts, refused

    with Session.open(demo_bundle(), threads=1) as session:
        head, parts, refused = asyncio.run(watch(session))
        first = next(session.stream(PROMPTS[1], 2))
    assert head.startswith(b"HTTP/1.0 200") and b"multipart/x-mixed-replace" in head
    for part, frame in zip(parts, first):
        jpeg = part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n--frame")
        error = np.asarray(Image.open(io.BytesIO(jpeg))).astype(float) - frame
        assert np.sqrt(np.square(error).mean()) < 8
    assert refused.startswith(b"HTTP/1.0 400") and b"fox" in refused


def test_the_window_opens_and_closes_on_a_real_screen():
    if shutil.which("Xvfb") is None:
        pytest.skip("Xvfb is not installed")
    pytest.importorskip("tkinter")
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", "1", "-screen", "0", "640x640x24"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        display = {**os.environ, "DISPLAY": f":{server.stdout.readline().strip()}"}
        done = run("embed_in_a_window.py", PROMPTS[0], "--seconds", 0.5, env=display)
    finally:
        server.terminate()
        server.wait()
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_screen_the_program_says_so():
    pytest.importorskip("tkinter")
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    done = run("embed_in_a_window.py", PROMPTS[0], "--seconds", 0.5, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith("no window: ") and "packforcing render" in done.stderr
