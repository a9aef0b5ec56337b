"""Run the nodes on ComfyUI's own server, on the CPU, and compare what comes out with `render`.

    python prove_on_server.py PATH/TO/ComfyUI

Needs a checkout of ComfyUI, and the Python that has its requirements and `packforcing[cpu]`. The
server gets folders of its own and a free port. With --picture FILE, the example workflow runs in
the page, in Chromium (`pip install playwright`), which is photographed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import aiohttp
import av
import numpy as np
from PIL import Image

from packforcing.prompts import Switch
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime.start_clip import read_start

HERE = Path(__file__).resolve().parent
SCHEDULE = [
    Switch(0, "a red star over navy stripes"),
    Switch(1, "a blue circle over sand dots", "recompute", 2),
]
SECONDS, SEED = 3.0, 7
START_SECONDS = 600.0  # that the server may take to start


class Server:
    """A ComfyUI server's HTTP API and websocket."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http, self._url = http, url

    async def listen(self) -> None:
        self._socket = await self._http.ws_connect(f"{self._url}/ws?clientId=proof")

    async def get(self, path: str, **query: str) -> bytes:
        async with self._http.get(f"{self._url}/{path}", params=query) as answer:
            answer.raise_for_status()
            return await answer.read()

    async def post(self, path: str, value: Any) -> tuple[int, Any]:
        async with self._http.post(f"{self._url}/{path}", json=value) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if text else None

    async def queue(self, workflow: dict[str, Any]) -> str:
        status, answer = await self.post("prompt", {"prompt": workflow, "client_id": "proof"})
        check(status == 200, f"the workflow is accepted: {answer}")
        return answer["prompt_id"]

    async def events(self, prompt_id: str) -> Any:
        """Yield kind and data of each message about a workflow until it has ended."""
        async for message in self._socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                yield "preview", message.data[8:]  # after the kinds of message and picture
                continue
            event = json.loads(message.data)
            if event["data"].get("prompt_id") == prompt_id:
                yield event["type"], event["data"]
                if event["type"] in (
                    "execution_success", "execution_error", "execution_interrupted",
                ):  # fmt: skip
                    return

    async def run(self, workflow: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
        """Queue a workflow; return its entry in the history, and all events."""
        prompt_id = await self.queue(workflow)
        events = [event async for event in self.events(prompt_id)]
        return await self.history(prompt_id), events

    async def history(self, prompt_id: str) -> dict[str, Any]:
        while True:  # it is written right after the last event
            entries = json.loads(await self.get(f"history/{prompt_id}"))
            if prompt_id in entries:
                return entries[prompt_id]
            await asyncio.sleep(0.05)


def check(condition: bool, fact: str) -> None:
    if not condition:
        sys.exit(f"NOT SO: {fact}")


def report(fact: str) -> None:
    print(f"ok: {fact}", flush=True)


def workflow(render: str, bundle: str = "demo", seconds: float = SECONDS, **more: Any) -> dict:
    """Return a workflow in the API's form: nodes 1 to 3 are the bundle and two prompts, 4 renders.

    Nodes 5 and 6 save the frames and the video.
    """

    def prompt(switch: Switch, **before: Any) -> dict[str, Any]:
        history = switch.history or "as published"
        values = {"prompt": switch.prompt, "time": switch.time, "history": history}
        return {"class_type": "PackForcingPrompt",
                "inputs": {**values, "over": switch.over, **before}}  # fmt: skip

    opened = {"bundle": bundle, "backend": "onnxruntime", "device": 0}
    video = {"bundle": ["1", 0], "prompts": ["3", 0], "seconds": seconds, "seed": SEED, **more}
    nodes = {
        "1": {"class_type": "PackForcingBundle", "inputs": opened},
        "2": prompt(SCHEDULE[0]),
        "3": prompt(SCHEDULE[1], before=["2", 0]),
        "4": {"class_type": render, "inputs": video},
    }
    if render == "PackForcingRender":
        images = {"images": ["4", 0], "filename_prefix": "frame"}
        movie = {"video": ["4", 1], "filename_prefix": "movie", "format": "auto", "codec": "auto"}
        nodes["5"] = {"class_type": "SaveImage", "inputs": images}
        nodes["6"] = {"class_type": "SaveVideo", "inputs": movie}
    return nodes


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


async def saved_frames(server: Server, entry: dict[str, Any]) -> np.ndarray:
    """Return what SaveImage wrote, as the server hands it out."""
    pictures = [await server.get("view", **image) for image in entry["outputs"]["5"]["images"]]
    return np.stack([np.asarray(Image.open(io.BytesIO(picture))) for picture in pictures])


async def prove_frames(server: Server, base: Path, session: Session) -> None:
    expected = np.concatenate(list(session.stream(SCHEDULE, SECONDS, SEED)))
    entry, events = await server.run(workflow("PackForcingRender"))
    check(entry["status"]["status_str"] == "success", f"it succeeds: {entry['status']}")
    frames = await saved_frames(server, entry)
    check(np.array_equal(frames, expected), "frames are those of render")
    report(f"{len(frames)} PNG files of SaveImage have the frames of render, bit for bit")

    (movie,) = entry["outputs"]["6"]["images"]
    shown = frames_of(base / "output" / movie["subfolder"] / movie["filename"])
    distance = np.abs(shown.astype(float) - expected).mean()
    check(shown.shape == expected.shape and distance < 4, f"the video shows them: {distance}")
    report(f"SaveVideo's H.264 differs from them by {distance:.2f} of 255 on average")

    config = session.config
    blocks, steps = config.blocks(config.frames(SECONDS)), len(config.timesteps)
    total = blocks * steps
    values = [d["value"] for kind, d in events if kind == "progress" and d["max"] == total]
    previews = [data for kind, data in events if kind == "preview"]
    ends = set(range(steps, total + 1, steps))  # of blocks; between them ComfyUI may leave some out
    check(values == sorted(values) and ends <= set(values), f"the steps rise to the end: {values}")
    check(len(previews) == blocks, f"a preview per block: {len(previews)} of {blocks}")
    last = np.asarray(Image.open(io.BytesIO(previews[-1]))).astype(float)
    distance = np.abs(last - expected[-1]).mean()
    check(distance < 6, f"the last preview shows the last frame: {distance}")
    report(f"{len(values)} updates of progress and {blocks} previews came over the websocket")


async def prove_start(server: Server, base: Path, session: Session) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (150, 260, 3), np.uint8)
    path = base / "input" / "start.png"
    Image.fromarray(pixels).save(path)
    config = session.config
    start = read_start(path, config.width, config.height, config.fps, 1)
    nodes = workflow("PackForcingRender", start=["7", 0])
    nodes["7"] = {"class_type": "LoadImage", "inputs": {"image": path.name}}
    entry, _ = await server.run(nodes)
    expected = np.concatenate(list(session.stream(SCHEDULE, SECONDS, SEED, start=start)))
    check(np.array_equal(await saved_frames(server, entry), expected), "it begins with the start")
    report("a start of LoadImage, 260x150, gives the frames of render --start")


async def prove_file(server: Server, base: Path, session: Session) -> None:
    """Interrupt a render to a file after three blocks, and queue it again."""
    nodes = workflow("PackForcingRenderToFile", filename_prefix="video/proof")
    prompt_id, previews, waited = await server.queue(nodes), 0, 0.0
    async for kind, _ in server.events(prompt_id):
        previews += kind == "preview"
        if kind == "preview" and previews == 3:
            waited = time.monotonic()
            await server.post("interrupt", {})
    waited = time.monotonic() - waited
    check(kind == "execution_interrupted", f"it ends by the interrupt, not by {kind}")
    (folder,) = (base / "output" / "video").iterdir()
    check(folder.suffix == ".render", f"{folder} is unfinished")
    report(f"an interrupted render to a file ended after {waited:.2f} s")

    entry, events = await server.run(nodes)
    first = next(d["value"] for kind, d in events if kind == "progress" and d["max"] > 1)
    (saved,) = entry["outputs"]["4"]["images"]
    file = base / "output" / saved["subfolder"] / saved["filename"]
    session.render(SCHEDULE, SECONDS, base / "render.mp4", SEED)
    check(file.read_bytes() == (base / "render.mp4").read_bytes(), f"{file} is render's")
    steps = len(session.config.timesteps)
    check(first == steps, f"block 0 came from the interrupted run: {first}")
    report("queued again it went on, and the .mp4 is that of an undisturbed render, byte for byte")


async def prove_interrupt(server: Server, session: Session) -> None:
    """Interrupt a render of ten minutes within a step, and render again."""
    prompt_id = await server.queue(workflow("PackForcingRender", seconds=600.0))
    began, first, last = 0.0, 0, 0
    async for kind, data in server.events(prompt_id):
        if kind == "progress" and data["max"] > 1:
            last = data["value"]
            if last > 10 and not began:
                began, first = time.monotonic(), last
                await server.post("interrupt", {})
    waited = time.monotonic() - began
    check(kind == "execution_interrupted", f"it ends by the interrupt, not by {kind}")
    check(last <= first + 2, f"at most two steps were under way: {first}, {last}")
    report(f"an interrupt after step {first} ended it after step {last}, in {waited:.2f} s")
    entry, _ = await server.run(workflow("PackForcingRender", seconds=1.5))
    expected = np.concatenate(list(session.stream(SCHEDULE, 1.5, SEED)))
    check(np.array_equal(await saved_frames(server, entry), expected), "the next video is right")
    report("the next video is right")


async def prove_messages(server: Server) -> None:
    nodes = workflow("PackForcingRender", "gone")
    status, answer = await server.post("prompt", {"prompt": nodes, "client_id": "proof"})
    (error,) = answer["node_errors"]["1"]["errors"]
    check(status == 400, f"a bundle that is not listed is refused: {answer}")
    report(f"node 1: {error['message']}: {error['details']}")
    for bundle in ("damaged", "torn"):
        entry, events = await server.run(workflow("PackForcingRender", bundle))
        kind, data = events[-1]
        message = data["exception_message"].strip()
        check(kind == "execution_error" and "\n" not in message, f"one line: {message}")
        check(data["exception_type"] == "packforcing.errors.BundleError", f"its type: {data}")
        record = dict(entry["status"]["messages"])["execution_error"]
        check(record["exception_message"].strip() == message, f"the history has it: {record}")
        report(f"node {data['node_id']}: {message}")


async def prove_plan(server: Server) -> None:
    values = {"bundle": "demo", "target": "sm89", "seconds": 60.0}
    entry, _ = await server.run({"1": {"class_type": "PackForcingPlan", "inputs": values}})
    (text,) = entry["outputs"]["1"]["text"]
    command = [sys.executable, "-m", "packforcing.app.cli", "plan", "--bundle", demo_bundle()]
    shown = subprocess.run([*command, "--target", "sm89"], capture_output=True, text=True)
    check(text.strip() == shown.stdout.strip(), f"the plan is that of the command: {text}")
    report(f"the plan has the {len(text.splitlines())} lines of `packforcing plan`")


def make_folders(base: Path) -> None:
    """Make the server's folders, with this pack of nodes and two bundles that are wrong."""
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "packforcing").symlink_to(HERE)
    (base / "input").mkdir()
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"Comfy.TutorialCompleted": true, "Comfy.Minimap.Visible": false}')
    for name, damaged in (("damaged", "manifest.json"), ("torn", "denoiser.onnx")):
        folder = base / "models" / "packforcing" / name
        shutil.copytree(demo_bundle(), folder)
        with (folder / damaged).open("r+b") as file:
            file.truncate(file.seek(0, os.SEEK_END) - 100)


@contextlib.contextmanager
def running(comfyui: Path, base: Path) -> Iterator[str]:
    """Run the server; yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--base-directory", str(base), "--disable-api-nodes"]
    log = (base / "server.log").open("wb")
    process = subprocess.Popen(command, cwd=comfyui, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in itertools.takewhile(lambda _: process.poll() is None, range(int(START_SECONDS))):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(1)
        else:
            sys.exit(f"ComfyUI did not start:\n{(base / 'server.log').read_text()}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


async def prove(url: str, base: Path) -> None:
    with Session.open(demo_bundle()) as session:
        async with aiohttp.ClientSession() as http:
            server = Server(http, url)
            await server.listen()
            await prove_frames(server, base, session)
            await prove_start(server, base, session)
            await prove_file(server, base, session)
            await prove_interrupt(server, session)
            await prove_messages(server)
            await prove_plan(server)


def photograph(url: str, picture: Path) -> None:
    """Load the example workflow into the page, run it, and save what the page shows."""
    from playwright.sync_api import sync_playwright

    (path,) = (HERE / "example_workflows").glob("*.json")
    with sync_playwright() as playwright:
        system = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=system, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 1020})
        page.set_default_timeout(300_000)
        page.goto(url)
        page.wait_for_function("window.app?.graph !== undefined")
        page.wait_for_load_state("networkidle")
        page.evaluate(
            "workflow => app.loadGraphData(workflow, true, true, 'two prompts')",
            json.loads(path.read_text()),
        )
        page.evaluate("() => { app.queuePrompt(0) }")
        while not json.loads(urlopen(f"{url}/history").read()):  # one entry when all is done
            page.wait_for_timeout(500)
        page.wait_for_timeout(5000)  # the page loads what was saved
        page.screenshot(path=picture, type="jpeg", quality=85)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path, help="a checkout of ComfyUI")
    parser.add_argument("--picture", type=Path, metavar="FILE.jpg", help="only photograph the page")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder).resolve()
        make_folders(base)
        with running(args.comfyui, base) as url:
            if args.picture:
                photograph(url, args.picture)
            else:
                asyncio.run(prove(url, base))


if __name__ == "__main__":
    main()
