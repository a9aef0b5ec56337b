"""The page in Chromium, on a server of the demo model: what is seen and done there."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from packforcing.evaluation.demo_judge import read_scene

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
av = pytest.importorskip("av")
pytest.importorskip("fastapi", reason="needs the extra serve")

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which plays H.264")
PATIENCE_SECONDS = 90  # of a busy machine; what is waited for comes within seconds
DESKTOP, PHONE = (1280, 800), (360, 740)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """The address of `packforcing serve`."""
    folder = tmp_path_factory.mktemp("served")
    command = [sys.executable, "-m", "packforcing.app.cli", "serve", "--port", "0", "--out", folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield process.stdout.readline().strip()
        process.send_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@contextmanager
def open_page(browser, server: str, size=DESKTOP, *, refusals: int = 0, on_socket=None) -> Iterator:
    """Open the page, and check that it logs no error and that all it loads is the server's.

    Args:
        refusals: Requests that the server refuses, which Chromium logs.
        on_socket: Called with the page's WebSocket before it connects, and with the server's.
    """
    errors: list[str] = []
    addresses: list[str] = []
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    page = context.new_page()
    page.set_default_timeout(PATIENCE_SECONDS * 1000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: addresses.append(request.url))
    if on_socket:
        page.route_web_socket(
            re.compile("/v1/live/stream"),
            lambda socket: on_socket(socket, socket.connect_to_server()),
        )
    page.goto(server)
    yield page
    context.close()
    assert sum("status of 4" in error for error in errors) == refusals == len(errors), errors
    assert all(url.startswith((server, f"blob:{server}", "data:")) for url in addresses), addresses


def wait(page, condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, page.inner_text("main")
        page.wait_for_timeout(50)


def picture(page) -> np.ndarray:
    """The pixels that the live video shows, uint8 [H, W, 3]; black before it has any."""
    url = page.evaluate("""() => {
        const video = document.getElementById("picture"), canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [video.videoWidth || 1, video.videoHeight || 1];
        canvas.getContext("2d").drawImage(video, 0, 0);
        return canvas.toDataURL();
    }""")
    return pixels(url)


def pixels(url: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode a data URL to RGB; what is transparent is black."""
    data = base64.b64decode(url.partition(",")[2])
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return np.asarray(image.convert("RGB").resize(size or image.size))


def block_in(page, readout: str) -> int:
    """The block that a chart's line below it is about."""
    return int(page.inner_text(readout).split()[1].rstrip(":"))


def begin(page, prompt: str) -> None:
    """Begin a video, whatever is live, and wait for its first picture."""
    page.fill("#prompt", prompt)
    page.press("#prompt", "Control+Enter")
    color = prompt.split()[1]
    wait(page, lambda: picture(page).any() and read_scene(picture(page)).color == color)


def video_frames(path: Path) -> np.ndarray:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def save_first_video(page, path: Path) -> np.ndarray:
    """Download the newest video with a click, and return its frames."""
    with page.expect_download() as download:
        page.locator("#cards .card >> nth=0 >> text=Download").click()
    download.value.save_as(path)
    return video_frames(path)


def made_videos(page) -> int:
    return page.locator("#cards .card").count()


def render_schedule(page) -> None:
    """Render the live video's schedule with a click, and wait until it is made."""
    before = made_videos(page)
    page.click("#schedule-render")
    wait(page, lambda: made_videos(page) == before + 1)


def test_the_picture_is_shown_and_follows_a_switch(browser, server):
    with open_page(browser, server) as page:
        page.wait_for_selector("[data-state=empty]")
        begin(page, "a red star over navy stripes")
        assert picture(page).shape == (128, 128, 3)
        wait(page, lambda: read_scene(picture(page)).shape == "star")
        page.click(".chip:text-is('green')")
        page.click(".chip:text-is('circle')")
        assert page.input_value("#prompt") == "a green circle over navy stripes"
        page.click("text=Recompute")
        page.fill("#over", "2")
        page.press("#prompt", "Enter")
        scene = lambda: read_scene(picture(page))  # noqa: E731
        wait(
            page,
            lambda: (scene().color, scene().shape, scene().ground) == ("green", "circle", "navy"),
        )
        sink = "document.querySelector('#made-from .sink canvas').toDataURL()"
        assert read_scene(pixels(page.evaluate(sink), (128, 128))).color == "red"  # as it was made
        rows = page.locator("#switches li").all_inner_texts()
        assert len(rows) == 2 and "recompute, over 2 blocks" in rows[1]
        assert page.inner_text("#speed-figure").endswith("real time")
        assert " reads sink 0; " in page.inner_text("#reads-readout")
        page.locator("#reads-chart").press("ArrowLeft")  # looks at the block before the latest
        wait(page, lambda: block_in(page, "#reads-readout") < block_in(page, "#speed-readout"))
        for state in "paused", "running":
            page.locator("#reads-chart").press(" ")
            page.wait_for_selector(f"[data-state={state}]")


def test_a_recording_is_downloaded_and_its_schedule_renders_the_same_frames(
    browser, server, tmp_path
):
    with open_page(browser, server) as page:
        begin(page, "a blue square over sand dots")
        page.click("#record")
        wait(page, lambda: re.search(r"0:0[1-9]", page.inner_text("#badge")))
        live = page.evaluate("fetch('v1/live').then((answer) => answer.json())")
        since = round(live["video"]["recording"]["since_seconds"] * live["bundle"]["fps"])
        page.click("#record")
        wait(page, lambda: "recorded live" in page.inner_text("#cards .card >> nth=0"))
        recorded = save_first_video(page, tmp_path / "recorded.mp4")
        page.click("#stop")
        page.wait_for_selector("[data-state=stopped]")
        render_schedule(page)
        rendered = save_first_video(page, tmp_path / "rendered.mp4")
        assert len(recorded) >= 16 and len(rendered) >= since + len(recorded)
        again = rendered[since : since + len(recorded)]
        assert np.abs(again.astype(int) - recorded).mean() < 4  # two encoders' rounding
        page.click("#cards .thumbnail >> nth=0")
        player = "document.getElementById('player-video').currentTime"
        wait(page, lambda: page.evaluate(player) > 0)
        page.keyboard.press("Escape")
        before = made_videos(page)
        page.click("#cards .card >> nth=0 >> text=Delete")
        wait(page, lambda: made_videos(page) == before - 1)


def test_a_dropped_picture_begins_the_video(browser, server, tmp_path):
    halves = np.zeros((96, 96, 3), np.uint8)
    halves[:, 48:] = 250
    Image.fromarray(halves).save(data := io.BytesIO(), "PNG")
    with open_page(browser, server) as page:
        transfer = page.evaluate_handle(
            """(text) => {
                const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
                const transfer = new DataTransfer();
                transfer.items.add(new File([bytes], "halves.png", { type: "image/png" }));
                return transfer;
            }""",
            base64.b64encode(data.getvalue()).decode(),
        )
        page.dispatch_event("#theater", "drop", {"dataTransfer": transfer})
        page.wait_for_selector("#start-preview img")
        page.fill("#seed", "7")
        begin(page, "a red star over navy stripes")
        page.click("#stop")
        page.wait_for_selector("[data-state=stopped]")
        assert "7" in page.inner_text("#facts")
        render_schedule(page)
        first = save_first_video(page, tmp_path / "started.mp4")[0]
        assert first[:, :48].mean() < 90 < 165 < first[:, 80:].mean()


def test_nothing_is_wider_than_a_phone(browser, server):
    with open_page(browser, server, PHONE) as page:
        begin(page, "a white circle over teal checks")
        long = "a white circle over teal checks " + "white" * 30
        page.fill("#prompt", long)
        wide = page.evaluate("""() => [...document.querySelectorAll("body *")].filter(
            (part) => part.getBoundingClientRect().right > innerWidth + 1
              && getComputedStyle(part).clipPath === "none" && part.id !== "glow").map(
            (part) => part.outerHTML.slice(0, 80))""")
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0] and not wide
        assert (
            page.locator("#go").evaluate("(part) => part.getBoundingClientRect().bottom")
            <= PHONE[1]
        )


def test_an_error_is_said_where_the_action_was(browser, server):
    with open_page(browser, server, refusals=2) as page:
        begin(page, "a red star over navy stripes")
        page.fill("#prompt", "a red unicorn")
        page.press("#prompt", "Enter")
        page.wait_for_selector("#prompt-line:has-text('unicorn')")
        page.fill("#seconds", "1000000000")
        page.click("#render")
        page.wait_for_selector("#fresh-line[data-kind=error]")
        assert picture(page).any()  # what is live goes on
        page.click("#stop")


def test_a_lost_connection_is_told_and_made_again(browser, server):
    sockets = []
    on_socket = lambda socket, upstream: sockets.append(socket)  # noqa: E731
    with open_page(browser, server, on_socket=on_socket) as page:
        begin(page, "a yellow triangle over gray plain")
        sockets[0].close()
        page.wait_for_selector("text=Connection lost")
        page.wait_for_selector("body:not(.offline)")
        assert len(sockets) > 1
        wait(page, lambda: read_scene(picture(page)).color == "yellow")
        page.click("#stop")


def test_the_picture_goes_on_after_lost_fragments(browser, server):
    """A viewer who is too slow is not sent all."""
    messages = []

    def lose_some(socket, upstream):
        def send(message):
            if isinstance(message, str):
                messages.append(json.loads(message))
            if messages[-1].get("index") not in (4, 5):
                socket.send(message)

        upstream.on_message(send)

    with open_page(browser, server, on_socket=lose_some) as page:
        begin(page, "a purple square over forest dots")
        wait(page, lambda: messages[-1].get("index", 0) >= 6)
        resumed = next(block["first_frame"] for block in messages if block.get("index") == 6)
        shown = "document.getElementById('picture').currentTime"
        wait(page, lambda: page.evaluate(shown) > resumed / 16)
        assert page.evaluate("document.getElementById('picture').buffered.length") == 2
        assert not page.inner_text("#stage-line")  # it did not fall behind
        page.click("#stop")


def changing(change: Callable[[str], str]) -> Callable[..., None]:
    """Change what the server says."""
    return lambda socket, upstream: upstream.on_message(
        lambda message: socket.send(change(message) if isinstance(message, str) else message)
    )


def test_a_render_that_is_watched_cannot_be_steered(browser, server):
    watched = changing(lambda text: re.sub(r'("steerable": ?)true', r"\1false", text))
    with open_page(browser, server, on_socket=watched) as page:
        page.wait_for_selector("body.watching")
        for part in ("#steer", "#jobs", "#record", "#schedule-render"):
            assert not page.is_visible(part), part
        assert page.is_visible("#pause") and page.is_visible("#stop")


def test_a_browser_without_the_codec_says_so(browser, server):
    unknown = changing(lambda text: text.replace("avc1.", "none."))
    with open_page(browser, server, on_socket=unknown) as page:
        page.fill("#prompt", "a red star over navy stripes")
        page.press("#prompt", "Enter")
        page.wait_for_selector("text=This browser cannot play the stream")
        assert "v1/live/video" in page.inner_text("#notice-text")
        page.click("#stop")
