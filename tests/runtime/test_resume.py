"""A render goes on after whatever ended it, and gives the frames it would have given.

The truth is the stream of a session that nothing happened to: lossless outputs are compared with
it, H.264 with the file of an uninterrupted render.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import shutil
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest

from packforcing import Policy
from packforcing.errors import (
    BackendError,
    ConfigError,
    OutputError,
    RenderStopped,
    ResumeError,
)
from packforcing.files import partial_path
from packforcing.prompts import Switch
from packforcing.runtime import Session, render_record
from packforcing.runtime import resume as resume_module
from packforcing.runtime.allocations import archive_bytes
from packforcing.runtime.bundle import write_manifest
from packforcing.runtime.device import view
from packforcing.runtime.plan import make_plan
from packforcing.runtime.resume import checkpoint_bytes
from tests.helpers import DAMAGES, PROMPT, frames_of, link, render, stop_after
from tests.helpers import RENDER_SECONDS as SECONDS
from tests.helpers import RENDER_SEED as SEED


@pytest.mark.parametrize(
    ("target", "stops"),
    [("a.mkv", (1,)), ("a.mkv", (3, 4, 10)), ("a.mp4", (2, 7)), ("frames/", (5,))],
)
def test_a_resumed_render_equals_an_uninterrupted_one(session, truth, tmp_path, target, stops):
    path = tmp_path / target
    for _ in stops:
        with pytest.raises(RenderStopped, match=r"after \d+ of 11 blocks; .*\.render: resume it"):
            render(
                session, f"{tmp_path}/{target}", resume=True, on_block=stop_after(session, *stops)
            )
        assert not path.exists()
        stops = stops[1:]
    render(session, f"{tmp_path}/{target}", resume=True)
    assert [left.name for left in tmp_path.iterdir()] == [path.name]
    if target == "a.mp4":
        render(session, tmp_path / "b.mp4")
        assert path.read_bytes() == (tmp_path / "b.mp4").read_bytes()
        assert len(frames_of(path)) == len(truth)
    else:
        np.testing.assert_array_equal(frames_of(path), truth)


SCENES = [
    Switch(0, PROMPT),
    Switch(4, "a blue square over sand checks", "recompute"),
    Switch(8, "a white circle", "cut"),
    Switch(12, "a green circle", "keep"),
]
POLICIES = {
    "packforcing": None,
    "no recent": Policy(sink=1, mid=4, recent=0, selection="random"),
    "absolute": Policy(sink=2, mid=2, recent=1, positions="absolute", selection="recency"),
    "sliding window": Policy(sink=0, mid=0, recent=3),
    "full history": Policy(sink=0, mid=0, recent=1000),
    "late sink": Policy(sink=5, mid=2, recent=2),
    "last step": Policy(sink=1, mid=2, recent=2, commit="last-step"),
    "first step": Policy(sink=1, mid=2, recent=2, selection="first-step"),
    "restarts": Policy(sink=1, mid=2, recent=1, restart=3),
    "restarts every block": Policy(sink=0, mid=0, recent=1, restart=2, positions="absolute"),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_every_policy_and_prompt_schedule_resumes(tiny_bundle, tmp_path, policy):
    """Stopped after every block in turn."""
    with Session.open(tiny_bundle, policy=policy) as session:
        truth = np.concatenate(list(session.stream(SCENES, SECONDS, SEED)))
        summary = None
        for block in range(1, 30):
            stop = stop_after(session, block)
            try:
                summary = render(
                    session, tmp_path / "a.mkv", prompt=SCENES, resume=True, on_block=stop
                )
            except RenderStopped:
                continue
            break
    np.testing.assert_array_equal(frames_of(tmp_path / "a.mkv"), truth)
    assert block == summary.blocks == 11
    assert [info.block for info in summary.prompts] == [0, 3, 6, 9]


@pytest.fixture(scope="module")
def stopped(plain, tmp_path_factory) -> Path:
    """A folder with a.mkv.render of a render stopped after block 7, one after a resume."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(RenderStopped):
        render(plain, folder / "a.mkv", on_block=stop_after(plain, 7))
    return folder


def test_a_clock_that_is_set_changes_nothing(plain, tmp_path, monkeypatch):
    """Back and forth by decades, during a render and before it goes on, when its files are from
    the future or long ago."""
    render(plain, tmp_path / "wanted.mp4")
    moments, infos = random.Random(0), []
    stop = stop_after(plain, 7)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: moments.uniform(0, 4e9))
        patch.setattr(time, "time_ns", lambda: moments.randrange(4 * 10**18))
        with pytest.raises(RenderStopped):
            render(plain, tmp_path / "a.mp4", on_block=lambda i: (infos.append(i), stop(i)))
        for path in (tmp_path / "a.mp4.render").iterdir():
            os.utime(path, (moments.uniform(0, 4e9),) * 2)
        summary = render(plain, tmp_path / "a.mp4", resume=True, on_block=infos.append)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "wanted.mp4").read_bytes()
    assert all(0 < info.seconds < 1e6 for info in infos) and 0 < summary.seconds_total < 1e6
    assert summary.frames_resumed == 69


def test_a_folder_that_cannot_give_way_is_refused_at_once(plain, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", tmp_path / "link"):
        with pytest.raises(OutputError, match="name a new folder in it"):
            render(plain, name)
    assert {left.name for left in tmp_path.iterdir()} == {"here", "link"}


@pytest.mark.parametrize("cases", [25, pytest.param(500, marks=pytest.mark.full)])
def test_a_damaged_snapshot_is_refused_or_gives_the_right_video(
    plain, truth, stopped, tmp_path, cases
):
    """Latents after the checkpoint are made again if theirs are damaged; nothing else can be."""
    rng, refused = random.Random(1), 0
    for case in range(cases):
        folder = tmp_path / str(case)
        shutil.copytree(stopped, folder)
        files = sorted(p for p in (folder / "a.mkv.render").iterdir() if p.name != "lock")
        path = files[case % len(files)]
        other = rng.choice([file for file in files if file != path])
        rng.choice(DAMAGES)(path, other, rng)
        try:
            render(plain, folder / "a.mkv", resume=True)
        except ResumeError as error:
            refused += 1
            assert str(folder) in str(error) and not (folder / "a.mkv").exists()
        else:
            assert path.name == "latents-000006.bin" or not path.exists()
            np.testing.assert_array_equal(frames_of(folder / "a.mkv"), truth)
        shutil.rmtree(folder)
    assert refused > cases / 2


def test_a_render_of_another_request_is_not_resumed(plain, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    before = sorted(path.name for path in (tmp_path / "a.mkv.render").iterdir())
    with pytest.raises(OutputError, match=r"unfinished render.*resume it"):
        render(plain, tmp_path / "a.mkv")
    for change, field in (
        ({"seed": 6}, "seed was 5, now 6"),
        ({"prompt": "a white circle"}, "prompts was"),
        ({"seconds": 14}, "frames was 120, now 112"),
        ({"checkpoint_seconds": 6}, "interval was 2, now 4"),
    ):
        with pytest.raises(ResumeError, match=f"has another request: .*{field}"):
            render(plain, tmp_path / "a.mkv", resume=True, **change)
    assert sorted(path.name for path in (tmp_path / "a.mkv.render").iterdir()) == before


@pytest.mark.parametrize("seconds", [math.inf, math.nan, 0, -1])
def test_an_impossible_snapshot_interval_is_refused(plain, tmp_path, seconds):
    with pytest.raises(ConfigError, match="checkpoint_seconds must be above 0"):
        render(plain, tmp_path / "a.mkv", checkpoint_seconds=seconds)
    assert not any(tmp_path.iterdir())


def test_a_render_of_another_release_is_not_resumed(plain, stopped, tmp_path, monkeypatch):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(render_record, "VERSION", 4)
    with pytest.raises(ResumeError, match="has version 3, this release reads 4"):
        render(plain, tmp_path / "a.mkv", resume=True)


def test_of_two_renders_into_one_file_the_second_is_refused(tiny_bundle, plain, tmp_path):
    refusals = []

    def second(info):
        with (
            Session.open(tiny_bundle) as other,
            pytest.raises(OutputError, match="is being rendered by another") as caught,
        ):
            render(other, tmp_path / "a.mkv", resume=True)
        refusals.append(caught)

    render(plain, tmp_path / "a.mkv", seconds=1, on_block=second)
    assert refusals and [path.name for path in tmp_path.iterdir()] == ["a.mkv"]


def test_a_bundle_replaced_during_a_render_changes_nothing_but_cannot_resume_it(
    tiny_bundle, truth, tmp_path
):
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))

    def replace(info):
        if info.index == 4 and not (tmp_path / "old").exists():
            bundle.rename(tmp_path / "old")
            shutil.copytree(tmp_path / "old", bundle)
            write_manifest(bundle, msgspec.structs.replace(session.manifest, tools={}))

    with Session.open(bundle) as session:
        render(session, tmp_path / "a.mkv", on_block=replace)
        with pytest.raises(RenderStopped):
            render(session, tmp_path / "b.mkv", on_block=stop_after(session, 3))
    np.testing.assert_array_equal(frames_of(tmp_path / "a.mkv"), truth)
    with (
        Session.open(bundle) as session,
        pytest.raises(ResumeError, match="another request: bundle was"),
    ):
        render(session, tmp_path / "b.mkv", resume=True)


@pytest.mark.skipif(sys.platform == "win32", reason="has no file size limit to hit")
@pytest.mark.parametrize("limit", [9_000, 30_000, 60_000])
def test_a_full_disk_keeps_what_is_done(plain, truth, tmp_path, limit):
    """File size limits stand in for a full disk: the same path, another errno."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*too large.*\.render: resume it"):
            render(plain, tmp_path / "a.mkv")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    render(plain, tmp_path / "a.mkv", resume=True)
    np.testing.assert_array_equal(frames_of(tmp_path / "a.mkv"), truth)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mkv"]


def test_a_disk_that_fills_up_is_noticed_before_it_is_full(plain, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)

    def fill(info):
        if info.index == 3:
            left = usage._replace(free=2000)
            monkeypatch.setattr(shutil, "disk_usage", lambda path: left)

    with pytest.raises(OutputError, match=r"needs 1\.\d MB and .* left: finished blocks are in"):
        render(plain, tmp_path / "a.mkv", on_block=fill)
    monkeypatch.undo()
    assert render(plain, tmp_path / "a.mkv", resume=True).frames_resumed == 21


def test_a_snapshot_takes_the_memory_that_the_plan_states(plain, tmp_path, monkeypatch):
    """The first one, which holds the sink as well, and a later one, which takes no more."""
    save, peaks = resume_module.RenderFolder.save, []

    def measured(folder, rollout):
        tracemalloc.start()
        save(folder, rollout)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    monkeypatch.setattr(resume_module.RenderFolder, "save", measured)
    render(plain, tmp_path / "a.mkv")
    stated = make_plan(plain.config, "sm89").host["checkpoint"]
    hashing = 1 << 18  # a part of a file, and little for names
    assert 0.65 * stated < max(peaks) - hashing < stated


@pytest.mark.parametrize(
    ("tensor", "call", "message"),
    [
        ("flow", 20, "block 3, step 4 of 4: the graph 'denoiser'"),
        ("q_pool", 21, "block 3, its commit: the graph 'denoiser'"),
        ("k_pool", 22, "block 3, its mid pass: the graph 'denoiser'"),
        ("frames", 9, "block 3, its pixels: the graph 'vae_decoder'"),
        ("v_new.1", 21, "block 3: its keys, values or decoder state"),
    ],
)
def test_nan_stops_the_render_and_its_graph_is_named(
    tiny_bundle, truth, tmp_path, tensor, call, message
):
    """Block 0 has 4 steps and a commit, later ones a mid pass besides; the first of two calls
    that could have made it is named, and the render goes on once the cause is gone."""
    with Session.open(tiny_bundle) as session:
        name = "vae_decoder" if tensor == "frames" else "denoiser"
        graph, calls = session.backend.graphs[name], []
        bind = graph.bind

        def bind_poisoned(arrays):
            run = bind(arrays)

            def poisoned():
                run()
                calls.append(tensor)
                if len(calls) - 1 == call:
                    view(arrays[tensor]).flat[0] = np.nan

            return poisoned

        graph.bind = bind_poisoned
        with pytest.raises(BackendError, match=message):
            render(session, tmp_path / "a.mkv")
        assert not (tmp_path / "a.mkv").exists()
    with Session.open(tiny_bundle) as session:
        assert render(session, tmp_path / "a.mkv", resume=True).frames_resumed == 21
    np.testing.assert_array_equal(frames_of(tmp_path / "a.mkv"), truth)


def test_an_archive_beyond_memory_lies_in_a_file(plain, truth, tmp_path, monkeypatch):
    monkeypatch.setattr("packforcing.runtime.archive.IN_MEMORY", 1000)
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.exists() else 0
    for _ in range(2):
        np.testing.assert_array_equal(
            np.concatenate(list(plain.stream(PROMPT, SECONDS, SEED))), truth
        )
        with pytest.raises(RenderStopped):
            render(plain, tmp_path / "a.mkv", on_block=stop_after(plain, 7))
        assert isinstance(plain.rollout.archive.key_values, np.memmap)
        render(plain, tmp_path / "a.mkv", resume=True)
        np.testing.assert_array_equal(frames_of(tmp_path / "a.mkv"), truth)
    if descriptors.exists():
        assert len(list(descriptors.iterdir())) <= before + 1  # the one that is mapped
    monkeypatch.setattr(
        os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(OutputError, match=r"the archive of this video takes .* refuses \(full\)"):
        next(plain.stream(PROMPT, SECONDS, SEED))


@pytest.mark.parametrize(
    "change", [{"oldest": -5}, {"oldest": 7}, {"block": -2}, {"scene": 7}, {"mids": [1, 1]}]
)
def test_contradictory_counters_are_refused(plain, stopped, tmp_path, change):
    """Even if its hash is right."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "a.mkv.render" / "checkpoint.json"
    body = msgspec.json.decode(path.read_bytes())["checkpoint"]
    body = msgspec.json.encode({**body, **change})
    sealed = {"sha256": hashlib.sha256(body).hexdigest(), "checkpoint": msgspec.Raw(body)}
    path.write_bytes(msgspec.json.encode(sealed))
    with pytest.raises(ResumeError, match=r"checkpoint\.json is damaged"):
        render(plain, tmp_path / "a.mkv", resume=True)


def test_a_resumed_render_says_what_it_generated_itself(plain, tmp_path):
    """Stopped one block after a snapshot: that block is decoded again, and not generated."""
    blocks = []
    with pytest.raises(RenderStopped):
        render(plain, tmp_path / "a.mkv", on_block=stop_after(plain, 5))
    summary = render(plain, tmp_path / "a.mkv", resume=True, on_block=blocks.append)
    assert [info.index for info in blocks if info.recovered] == [4]
    assert [info.index for info in blocks if not info.recovered] == [5, 6, 7, 8, 9, 10]
    per_block = plain.config.block_pixel_frames
    assert summary.frames_resumed == 4 * per_block - plain.config.trimmed_frames
    assert summary.frames_recovered == per_block
    assert summary.frames_generated == summary.frames - 5 * per_block + plain.config.trimmed_frames
    block_seconds = sum(info.seconds for info in blocks if not info.recovered)
    assert block_seconds < summary.seconds_generating < summary.seconds_total - blocks[0].seconds
    assert sum(summary.seconds_graphs.values()) < block_seconds


def test_files_of_others_stay(plain, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    (tmp_path / "a.mkv.render" / "notes.txt").touch()
    render(plain, tmp_path / "a.mkv", resume=True)
    assert [path.name for path in (tmp_path / "a.mkv.render").iterdir()] == ["notes.txt"]


def test_a_full_archive_takes_no_more_of_the_disk(plain, tmp_path):
    """After each of 15 snapshots, the blocks that the archive then had are there and no others."""
    limit, folder, snapshots = 6, tmp_path / "a.mkv.render", []
    row = archive_bytes(plain.config, plain.config.policy.sink + 1)

    def look(info):
        if info.index and info.index % 2 == 0:  # a snapshot was taken right before this block
            files = {path.name: path.stat().st_size for path in folder.iterdir()}
            files = {name: size for name, size in files.items() if name[:2] in ("ar", "bl")}
            expected = {f"block-{block:06}.safetensors" for block in plain.rollout.archive.rows}
            assert len(files.keys() - expected) <= 1  # this block may have evicted one
            assert sum(files.values()) < len(files) * (row + 1000)  # with the names of arrays
            snapshots.append(len(files))

    request = {"seconds": 45, "archive_limit": limit}
    video = plain.begin(PROMPT, SEED, lead=None, **request)
    render(plain, tmp_path / "a.mkv", **request, on_block=look)
    np.testing.assert_array_equal(
        frames_of(tmp_path / "a.mkv"), np.concatenate([block.frames for block in video])
    )
    assert snapshots == [1, 3, 5] + 12 * [limit]
    assert len({checkpoint_bytes(plain.config, blocks, limit, 2) for blocks in (31, 999)}) == 1


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_files_that_a_kill_left_unfinished_go(plain, stopped, tmp_path, suffix):
    """Under the names that are written under before files get their own."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "a.mkv.render"
    partial_path(folder / f"segment-000006{suffix}").touch()
    (folder / f"joined{suffix}").touch()
    (folder / "checkpoint.json.partial").touch()
    render(plain, tmp_path / "a.mkv", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mkv"]


def test_leftovers_of_a_finished_render_are_no_render(plain, stopped, tmp_path, truth):
    """Killed while it removed its folder: the record goes first."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    (tmp_path / "a.mkv.render" / "checkpoint.json").unlink()
    render(plain, tmp_path / "a.mkv")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mkv"]
    np.testing.assert_array_equal(frames_of(tmp_path / "a.mkv"), truth)


def test_a_folder_is_removed_once(plain, tmp_path, monkeypatch):
    """From then on it may be another process's."""
    remove, record = resume_module.RenderFolder.remove, tmp_path / "a.mkv.render/checkpoint.json"
    calls = []

    def remove_and_begin_another(folder):
        remove(folder)
        if not record.parent.exists():
            record.parent.mkdir()
            record.write_text(str(len(calls)))
        calls.append(folder)

    monkeypatch.setattr(resume_module.RenderFolder, "remove", remove_and_begin_another)
    render(plain, tmp_path / "a.mkv", seconds=1)
    assert len(calls) == 2 and record.read_text() == "0"


def test_what_is_in_the_way_of_the_folder_is_refused(plain, tmp_path):
    (tmp_path / "a.mkv.render").touch()
    (tmp_path / "b.mkv.render").symlink_to(tmp_path)
    for name in ("a.mkv", "b.mkv"):
        with pytest.raises(OutputError, match=r"\.render is in the way"):
            render(plain, tmp_path / name)


def test_a_pause_holds_between_two_blocks_until_another_thread_ends_it(plain, truth):
    frames, paused = [], threading.Event()

    def pause(info):
        if info.index == 2:
            plain.pause()
            paused.set()

    def watch():
        frames.extend(plain.stream(PROMPT, SECONDS, SEED, on_block=pause))

    thread = threading.Thread(target=watch)
    thread.start()
    paused.wait()
    assert len(frames) <= 3 and thread.is_alive()
    plain.proceed()
    thread.join()
    np.testing.assert_array_equal(np.concatenate(frames), truth)


@pytest.mark.parametrize("end", [Session.stop, Session.close])
def test_a_paused_video_can_be_ended(tiny_bundle, end):
    session, errors = Session.open(tiny_bundle), []
    paused = threading.Event()

    def pause(info):
        session.pause()
        paused.set()

    def watch():
        try:
            list(session.stream(PROMPT, SECONDS, on_block=pause))
        except (RenderStopped, BackendError) as error:
            errors.append(type(error))

    thread = threading.Thread(target=watch)
    thread.start()
    paused.wait()
    end(session)
    thread.join()
    assert errors == [RenderStopped if end is Session.stop else BackendError]
    session.close()


def test_an_unfinished_render_can_be_discarded(plain, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    resume_module.discard(tmp_path / "a.mkv")
    resume_module.discard(tmp_path / "a.mkv")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("where", [0, 1000, -1])
def test_damaged_latents_are_generated_again(plain, truth, stopped, tmp_path, where):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    (latents,) = tmp_path.glob("*/latents-*.bin")
    data = bytearray(latents.read_bytes())
    data[where] ^= 64
    latents.write_bytes(data)
    render(plain, tmp_path / "a.mkv", resume=True)
    np.testing.assert_array_equal(frames_of(tmp_path / "a.mkv"), truth)


def test_links_in_a_render_folder_are_neither_read_nor_written_through(
    plain, truth, stopped, tmp_path
):
    names = [path.name for path in sorted(stopped.glob("*/*-000*")) if "latents" not in path.name]
    for name in (*names, "checkpoint.json"):
        folder = Path(shutil.copytree(stopped, tmp_path / f"for {name}"))
        link(folder / "a.mkv.render" / name, folder, random.Random())
        with pytest.raises(ResumeError, match=f"{name} is damaged"):
            render(plain, folder / "a.mkv", resume=True)
    assert len(names) == 8  # three segments, three parts of the archive, sink and state
    folder, outside = Path(shutil.copytree(stopped, tmp_path / "new")), tmp_path / "outside"
    outside.write_text("mine")
    (folder / "a.mkv.render" / "latents-000006.bin").unlink()
    for name in (
        "latents-000006.bin", "state-000008.safetensors", "archive-000008.safetensors",
        "latents-000008.bin", "checkpoint.json.partial", "segment-000006.mkv",
    ):  # fmt: skip
        (folder / "a.mkv.render" / name).symlink_to(outside)
    lock = folder / "a.mkv.render" / "lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to(outside)
    with pytest.raises(OutputError, match=r"lock is a link; remove it"):
        render(plain, folder / "a.mkv", resume=True)
    lock.unlink()
    render(plain, folder / "a.mkv", resume=True)
    assert outside.read_text() == "mine"
    np.testing.assert_array_equal(frames_of(folder / "a.mkv"), truth)
