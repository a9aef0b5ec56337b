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
import subprocess
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
from packforcing.runtime import Session, demo_bundle, render_record
from packforcing.runtime import resume as resume_module
from packforcing.runtime.bundle import write_manifest
from packforcing.runtime.device import view
from packforcing.runtime.plan import make_plan
from tests.helpers import DAMAGES, PROMPT, frames_of, link

SEED = 5
SECONDS, EVERY = 15, 3.0  # a block lasts 1.5 s: 11 blocks, two between checkpoints


@pytest.fixture(scope="module")
def plain(tiny_bundle):
    with Session.open(tiny_bundle) as session:
        yield session


@pytest.fixture(scope="module")
def truth(plain) -> np.ndarray:
    return np.concatenate(list(plain.stream(PROMPT, SECONDS, SEED)))


def render(session, path, **changes):
    asked = {"prompt": PROMPT, "seconds": SECONDS, "seed": SEED, "checkpoint_seconds": EVERY}
    return session.render(path=path, **{**asked, **changes})


def stop_after(session, *blocks):
    """An `on_block` that stops the session after each of these."""
    return lambda info: session.stop() if info.index + 1 in blocks else None


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


CHILD = """
import sys
from packforcing.runtime import Session
with Session.open(sys.argv[1]) as session:
    print("begins", flush=True)
    session.render({!r}, {}, sys.argv[2], {}, resume=True, checkpoint_seconds={})
"""


@pytest.mark.parametrize(
    ("model", "name", "kills"),
    [("tiny", "a.mkv", 5), *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in (("tiny", "a.mkv", 50), ("demo", "a.mp4", 50))
    )],
)  # fmt: skip
def test_killed_at_random_moments_it_goes_on(tiny_bundle, tmp_path, model, name, kills):
    """SIGKILL, again and again; what has its final name can be played at any time."""
    bundle = {"tiny": tiny_bundle, "demo": demo_bundle()}[model]
    path, alone, killed = tmp_path / name, tmp_path / f"alone-{name}", 0
    with Session.open(bundle) as session:
        began = time.perf_counter()
        render(session, alone)
        duration, moments = time.perf_counter() - began, random.Random(0)
    truth, code = frames_of(alone), CHILD.format(PROMPT, SECONDS, SEED, EVERY)
    while not path.exists():
        command = [sys.executable, "-c", code, bundle, path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "begins\n"
            try:
                limit = None if killed == kills else moments.uniform(0, duration / 3)
                assert process.wait(limit) == 0
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
        for segment in tmp_path.glob("*.render/segment-*"):
            assert len(frames_of(segment))
        if path.exists():
            np.testing.assert_array_equal(frames_of(path), truth)
            if killed < kills:
                path.unlink()


DIES = """
import os
from pathlib import Path
from packforcing.runtime import video_files
def dying(call):
    return lambda path, *rest: os._exit(9) if path.stem == "joined" else call(path, *rest)
{0} = dying({0})
"""


@pytest.mark.parametrize("moment", ["video_files.flush", "Path.replace"])
@pytest.mark.parametrize("target", ["a.mp4", "frames.v2/", "empty/"])
def test_killed_while_it_joins_it_leaves_nothing_but_the_video(
    plain, tiny_bundle, tmp_path, target, moment
):
    """When all is written, and right before it takes its place."""
    (tmp_path / "empty").mkdir()
    path, code = f"{tmp_path}/{target}", CHILD.format(PROMPT, 3, SEED, EVERY)
    command = [sys.executable, "-c", DIES.format(moment) + code, tiny_bundle, path]
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 9
    render(plain, path, seconds=3, resume=True)
    names = {"empty", Path(target).name}
    assert {left.name for left in tmp_path.iterdir()} == names
    assert len(frames_of(Path(path))) == 24


@pytest.mark.parametrize("target", ["a.mp4", "frames.v2/", "empty/"])
@pytest.mark.parametrize("resume", [True, False])
def test_killed_after_its_video_has_its_name_it_is_finished(
    plain, tiny_bundle, tmp_path, target, resume
):
    """The folder that it had no time to remove goes with the next render: one that resumes has
    nothing to do, another one begins anew, where no finished frames are in its way."""
    (tmp_path / "empty").mkdir()
    path, code = f"{tmp_path}/{target}", CHILD.format(PROMPT, 3, SEED, EVERY)
    dies = (
        "import os\nfrom packforcing.runtime import resume\n"
        "resume.RenderFolder.remove = lambda folder: os._exit(9)\n"
    )
    command = [sys.executable, "-c", dies + code, tiny_bundle, path]
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 9
    made = Path(path)
    assert len(frames_of(made)) == 24 and resume_module.finished(path)
    before = made.stat()
    if resume:
        summary = render(plain, path, seconds=3, resume=True)
        assert summary.frames == summary.frames_resumed == 24
        assert made.stat() == before  # untouched
    elif made.is_dir():
        with pytest.raises(OutputError, match="the folder is not empty"):
            render(plain, path, seconds=3)
        shutil.rmtree(made)
        assert not resume_module.finished(path)  # nothing is, any more
        render(plain, path, seconds=3)
    else:
        assert render(plain, path, seconds=1).frames == 8
    assert {left.name for left in tmp_path.iterdir()} == {"empty", made.name}
    assert len(frames_of(made)) == (24 if resume or made.is_dir() else 8)


def test_a_video_that_was_announced_but_not_renamed_is_joined_anew(
    plain, tiny_bundle, truth, tmp_path
):
    """Whatever became of it meanwhile, and even if a file of its name is there already."""
    path, code = tmp_path / "a.mkv", CHILD.format(PROMPT, SECONDS, SEED, EVERY)
    command = [sys.executable, "-c", DIES.format("Path.replace") + code, tiny_bundle, path]
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 9
    path.touch()
    (joined,) = tmp_path.glob("*.render/joined.mkv")
    joined.write_bytes(b"no video")
    with pytest.raises(OutputError, match="an unfinished render"):
        render(plain, path)
    command[2] = DIES.format("video_files.flush") + code  # as it joins anew
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 9
    joined.unlink()
    assert not resume_module.finished(path)
    render(plain, path, resume=True)
    np.testing.assert_array_equal(frames_of(path), truth)
    assert [left.name for left in tmp_path.iterdir()] == ["a.mkv"]


class Disk:
    """What power failures leave of a folder, seen at every fsync, renaming and removal in it.

    Of a file, what it held when it was flushed last, and nothing if it never was. Of a folder, the
    names that it had when it was flushed last, these and what was renamed last, or all that it has:
    each may be. A renaming is one step, as journals have it.
    """

    def __init__(self, root: Path, monkeypatch) -> None:
        # which names are kept, and by path, bytes or None for a folder
        self.root, self.states = root, []
        self._files, self._ids = {}, {}  # inodes are used again, these numbers are not
        self._data, self._names, self._renamed = {}, {}, None
        self._flush(root)
        for name in ("fsync", "replace", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name, call):
        def watched(what, *rest, **options):
            where = Path(os.readlink(f"/proc/self/fd/{what}") if name == "fsync" else what)
            if options.get("dir_fd") is not None or not where.absolute().is_relative_to(self.root):
                return call(what, *rest, **options)
            self.look()
            gone = [path for path in (where, *map(Path, rest)) if name != "fsync" and path.exists()]
            for path in gone[-1:]:  # what is removed, or replaced
                if name != "replace" or len(gone) == 2:
                    self._ids.pop(path.stat().st_ino, None)
            result = call(what, *rest, **options)
            if name == "fsync":
                self._flush(where)
            if name == "replace":
                to = Path(rest[0])
                self._renamed = where, to, (self._id(to), to.is_dir())
            return result

        return watched

    def look(self):
        self.states += [(kept, self._left(kept)) for kept in ("flushed", "renamed", "all")]

    def _id(self, path):
        return self._ids.setdefault(path.stat().st_ino, object())

    def _flush(self, path):
        if path.is_dir():
            self._names[self._id(path)] = self._listed(path)
            if self._renamed and self._renamed[1].parent == path:
                old = self._renamed[0]
                self._names.get(self._id(old.parent), {}).pop(old.name, None)
                self._renamed = None
        else:
            self._data[self._id(path)] = path.read_bytes()

    def _listed(self, folder):
        return {path.name: (self._id(path), path.is_dir()) for path in folder.iterdir()}

    def _left(self, kept):
        found = {}

        def walk(folder, number, path):
            names = self._listed(path) if kept == "all" else dict(self._names.get(number, {}))
            if kept == "renamed" and self._renamed:
                old, new, entry = self._renamed
                if old.parent == path:
                    names.pop(old.name, None)
                if new.parent == path:
                    names[new.name] = entry
            for name, (inner, is_folder) in names.items():
                found[folder / name] = None if is_folder else self._data.get(inner, b"")
                if is_folder:
                    walk(folder / name, inner, path / name)

        walk(Path(), self._id(self.root), self.root)
        return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks names up in /proc")
@pytest.mark.parametrize("target", ["a.mkv", "frames/"])
def test_power_may_fail_at_any_moment(plain, tmp_path, monkeypatch, target):
    """Nothing broken has a final name, and the render goes on from its last checkpoint, whichever
    names are kept: what counts is on the disk before it is relied on."""
    asked = {"seconds": 4.5, "checkpoint_seconds": 1.5}  # four blocks, each with a checkpoint
    wanted = np.concatenate(list(plain.stream(PROMPT, 4.5, SEED)))
    (tmp_path / "disk").mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path / "disk", patch)
        render(plain, f"{disk.root}/{target}", **asked)
        disk.look()
    place, known = tmp_path / "after", {}
    resumed = {"flushed": [], "renamed": [], "all": []}  # frames, in the order of failures
    for kept, state in disk.states:
        key = tuple(sorted(state.items()))
        if key in known:
            resumed[kept] += known[key]
            continue
        for path, data in state.items():
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).mkdir() if data is None else (place / path).write_bytes(data)
        place.mkdir(exist_ok=True)
        for segment in place.glob("*.render/segment-*"):
            assert len(frames_of(segment))
        path = place / Path(target).name
        if path.exists():
            np.testing.assert_array_equal(frames_of(path), wanted)
        known[key] = []
        if not path.exists() or resume_module.finished(path):
            summary = render(plain, f"{place}/{target}", resume=True, **asked)
            known[key] = [summary.frames_resumed]
        resumed[kept] += known[key]
        np.testing.assert_array_equal(frames_of(path), wanted)
        shutil.rmtree(place)
    for frames in resumed.values():  # what was kept once is kept
        assert frames == sorted(frames) and set(frames) == {0, 9, 21, 33, 36}


@pytest.fixture
def small_disk(tmp_path):
    """16 MB, in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("mount"):
        pytest.skip("there is no mount here")
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("target", "block", "left"),
    [
        ("a.mkv", 1, 0),  # while a block's frames are encoded
        ("a.mkv", 3, 20_000),
        ("a.mp4", 3, 1000),  # at the end of a segment: H.264 comes late
        ("frames/", "joins", 300_000),
    ],
)
def test_a_disk_that_is_full_ends_a_render_that_goes_on_when_there_is_room(
    plain, truth, tmp_path, small_disk, monkeypatch, target, block, left
):
    """A real one, filled by somebody else after so many blocks. No file on it stays open: it can be
    unmounted."""
    path, other = small_disk / target, small_disk / "other"

    def fill(_):
        other.write_bytes(bytes(shutil.disk_usage(small_disk).free - left))

    with monkeypatch.context() as patch:
        if block == "joins":
            segments = resume_module.RenderFolder.segments
            patch.setattr(
                resume_module.RenderFolder, "segments",
                lambda self, blocks: fill(blocks) or segments(self, blocks),
            )  # fmt: skip
        with pytest.raises(OutputError, match=r"cannot write .*No space left.*\.render: resume it"):
            render(
                plain, f"{small_disk}/{target}",
                on_block=lambda info: fill(info) if info.index == block else None,
            )  # fmt: skip
    assert {found.name for found in small_disk.iterdir()} == {"other", f"{path.name}.render"}
    for segment in small_disk.glob("*.render/segment-*"):
        assert len(frames_of(segment))
    with pytest.raises(OutputError, match=r"needs .* left"):  # nothing has changed
        render(plain, f"{small_disk}/{target}", resume=True)
    other.unlink()
    summary = render(plain, f"{small_disk}/{target}", resume=True)
    assert summary.frames_resumed == {1: 0, 3: 21, "joins": 117}[block]
    assert [found.name for found in small_disk.iterdir()] == [path.name]
    if path.suffix == ".mp4":
        render(plain, tmp_path / "b.mp4")
        assert path.read_bytes() == (tmp_path / "b.mp4").read_bytes()
    else:
        np.testing.assert_array_equal(frames_of(path), truth)


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
def test_a_damaged_checkpoint_is_refused_or_gives_the_right_video(
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


def test_another_render_is_not_resumed(plain, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    before = sorted(path.name for path in (tmp_path / "a.mkv.render").iterdir())
    with pytest.raises(OutputError, match=r"unfinished render.*resume it"):
        render(plain, tmp_path / "a.mkv")
    for change, said in (
        ({"seed": 6}, "seed was 5, now 6"),
        ({"prompt": "a white circle"}, "prompts was"),
        ({"seconds": 14}, "frames was 120, now 112"),
        ({"checkpoint_seconds": 6}, "interval was 2, now 4"),
    ):
        with pytest.raises(ResumeError, match=f"has another request: .*{said}"):
            render(plain, tmp_path / "a.mkv", resume=True, **change)
    assert sorted(path.name for path in (tmp_path / "a.mkv.render").iterdir()) == before


@pytest.mark.parametrize("seconds", [math.inf, math.nan, 0, -1])
def test_an_interval_that_is_none_is_refused(plain, tmp_path, seconds):
    with pytest.raises(ConfigError, match="checkpoint_seconds must be above 0"):
        render(plain, tmp_path / "a.mkv", checkpoint_seconds=seconds)
    assert not any(tmp_path.iterdir())


def test_a_render_of_another_release_is_not_resumed(plain, stopped, tmp_path, monkeypatch):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(render_record, "VERSION", 3)
    with pytest.raises(ResumeError, match="has version 2, this release reads 3"):
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


def test_a_checkpoint_takes_the_memory_that_the_plan_states(plain, tmp_path, monkeypatch):
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
    assert 0.7 * stated < max(peaks) - hashing < stated


@pytest.mark.parametrize(
    ("tensor", "call", "said"),
    [
        ("flow", 20, "block 3, step 4 of 4: the graph 'denoiser'"),
        ("q_pool", 21, "block 3, its commit: the graph 'denoiser'"),
        ("k_pool", 22, "block 3, its mid pass: the graph 'denoiser'"),
        ("frames", 9, "block 3, its pixels: the graph 'vae_decoder'"),
        ("v_new.1", 21, "block 3: its keys, values or decoder state"),
    ],
)
def test_a_number_that_is_none_stops_the_render_by_name(
    tiny_bundle, truth, tmp_path, tensor, call, said
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
        with pytest.raises(BackendError, match=said):
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
def test_a_checkpoint_that_makes_no_sense_is_refused(plain, stopped, tmp_path, change):
    """Even if its hash is right."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "a.mkv.render" / "checkpoint.json"
    body = msgspec.json.decode(path.read_bytes())["checkpoint"]
    body = msgspec.json.encode({**body, **change})
    sealed = {"sha256": hashlib.sha256(body).hexdigest(), "checkpoint": msgspec.Raw(body)}
    path.write_bytes(msgspec.json.encode(sealed))
    with pytest.raises(ResumeError, match=r"checkpoint\.json is damaged"):
        render(plain, tmp_path / "a.mkv", resume=True)


def test_what_is_not_ours_stays(plain, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    (tmp_path / "a.mkv.render" / "notes.txt").touch()
    render(plain, tmp_path / "a.mkv", resume=True)
    assert [path.name for path in (tmp_path / "a.mkv.render").iterdir()] == ["notes.txt"]


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
    found, paused = [], threading.Event()

    def pause(info):
        if info.index == 2:
            plain.pause()
            paused.set()

    def watch():
        found.extend(plain.stream(PROMPT, SECONDS, SEED, on_block=pause))

    thread = threading.Thread(target=watch)
    thread.start()
    paused.wait()
    assert len(found) <= 3 and thread.is_alive()
    plain.proceed()
    thread.join()
    np.testing.assert_array_equal(np.concatenate(found), truth)


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
def test_damaged_latents_are_made_again(plain, truth, stopped, tmp_path, where):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    (latents,) = tmp_path.glob("*/latents-*.bin")
    data = bytearray(latents.read_bytes())
    data[where] ^= 64
    latents.write_bytes(data)
    render(plain, tmp_path / "a.mkv", resume=True)
    np.testing.assert_array_equal(frames_of(tmp_path / "a.mkv"), truth)


def test_links_in_a_checkpoint_are_neither_read_nor_written_through(
    plain, truth, stopped, tmp_path
):
    kept = [path.name for path in sorted(stopped.glob("*/*-000*")) if "latents" not in path.name]
    for name in (*kept, "checkpoint.json"):
        folder = Path(shutil.copytree(stopped, tmp_path / f"for {name}"))
        link(folder / "a.mkv.render" / name, folder, random.Random())
        with pytest.raises(ResumeError, match=f"{name} is damaged"):
            render(plain, folder / "a.mkv", resume=True)
    assert len(kept) == 8  # three segments, three parts of the archive, sink and state
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
