"""`render --watch`: the page of a render that is running, which it neither changes nor delays."""

import queue
import subprocess
import sys
import threading

import pytest
from websockets.exceptions import InvalidStatus

from packforcing.app.server.watch import watching
from packforcing.runtime import Session
from packforcing.runtime.render import render_video
from tests.helpers import PROMPT, assert_one_line, run_without
from tests.serving import call_route, viewing


def test_a_watched_render_is_paused_watched_to_its_end_and_the_same(tiny_bundle, tmp_path):
    urls = queue.SimpleQueue[str]()

    def render_watched():
        with watching(session, video, urls.put) as show_frames:
            render_video(session, video, tmp_path / "watched.mp4", on_frames=show_frames)

    with Session.open(tiny_bundle, threads=1) as session:
        session.render(PROMPT, 12, tmp_path / "alone.mp4")
        video = session.begin(PROMPT, seconds=12, lead=None)
        video.pause()
        work = threading.Thread(target=render_watched)
        work.start()
        url = urls.get(timeout=60)
        with viewing(url) as viewer:
            state = call_route(url, "/v1/live/pause")
            assert (state["steerable"], state["video"]["state"]) == (False, "paused")
            assert state["video"]["blocks_total"] == 9
            assert call_route(url, "/v1/live", prompt=PROMPT)[0] == 405
            with pytest.raises(InvalidStatus), viewing(url, origin="http://elsewhere.example"):
                pass
            assert call_route(url, "/v1/live/proceed")["video"]["state"] == "running"
            viewer.receive_state("ended")
        work.join()
    assert viewer.blocks[-1]["index"] > 0 == viewer.blocks[-1]["lost"]
    assert (tmp_path / "watched.mp4").read_bytes() == (tmp_path / "alone.mp4").read_bytes()


def test_a_stop_on_the_page_is_an_interrupt_and_the_render_resumes(tiny_bundle, tmp_path):
    command = [sys.executable, "-m", "packforcing.app.cli", "render", PROMPT, "--watch"]
    command += ["--bundle", tiny_bundle, "--seconds", "36000", "--out", tmp_path / "video.mp4"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        url = process.stderr.readline().split()[-1]
        with viewing(url) as viewer:
            viewer.receive("block")
            call_route(url, "/v1/live/stop")
            viewer.receive_state("stopped")
        line = process.stderr.read()
    assert process.returncode == 130
    assert "resume it with the same command and --resume" in line and "Traceback" not in line


def test_without_its_packages_a_line_says_so(tiny_bundle, tmp_path):
    arguments = "render", PROMPT, "--watch", "--bundle", tiny_bundle, "--out", tmp_path / "v.mp4"
    result = run_without("fastapi", *arguments)
    message = r"--watch needs fastapi, which is not installed: pip install .*\[serve\]"
    assert_one_line(result.returncode, result.stdout, result.stderr, message)
