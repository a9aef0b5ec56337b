"""A render that is killed, or loses power or disk space, resumes with the frames it had ahead."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from packforcing.errors import OutputError
from packforcing.prompts import Switch
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime import resume as resume_module
from tests.helpers import PROMPT, frames_of, render
from tests.helpers import RENDER_INTERVAL as EVERY
from tests.helpers import RENDER_SECONDS as SECONDS
from tests.helpers import RENDER_SEED as SEED

CHILD = """
import sys
from packforcing.runtime import Session, Switch
with Session.open(sys.argv[1]) as session:
    print("begins", flush=True)
    session.render(
        {!r}, {}, sys.argv[2], {}, resume=True, checkpoint_seconds={}, archive_limit={}
    )
"""
LIMIT = 6  # archived blocks, where a full archive is tested, under a schedule as one records it
SCHEDULE = [
    Switch(0, PROMPT),
    Switch(21 / 8, "a blue square over sand checks", "cut", block=2),
    Switch(54 / 8, "a white circle", "keep", over=3, block=5),
    Switch(102 / 8, "a green circle", "recompute", block=9),
]


def child(seconds, limit=None):
    """Return a program that renders the example video of so many seconds, resuming it."""
    return CHILD.format(SCHEDULE if limit else PROMPT, seconds, SEED, EVERY, limit)


@pytest.mark.parametrize(
    ("model", "name", "kills", "limit"),
    [("tiny", "a.mkv", 5, LIMIT), *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in (
            ("tiny", "a.mkv", 50, None), ("tiny", "a.mkv", 50, LIMIT), ("demo", "a.mp4", 50, None),
            *(("tiny", f"a{suffix}", 20, None) for suffix in (".mov", ".webm", ".gif")),
        )
    )],
)  # fmt: skip
def test_a_render_killed_at_random_moments_resumes(
    tiny_bundle, tmp_path, model, name, kills, limit
):
    """SIGKILL, again and again; what has its final name can be played at any time."""
    bundle = {"tiny": tiny_bundle, "demo": demo_bundle()}[model]
    path, alone, killed = tmp_path / name, tmp_path / f"alone-{name}", 0
    with Session.open(bundle) as session:
        began = time.perf_counter()
        prompt = SCHEDULE if limit else PROMPT
        render(session, alone, prompt=prompt, archive_limit=limit)
        duration, moments = time.perf_counter() - began, random.Random(0)
    truth, code = frames_of(alone), child(SECONDS, limit)
    while not path.exists():
        command = [sys.executable, "-c", code, bundle, path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "begins\n"
            try:
                timeout = None if killed == kills else moments.uniform(0, duration / 3)
                assert process.wait(timeout) == 0
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
    path, code = f"{tmp_path}/{target}", child(3)
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
    path, code = f"{tmp_path}/{target}", child(3)
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
    path, code = tmp_path / "a.mkv", child(SECONDS)
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
        self.states += [
            (names_left, self._left(names_left)) for names_left in ("flushed", "renamed", "all")
        ]

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

    def _left(self, names_left):
        state = {}

        def walk(folder, number, path):
            names = self._listed(path) if names_left == "all" else dict(self._names.get(number, {}))
            if names_left == "renamed" and self._renamed:
                old, new, entry = self._renamed
                if old.parent == path:
                    names.pop(old.name, None)
                if new.parent == path:
                    names[new.name] = entry
            for name, (inner, is_folder) in names.items():
                state[folder / name] = None if is_folder else self._data.get(inner, b"")
                if is_folder:
                    walk(folder / name, inner, path / name)

        walk(Path(), self._id(self.root), self.root)
        return state


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks names up in /proc")
@pytest.mark.parametrize(
    ("target", "blocks", "limit"),
    [
        ("a.mkv", 3, None),
        ("frames/", 4, None),
        pytest.param("a.mkv", 10, LIMIT, marks=pytest.mark.full),
    ],
)
def test_power_may_fail_at_any_moment(plain, tmp_path, monkeypatch, target, blocks, limit):
    """Nothing broken has a final name, and the render goes on from its last checkpoint, whichever
    names are kept: what counts is on the disk before it is relied on."""
    counts = [0, *(block * 12 - 3 for block in range(1, blocks)), blocks * 12 - 12]  # of frames
    options = {"seconds": counts[-1] / 8, "checkpoint_seconds": 1.5}  # a checkpoint at each block
    options["archive_limit"] = limit
    video = plain.begin(PROMPT, SEED, seconds=options["seconds"], lead=None, archive_limit=limit)
    expected = np.concatenate([block.frames for block in video])
    (tmp_path / "disk").mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path / "disk", patch)
        render(plain, f"{disk.root}/{target}", **options)
        disk.look()
    place, known = tmp_path / "after", {}
    resumed = {"flushed": [], "renamed": [], "all": []}  # frames, in the order of failures
    for names_left, state in disk.states:
        key = tuple(sorted(state.items()))
        if key in known:
            resumed[names_left] += known[key]
            continue
        for path, data in state.items():
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).mkdir() if data is None else (place / path).write_bytes(data)
        place.mkdir(exist_ok=True)
        for segment in place.glob("*.render/segment-*"):
            assert len(frames_of(segment))
        path = place / Path(target).name
        if path.exists():
            np.testing.assert_array_equal(frames_of(path), expected)
        known[key] = []
        if not path.exists() or resume_module.finished(path):
            summary = render(plain, f"{place}/{target}", resume=True, **options)
            known[key] = [summary.frames_resumed]
        resumed[names_left] += known[key]
        np.testing.assert_array_equal(frames_of(path), expected)
        shutil.rmtree(place)
    for frames in resumed.values():  # what was kept once is kept
        assert frames == sorted(frames) and set(frames) == {*counts}


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
def test_a_render_that_filled_the_disk_resumes_when_there_is_room(
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
    assert {entry.name for entry in small_disk.iterdir()} == {"other", f"{path.name}.render"}
    for segment in small_disk.glob("*.render/segment-*"):
        assert len(frames_of(segment))
    with pytest.raises(OutputError, match=r"needs .* left"):  # nothing has changed
        render(plain, f"{small_disk}/{target}", resume=True)
    other.unlink()
    summary = render(plain, f"{small_disk}/{target}", resume=True)
    assert summary.frames_resumed == {1: 0, 3: 21, "joins": 117}[block]
    assert [entry.name for entry in small_disk.iterdir()] == [path.name]
    if path.suffix == ".mp4":
        render(plain, tmp_path / "b.mp4")
        assert path.read_bytes() == (tmp_path / "b.mp4").read_bytes()
    else:
        np.testing.assert_array_equal(frames_of(path), truth)
