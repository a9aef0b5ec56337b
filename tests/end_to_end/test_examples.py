"""The programs in examples/ do what they say, run as a reader would run them."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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


def test_a_display_shows_every_frame_of_the_video(embed):
    shown = []
    with Session.open(demo_bundle(), threads=1) as session:
        embed.play(session, PROMPTS[0], 1.5, lambda frames, fps: shown.extend(frames))
        frames = np.concatenate(list(session.stream(PROMPTS[0], 1.5)))
    assert np.array_equal(shown, frames)


def test_closing_the_display_stops_the_render(embed):
    """Of a video that nobody would wait for."""
    with Session.open(demo_bundle(), threads=1) as session:
        embed.play(session, PROMPTS[0], 3600, lambda frames, fps: next(frames))
        with pytest.raises(PromptError, match="fox"):  # a mistake is the caller's, at once
            embed.play(session, "a fox", 1, lambda frames, fps: list(frames))


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


def test_a_batch_skips_what_is_done_and_renders_what_changed(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    batch = "batch_render.py", tmp_path / "prompts.txt", tmp_path / "videos", "--seconds", 0.5
    first = run(*batch)
    assert first.returncode == 0, first.stderr
    assert [line.split()[1] for line in first.stdout.splitlines()] == ["8", "8"]
    videos = sorted((tmp_path / "videos").iterdir())
    before = [video.stat().st_mtime_ns for video in videos]
    again = run(*batch)
    assert [line.split()[1] for line in again.stdout.splitlines()] == ["was", "was"]
    assert [video.stat().st_mtime_ns for video in videos] == before
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0]}\na fox")
    changed = run(*batch)
    assert changed.returncode == 1
    assert changed.stdout.splitlines()[1].split()[1] == "failed" and "fox" in changed.stdout


# Runs the program with Ctrl-C pressed after the first block of the second video.
INTERRUPTED = """
import runpy, signal, sys
from packforcing.runtime import Session

render = Session.render

def interrupted_render(self, *args, seed, **options):
    if seed == 1:
        options["on_block"] = lambda block: signal.raise_signal(signal.SIGINT)
    return render(self, *args, seed=seed, **options)

Session.render = interrupted_render
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_interrupted_batch_continues_to_the_same_videos(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    batch = tmp_path / "prompts.txt", tmp_path / "videos", "--seconds", "3"
    command = [sys.executable, "-c", INTERRUPTED, EXAMPLES / "batch_render.py", *batch]
    stopped = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert stopped.returncode == 1 and "the same command continues" in stopped.stderr
    (video,) = (tmp_path / "videos").glob("*.mp4")
    assert stopped.stdout.startswith(video.name)
    done = run("batch_render.py", *batch)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] == "was" for line in done.stdout.splitlines()] == [True, False]
    with Session.open(demo_bundle()) as session:
        for seed, video in enumerate(sorted((tmp_path / "videos").glob("*.mp4"))):
            session.render(PROMPTS[seed], 3, tmp_path / "whole.mp4", seed)
            assert video.read_bytes() == (tmp_path / "whole.mp4").read_bytes()
            (tmp_path / "whole.mp4").unlink()
