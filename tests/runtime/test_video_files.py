"""Writing videos: what comes out, what is refused, and that nothing half-written stays."""

import gc
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest

from packforcing.errors import OutputError
from packforcing.runtime.start_clip import read_start
from packforcing.runtime.video_files import check_output, open_video
from tests.clips import FPS, HEIGHT, WIDTH, flat, noise, write

TARGETS = ("clip.mp4", "clip.mkv", "frames/")


def decode(path: Path) -> np.ndarray:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_mkv_gives_every_byte_back(tmp_path):
    frames = noise(13)
    write(tmp_path / "clip.mkv", frames[:5], frames[5:])
    np.testing.assert_array_equal(decode(tmp_path / "clip.mkv"), frames)


@pytest.mark.parametrize("name", ["frames/", "frames"])
def test_png_frames_give_every_byte_back(tmp_path, name):
    frames = noise(3)
    write(f"{tmp_path}/{name}", frames[:1], frames[1:])
    files = sorted((tmp_path / "frames").iterdir())
    assert [file.name for file in files] == [f"frame_{i:06}.png" for i in range(3)]
    for file, frame in zip(files, frames):
        np.testing.assert_array_equal(cv2.imread(str(file))[..., ::-1], frame)


def test_mp4_has_the_size_rate_and_frame_count_asked_for(tmp_path):
    colours = ((220, 30, 40), (30, 200, 60), (40, 50, 210))
    write(tmp_path / "clip.mp4", *(flat(colour, repeat=7) for colour in colours))
    with av.open(tmp_path / "clip.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.codec_context.colorspace == 6  # SMPTE 170M
        assert (stream.width, stream.height, stream.average_rate) == (WIDTH, HEIGHT, FPS)
        assert stream.duration * stream.time_base == 21 / FPS
    shown = decode(tmp_path / "clip.mp4")
    assert len(shown) == 21
    for frame, colour in zip(shown[3::7], colours):
        np.testing.assert_allclose(frame.mean((0, 1)), colour, atol=8)


def test_mp4_can_play_before_it_is_loaded(tmp_path):
    write(tmp_path / "clip.mp4", noise(4))
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot choose its CPUs")
def test_mp4_is_the_same_however_many_cpus_there_are(tmp_path):
    """Else a render that is resumed elsewhere would be another."""
    cpus = os.sched_getaffinity(0)
    picture = cv2.resize(noise(1)[0], (640, 480), interpolation=cv2.INTER_CUBIC)
    try:
        for name, few in (("one.mp4", {min(cpus)}), ("all.mp4", cpus)):
            os.sched_setaffinity(0, few)
            with open_video(tmp_path / name, 640, 480, FPS) as video:
                for i in range(20):
                    video.write(np.roll(picture, 5 * i, axis=1)[None])
    finally:
        os.sched_setaffinity(0, cpus)
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "all.mp4").read_bytes()


ENCODE = """
import hashlib, sys
import numpy as np
from packforcing.runtime.start_clip import read_start
from packforcing.runtime.video_files import open_video

for cells, step, scale in (((120, 64, 96, 3), 8, 1), ((60, 18, 22, 3), 30, 8)):
    frames = np.random.default_rng(3).standard_normal(cells).cumsum(0) * step + 128
    frames = frames.clip(0, 255).astype(np.uint8).repeat(scale, 1).repeat(scale, 2)
    with open_video(sys.argv[1], *frames.shape[2:0:-1], 8) as video:
        video.write(frames)
    print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="MALLOC_PERTURB_ is glibc's")
def test_mp4_is_the_same_whatever_memory_held_before(tmp_path):
    """glibc fills fresh memory with a byte of its choice: an encoder that reads what it never wrote
    gives another file."""
    digests = {
        subprocess.run(
            [sys.executable, "-c", ENCODE, tmp_path / "a.mp4"],
            env={**os.environ, "MALLOC_PERTURB_": perturbation},
            capture_output=True, text=True, check=True,
        ).stdout
        for perturbation in ("1", "85", "170")
    }  # fmt: skip
    assert len(digests) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_has_the_final_name_before_the_end(tmp_path, target):
    with open_video(f"{tmp_path}/{target}", WIDTH, HEIGHT, FPS) as video:
        video.write(noise(2))
        assert not (tmp_path / target).exists()
    assert [path.name for path in tmp_path.iterdir()] == [target.rstrip("/")]


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("target", TARGETS)
def test_an_interrupted_video_leaves_nothing(tmp_path, target, interruption):
    with pytest.raises(interruption), open_video(f"{tmp_path}/{target}", WIDTH, HEIGHT, FPS) as v:
        v.write(noise(2))
        raise interruption
    assert not any(tmp_path.iterdir())


def test_an_interrupted_video_leaves_the_older_one(tmp_path):
    write(tmp_path / "clip.mkv", noise(2))
    with pytest.raises(RuntimeError), open_video(tmp_path / "clip.mkv", WIDTH, HEIGHT, FPS) as v:
        v.write(noise(5, seed=1))
        raise RuntimeError
    np.testing.assert_array_equal(decode(tmp_path / "clip.mkv"), noise(2))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_two_runs_with_one_name_do_not_touch_each_other(tmp_path, name):
    with open_video(tmp_path / name, WIDTH, HEIGHT, FPS) as first:
        first.write(noise(2))
        write(tmp_path / name, noise(5, seed=1))
        assert len(decode(tmp_path / name)) == 5
        first.write(noise(2))
    assert len(decode(tmp_path / name)) == 4
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_of_two_runs_with_one_folder_the_first_to_end_has_it(tmp_path):
    folder = tmp_path / "frames"
    with (
        pytest.raises(OutputError, match="nothing"),
        open_video(folder, WIDTH, HEIGHT, FPS) as late,
    ):
        late.write(noise(2))
        write(folder, noise(1))
    assert sorted(tmp_path.rglob("*")) == [folder, folder / "frame_000000.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="has no file size limit to hit")
@pytest.mark.parametrize("target", TARGETS)
def test_a_disk_that_refuses_is_an_output_error_and_leaves_nothing(tmp_path, target):
    import resource  # file size limits stand in for a full disk: the same path, another errno

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*File too large.*nothing is left"):
            write(f"{tmp_path}/{target}", *(noise(4, seed) for seed in range(20)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("target", TARGETS)
def test_frames_that_were_written_are_let_go(tmp_path, target):
    """No video is ever whole in memory: each block is free once the call is over."""
    alive = []
    with open_video(f"{tmp_path}/{target}", WIDTH, HEIGHT, FPS) as video:
        for seed in range(4):
            block = noise(4, seed)
            alive.append(weakref.ref(block))
            video.write(block)
            del block
            gc.collect()
            assert alive[-1]() is None


def test_memory_does_not_grow_with_length(tmp_path):
    if not Path("/proc/self/statm").exists():
        pytest.skip("reads resident memory from /proc")

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    block = noise(100)
    with open_video(tmp_path / "clip.mp4", WIDTH, HEIGHT, FPS) as video:
        for _ in range(5):  # past the encoder's look-ahead
            video.write(block)
        before = resident_bytes()
        for _ in range(20):
            video.write(block)
        assert resident_bytes() - before < 20 * block.nbytes / 4


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("clip.avi", r"'\.avi' is not a kind of video.*\.mp4, \.mkv"),
        ("missing/clip.mp4", "there is no folder .*missing; create it"),
        ("folder.mp4", "a folder has that name"),
        ("used/", r"not empty, it has notes\.txt; empty it or name a new one"),
        ("file", "a file has that name"),
        (".mp4", "a suffix without a name; name it 'video.mp4'"),
        ("x" * 300 + ".mp4", "File name too long"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_target_that_cannot_work_is_refused_at_once(tmp_path, target, why):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").touch()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=why):
        check_output(f"{tmp_path}/{target}", 10, WIDTH, HEIGHT)
    with pytest.raises(OutputError, match=why):
        write(f"{tmp_path}/{target}", noise(1))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write to")
def test_an_unwritable_folder_is_refused_even_to_an_administrator():
    with pytest.raises(OutputError, match="/proc is not writable"):
        check_output("/proc/clip.mp4", 10, WIDTH, HEIGHT)


@pytest.mark.skipif(sys.platform == "win32", reason="has another kind of link")
def test_a_name_that_leads_nowhere_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "dangling").symlink_to("missing")
    for name in ("loop", "loop/", "loop.mp4", "loop/a.mp4", "dangling", "dangling/a.mkv"):
        with pytest.raises(OutputError, match=r"symbolic links|a file has that name|no folder"):
            check_output(f"{tmp_path}/{name}", 10, WIDTH, HEIGHT)


@pytest.mark.skipif(sys.platform == "win32", reason="has other permissions")
@pytest.mark.parametrize("target", TARGETS)
def test_a_folder_that_is_out_of_reach_is_refused(tmp_path, target):
    (tmp_path / "closed").mkdir(mode=0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # permissions do not stop an administrator
        with pytest.raises(OutputError, match="Permission denied"):
            check_output(f"{tmp_path}/closed/{target}", 10, WIDTH, HEIGHT)
    finally:
        os.seteuid(user)


@pytest.mark.skipif(sys.platform == "win32", reason="has shorter names, without colons")
@pytest.mark.parametrize("name", ["x" * 251 + ".mkv", "a:b.mkv"])
def test_a_name_that_the_system_takes_works(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(name, noise(2))
    np.testing.assert_array_equal(read_start(name, WIDTH, HEIGHT, FPS, limit=8), noise(2))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["frames.v2", "frames.v2/", "."])
def test_an_empty_folder_takes_png_frames_and_stays_itself(tmp_path, name, monkeypatch):
    folder = tmp_path / "frames.v2"
    folder.mkdir()
    monkeypatch.chdir(folder if name == "." else tmp_path)
    before = folder.stat().st_ino
    with pytest.raises(RuntimeError), open_video(name, WIDTH, HEIGHT, FPS) as video:
        video.write(noise(1))
        raise RuntimeError
    assert not any(folder.iterdir())
    write(name, noise(2))
    assert sorted(file.name for file in folder.iterdir()) == [
        "frame_000000.png", "frame_000001.png"
    ]  # fmt: skip
    assert folder.stat().st_ino == before


def test_a_folder_gets_all_frames_or_none(tmp_path):
    with pytest.raises(OutputError), open_video(tmp_path, WIDTH, HEIGHT, FPS) as video:
        video.write(noise(3))
        (tmp_path / "frame_000001.png").mkdir()  # comes into the way
    assert [path.name for path in tmp_path.iterdir()] == ["frame_000001.png"]


def test_too_small_a_disk_is_refused_with_what_is_needed(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=10**7)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check_output(tmp_path / "clip.mp4", 100, WIDTH, HEIGHT)
    with pytest.raises(OutputError, match=r"4000 frames needs [\d.]+ MB .* has 10\.0 MB left"):
        check_output(tmp_path / "clip.mkv", 4000, WIDTH, HEIGHT)


@pytest.mark.parametrize("target", ["clip.mkv", "frames/"])
def test_the_room_asked_for_covers_lossless_noise(tmp_path, target, monkeypatch):
    write(f"{tmp_path}/{target}", noise(40))
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    usage = SimpleNamespace(free=size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"needs .* left"):
        check_output(f"{tmp_path}/new-{target}", 40, WIDTH, HEIGHT)


def test_odd_sizes_are_refused_for_h264_and_kept_by_ffv1(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 33, 47, 3), np.uint8)
    with pytest.raises(OutputError, match=r"even width and height, not 47x33; write \.mkv"):
        check_output(tmp_path / "clip.mp4", 3, 47, 33)
    with open_video(tmp_path / "clip.mkv", 47, 33, FPS) as video:
        video.write(frames)
    np.testing.assert_array_equal(decode(tmp_path / "clip.mkv"), frames)


def test_frames_of_another_shape_are_a_programming_error(tmp_path):
    with pytest.raises(ValueError, match=r"uint8 \[n, 32, 48, 3\], not float32"):
        write(tmp_path / "clip.mp4", noise(1).astype(np.float32))
    with pytest.raises(ValueError, match="not uint8"):
        write(tmp_path / "clip.mp4", noise(1)[:, :-2])
    assert not any(tmp_path.iterdir())
