"""The live video over a real socket: steered, watched, recorded, rendered once more."""

import asyncio
import io
import time
from contextlib import aclosing
from functools import partial

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from packforcing.app.server.show import Show
from packforcing.app.server.stage import Stage
from packforcing.errors import BackendError
from packforcing.prompts import read_schedule
from packforcing.runtime.video_files import open_video
from tests.helpers import PROMPT, TINY, frames_of
from tests.serving import call_route, serving, viewing

MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def server(tiny_bundle, tmp_path_factory):
    with serving(tiny_bundle, tmp_path_factory.mktemp("serve")) as server:
        yield server


@pytest.fixture
def call(server):
    """Return a function that calls a route: JSON in and out, and (status, error) of a refusal."""

    yield partial(call_route, server.url)
    if server.stage.show is not None:
        server.stage.show.stop()


@pytest.fixture
def viewer(server):
    with viewing(server.url, max_queue=None) as viewer:
        yield viewer


def begin(call, viewer, prompt=PROMPT, **fields):
    """Begin a video and wait for its first block; return its ID."""
    video = call("/v1/live", prompt=prompt, **fields)["video"]["id"]
    while viewer.header is None or viewer.header["id"] != video:
        viewer.receive("header")
    viewer.receive("block")
    return video


def form(**parts):
    """Return a multipart body and its type; bytes are files."""
    lines = []
    for name, value in parts.items():
        file = '; filename="start"' if isinstance(value, bytes) else ""
        value = value if isinstance(value, bytes) else str(value).encode()
        lines += [b"--edge", f'Content-Disposition: form-data; name="{name}"{file}'.encode()]
        lines += [b"", value]
    return {
        "body": b"\r\n".join([*lines, b"--edge--", b""]),
        "kind": "multipart/form-data; boundary=edge",
    }


def wait_for_job(call, job):
    end = time.monotonic() + 120
    while job["status"] in ("queued", "in_progress") and time.monotonic() < end:
        job = call(f"/v1/videos/{job['id']}", "GET")
    assert job["status"] == "completed", job
    return job


def test_live_frames_are_recorded_and_render_once_more_bit_for_bit(
    server, call, viewer, tmp_path, monkeypatch
):
    """With a start, another policy, three kinds of switches, and a recording of the middle."""
    live, add = [], Show.add
    monkeypatch.setattr(
        Show, "add", lambda show, block: (live.append(block.frames), add(show, block))
    )
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(picture := io.BytesIO(), "png")
    fields = {"prompt": PROMPT, "seed": 7, "policy": "sink-window", "start_fit": "fit"}
    begun = call("/v1/live", **form(**fields, input_reference=picture.getvalue()))
    assert (begun["video"]["seed"], begun["video"]["policy"]) == (7, "sink-window")
    changes = {
        1: {"prompt": "a blue circle over sand", "history": "recompute", "over": 2},
        4: {"prompt": "a white square", "history": "cut"},
        7: {"prompt": "a green star over gray dots"},
    }
    followed = {}
    while (index := viewer.receive("block")["index"]) < 9:
        if index in changes:
            followed[call("/v1/live/switch", **changes[index])["block"]] = changes[index]["prompt"]
        if index == 2:
            first = call("/v1/live/record")["video"]["recording"]["since_seconds"]
        if index == 6:
            recorded = call("/v1/live/record/stop")
    assert all(after > before for before, after in zip(changes, followed))
    assert call("/v1/live/stop")["video"]["state"] == "stopped"
    viewer.receive_state("stopped")
    schedule = viewer.state["video"]["schedule"]
    assert {s["block"]: s["prompt"] for s in schedule[1:]}.items() <= followed.items()
    (tmp_path / "live.toml").write_bytes(call("/v1/live/schedule", "GET"))
    assert [s.block for s in read_schedule(tmp_path / "live.toml")] == [
        s["block"] for s in schedule
    ]

    shown, live = viewer.frames, np.concatenate(live)
    assert [block["lost"] for block in viewer.blocks] == [0] * len(viewer.blocks)
    assert shown.shape == live.shape == (viewer.state["video"]["frames"], 64, 96, 3)

    job = wait_for_job(call, call("/v1/live/render"))
    limit = server.stage.show.video.request.archive_limit
    assert server.service.store.get(job["id"]).record.archive_limit == limit is not None
    (tmp_path / "again.mp4").write_bytes(call(f"/v1/videos/{job['id']}/content", "GET"))
    with open_video(tmp_path / "expected.mp4", 96, 64, TINY.fps) as video:
        video.write(live)
    np.testing.assert_array_equal(
        frames_of(tmp_path / "again.mp4"), frames_of(tmp_path / "expected.mp4")
    )

    (tmp_path / "recorded.mp4").write_bytes(call(f"/v1/videos/{recorded['id']}/content", "GET"))
    assert (recorded["status"], recorded["recorded"]) == ("completed", True)
    first_frame = round(first * TINY.fps)
    np.testing.assert_array_equal(
        frames_of(tmp_path / "recorded.mp4"), shown[first_frame : first_frame + recorded["frames"]]
    )
    again = call(f"/v1/videos/{recorded['id']}/remix")  # from the beginning of the live video
    assert wait_for_job(call, again)["frames"] == first_frame + recorded["frames"]
    names = sorted(path.suffix for path in server.service.store.folder.iterdir() if path.is_file())
    assert names.count(".mp4") == 3  # nothing is left of recordings in the making


def test_a_block_says_what_it_read(call, viewer):
    begin(call, viewer, seed=1)
    while viewer.receive("block")["index"] < 7:
        pass
    policy = TINY.policy
    for block in viewer.blocks:
        index = block["index"]
        assert block["full"] == [
            b for b in range(index) if b < policy.sink or b >= index - policy.recent
        ]
        assert all(policy.sink <= mid < index - policy.recent for mid in block["mid"])
        assert block["seconds"] > 0 and block["encode_seconds"] > 0 and block["switch"] is None
    assert [b["first_frame"] for b in viewer.blocks] == [0, *range(9, 9 + 12 * 6 + 1, 12)]
    state = call("/v1/live", "GET")
    latest = [{**b, "type": "block", "lost": 0} for b in state["blocks"][: len(viewer.blocks)]]
    assert latest == [{k: b[k] for k in b if k != "data"} for b in viewer.blocks]
    assert {row["where"] for row in state["memory"]} == {"host"}


def test_a_video_replaces_the_one_before_in_all_its_viewers(server, call, viewer):
    first = begin(call, viewer)
    second = call("/v1/live", prompt="a white square", seed=3)["video"]["id"]
    while viewer.header["id"] == first:
        viewer.receive("header")
    assert viewer.header["id"] == second != first
    assert viewer.state["video"]["id"] == second
    assert [viewer.receive("block")["index"] for _ in range(3)] == [0, 1, 2]


def test_a_stop_ends_the_stream_and_nothing_is_made_after_it(server, call, viewer):
    begin(call, viewer)
    call("/v1/live/stop")
    viewer.receive_state("stopped")
    assert next(server.stage.show.video, None) is None
    for action in ("stop", "pause", "proceed", "record", "record/stop"):
        status, message = call(f"/v1/live/{action}")
        assert status == 409, message
    assert call("/v1/live/switch", prompt=PROMPT)[0] == 409


def test_pauses_and_a_state_for_each(call, viewer):
    begin(call, viewer)
    for _ in range(20):
        assert call("/v1/live/pause")["video"]["state"] == "paused"
        assert call("/v1/live/proceed")["video"]["state"] == "running"
    call("/v1/live/pause")
    viewer.receive_state("paused")
    call("/v1/live/proceed")
    viewer.receive_state("running")
    viewer.receive("block")


@pytest.mark.parametrize(
    ("route", "fields", "status", "message"),
    [
        ("", {"prompt": "a red dragon"}, 400, "does not know 'dragon'"),
        ("", {"prompt": PROMPT, "policy": "best"}, 400, "policy must be one of packforcing, "),
        ("", {"prompt": PROMPT, "seed": -1}, 400, "seed must be from 0"),
        ("", {"prompt": PROMPT, "color": "red"}, 400, "unknown field 'color'"),
        ("", {"seed": 1}, 400, "prompt: Field required"),
        ("", {"prompt": PROMPT, "input_reference": "http://127.0.0.1/"}, 400, "nothing is fetched"),
        ("", form(prompt=PROMPT, input_reference=b"no picture"), 400, "cannot start from it"),
        ("/switch", {"prompt": "a red dragon"}, 400, "does not know 'dragon'"),
        ("/switch", {"prompt": PROMPT, "history": "cut", "over": 2}, 400, "a cut leaves nothing"),
        ("/switch", {"prompt": PROMPT, "over": 0}, 400, "over must be from 1"),
        ("/switch", {"prompt": PROMPT, "blocks": 1}, 400, "unknown field 'blocks'"),
        ("/render", {"seconds": -1}, 400, "seconds: "),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_the_video_alone(
    call, viewer, route, fields, status, message
):
    video = begin(call, viewer)
    answer, text = call(f"/v1/live{route}", **fields)
    assert answer == status and message in text and "\n" not in text, text
    assert call("/v1/live", "GET")["video"]["id"] == video
    viewer.receive("block")


def test_a_video_that_fails_says_why_and_the_next_one_is_made(server, call, viewer, monkeypatch):
    def fail(show, block):
        raise BackendError("the GPU is on fire:\nleave the room")

    with monkeypatch.context() as broken:
        broken.setattr(Show, "add", fail)
        call("/v1/live", prompt=PROMPT)
        viewer.receive_state("failed")
    assert viewer.state["video"]["error"] == "the GPU is on fire: leave the room"
    assert call("/v1/live/pause")[0] == 409
    begin(call, viewer)


def test_a_full_disk_ends_the_recording_and_not_the_video(
    server, call, viewer, monkeypatch, tmp_path
):
    begin(call, viewer)
    (tmp_path / "full").symlink_to("/dev/full")
    with monkeypatch.context() as full:
        full.setattr(server.service.store, "spare_path", lambda suffix: tmp_path / "full")
        call("/v1/live/record")
    while not (error := viewer.receive("state")["video"]["error"]):
        pass
    assert error.startswith("the recording has ended: cannot write a recording: No space left")
    assert viewer.state["video"]["recording"] is None
    assert call("/v1/live/record/stop") == (409, "nothing is being recorded")
    viewer.receive("block")
    assert call("/v1/live/record")["video"]["error"] is None


def test_players_read_the_stream_as_a_file(server, call, viewer):
    begin(call, viewer)
    with av.open(f"{server.url}/v1/live/video") as container:
        frames = [frame for frame, _ in zip(container.decode(video=0), range(30))]
    times = [frame.pts * frame.time_base * TINY.fps for frame in frames]
    assert times == [times[0] + n for n in range(30)]


def test_a_stalled_viewer_costs_no_memory_and_the_others_nothing(server, call, viewer):
    """300 MB pass it by."""
    begin(call, viewer)
    call("/v1/live/stop")
    viewer.receive_state("stopped")
    header, process = server.stage.show.header, psutil.Process()
    with viewing(server.url) as stalled:
        stalled.receive("header")
        before = process.memory_info().rss
        for number in range(300):
            server.stage.broadcast.publish(header, {"index": 1000 + number}, bytes(MEGABYTE))
            while (block := viewer.receive("block"))["index"] < 1000:
                pass
            assert (block["index"], block["lost"]) == (1000 + number, 0)
            viewer.blocks.clear()
        assert process.memory_info().rss - before < 60 * MEGABYTE
        while stalled.receive("block")["index"] < 1299:
            stalled.blocks = stalled.blocks[-1:]
        assert stalled.blocks[-1]["lost"] > 200


def test_a_viewer_who_takes_nothing_is_sent_away(server, call, viewer, monkeypatch):
    monkeypatch.setattr("packforcing.app.server.live.STALLED_SECONDS", 0.5)
    begin(call, viewer)
    call("/v1/live/stop")
    viewer.receive_state("stopped")
    broadcast, header = server.stage.broadcast, server.stage.show.header
    with viewing(server.url) as stalled:
        stalled.receive("header")
        assert broadcast.viewers == 2
        end = time.monotonic() + 60
        while broadcast.viewers == 2 and time.monotonic() < end:
            broadcast.publish(header, {"index": 1}, bytes(MEGABYTE))
            viewer.receive("block")
            viewer.blocks.clear()
        assert broadcast.viewers == 1


def test_a_video_that_nobody_watches_rests(server):
    """Until somebody comes, or it is recorded."""
    stage = Stage(server.service.session, server.service.store, unwatched_seconds=0, lead=None)

    async def watch(blocks):
        async with aclosing(stage.broadcast.follow()) as messages:
            async for message in messages:
                blocks -= message.kind == "block"
                if not blocks:
                    return

    stage.begin(PROMPT)
    wait_for_rest(stage)
    asyncio.run(asyncio.wait_for(watch(4), 60))
    wait_for_rest(stage)
    stage.record()
    blocks = stage.show.blocks
    while stage.show.blocks < blocks + 3:
        assert stage.show.live
    job = stage.finish_recording()
    assert job.frames >= 36 and job.frames % 12 == 0
    wait_for_rest(stage)
    stage.close()
    assert stage.show.state == "stopped"


def wait_for_rest(stage):
    end = time.monotonic() + 60
    while stage.show.state != "unwatched":
        assert time.monotonic() < end
