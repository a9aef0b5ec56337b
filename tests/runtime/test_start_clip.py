"""Reading the picture or clip that a video begins with: what players show of it, or one line."""

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from packforcing.errors import VideoError
from packforcing.runtime.start_clip import read_start
from tests.clips import FPS, HEIGHT, WIDTH, flat, noise, write
from tests.helpers import PROMPT, run_without


def test_a_picture_is_cropped_around_its_centre_and_resized(tmp_path):
    picture = np.zeros((64, 200, 3), np.uint8)
    picture[:, 52:148] = (200, 100, 50)  # the middle 96 x 64, which is 3:2 as the frames are
    cv2.imwrite(str(tmp_path / "start.png"), picture[..., ::-1])
    start = read_start(tmp_path / "start.png", WIDTH, HEIGHT, FPS, limit=8)
    np.testing.assert_array_equal(start, flat((200, 100, 50)))


def test_a_clip_is_read_exactly_and_only_its_end(tmp_path):
    frames = noise(10)
    write(tmp_path / "clip.mkv", frames)
    for limit, expected in ((20, frames), (4, frames[-4:])):
        start = read_start(tmp_path / "clip.mkv", WIDTH, HEIGHT, FPS, limit)
        np.testing.assert_array_equal(start, expected)


@pytest.mark.parametrize(
    ("fps", "expected"), [(8, [0, 2, 4, 6]), (32, [k // 2 for k in range(16)])]
)
def test_a_clip_of_another_rate_is_read_at_the_models(tmp_path, fps, expected):
    clip = noise(8)
    write(tmp_path / "clip.mkv", clip)
    start = read_start(tmp_path / "clip.mkv", WIDTH, HEIGHT, fps, limit=100)
    positions = [int(np.argmax((clip == frame).all((1, 2, 3)))) for frame in start]
    assert positions == expected


def claiming_png(width: int, height: int) -> bytes:
    """A small file that says it is a picture of this size."""
    header = struct.pack(">2L5B", width, height, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))
        for kind, data in chunks
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", b""),
        ("a.png", b"not a picture"),
        ("a.png", claiming_png(40_000, 40_000)),
        ("a.mp4", b""),
        ("a.mp4", b"not a video"),
    ],
)
def test_a_damaged_start_is_refused(tmp_path, name, content, capfd):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VideoError, match=r"cannot start from .*a\..*give a picture"):
        read_start(tmp_path / name, WIDTH, HEIGHT, FPS, limit=8)
    assert capfd.readouterr().err == ""


def test_a_missing_start_is_refused(tmp_path):
    with pytest.raises(VideoError, match="No such file"):
        read_start(tmp_path / "a.png", WIDTH, HEIGHT, FPS, limit=8)


# Pictures of many kinds: a left half and a right half, each of one color


LEFT, RIGHT = (200, 40, 90), (20, 160, 230)


def halves(left=LEFT, right=RIGHT, dtype=np.uint8) -> np.ndarray:
    """A picture of the video's size, [HEIGHT, WIDTH, channels]."""
    picture = np.empty((HEIGHT, WIDTH, len(left)), dtype)
    picture[:, : WIDTH // 2], picture[:, WIDTH // 2 :] = left, right
    return picture


def assert_shows(path: Path, left, right, tolerance: int = 0) -> None:
    (frame,) = read_start(path, WIDTH, HEIGHT, FPS, limit=8).astype(int)
    for half, color in ((frame[:, : WIDTH // 2 - 8], left), (frame[:, WIDTH // 2 + 8 :], right)):
        assert np.abs(half - np.array(color)).max() <= tolerance


def test_exif_orientation_is_applied(tmp_path):
    """6: the camera was turned, so that the stored picture's left side is the shown top."""
    exif = Image.Exif()
    exif[274] = 6
    stored = np.rot90(halves(), 1)  # shown upright again by a turn of 90 degrees clockwise
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    assert_shows(tmp_path / "a.png", LEFT, RIGHT)


def test_transparency_is_shown_over_black(tmp_path):
    """Half of each color, none of a hidden one."""
    picture = halves((*LEFT[::-1], 128), (*RIGHT[::-1], 0))
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    half = np.array(LEFT) * 128 / 255
    assert_shows(tmp_path / "a.png", half, (0, 0, 0), tolerance=1)


def test_a_palette_with_a_transparent_color_is_shown_over_black(tmp_path):
    picture = Image.fromarray(halves()).quantize(2)
    index = picture.getpixel((WIDTH - 1, 0))
    picture.save(tmp_path / "a.png", transparency=index)
    assert_shows(tmp_path / "a.png", LEFT, (0, 0, 0), tolerance=1)
    Image.fromarray(halves()).quantize(2).save(tmp_path / "b.png")
    assert_shows(tmp_path / "b.png", LEFT, RIGHT, tolerance=1)


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    gray = halves((40_000,), (300,), np.uint16)
    cv2.imwrite(str(tmp_path / "gray.png"), gray)
    assert_shows(tmp_path / "gray.png", [40_000 / 257] * 3, [300 / 257] * 3, tolerance=1)
    color = halves((1000, 60_000, 30_000), (0, 65_535, 257 * 7), np.uint16)
    cv2.imwrite(str(tmp_path / "color.png"), color)
    left, right = np.array([30_000, 60_000, 1000]) / 257, (7, 255, 0)
    assert_shows(tmp_path / "color.png", left, right, tolerance=1)


def test_gray_becomes_rgb(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), halves((200,), (30,)))
    assert_shows(tmp_path / "a.png", [200] * 3, [30] * 3)


def test_cmyk_becomes_rgb(tmp_path):
    """Ink takes away its complement, and black all of it."""
    picture = Image.fromarray(halves((255, 0, 0, 0), (0, 0, 128, 64)), "CMYK")
    picture.save(tmp_path / "a.jpg", quality=100, subsampling=0)
    right = (191, 191, 191 * 127 / 255)
    assert_shows(tmp_path / "a.jpg", (0, 255, 255), right, tolerance=4)


@pytest.mark.parametrize(("suffix", "tolerance"), [("webp", 0), ("avif", 12), ("bmp", 0)])
def test_other_formats_are_read(tmp_path, suffix, tolerance):
    options = {"webp": {"lossless": True}, "avif": {"quality": 95}}.get(suffix, {})
    Image.fromarray(halves()).save(tmp_path / f"a.{suffix}", **options)
    assert_shows(tmp_path / f"a.{suffix}", LEFT, RIGHT, tolerance)


def test_a_picture_that_is_cut_off_is_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(noise(1)[0]).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(VideoError, match=r"cannot start from .*truncated; give a picture"):
        read_start(path, WIDTH, HEIGHT, FPS, limit=8)


def test_shrinking_averages_and_does_not_alias(tmp_path):
    """Lines of one pixel, shrunk to an eighth, are gray."""
    lines = np.zeros((8 * HEIGHT, 8 * WIDTH, 3), np.uint8)
    lines[:, ::2] = 255
    Image.fromarray(lines).save(tmp_path / "a.png")
    (frame,) = read_start(tmp_path / "a.png", WIDTH, HEIGHT, FPS, limit=8)
    inner = frame[2:-2, 2:-2].astype(int)
    assert np.abs(inner - 127).max() <= 6


def test_a_video_begins_with_a_picture_where_opencv_is_not_installed(tiny_bundle, tmp_path):
    Image.fromarray(halves()).save(tmp_path / "a.png")
    options = "--bundle", tiny_bundle, "--seconds", 1, "--out", f"{tmp_path}/frames/"
    done = run_without("cv2", "render", PROMPT, *options, "--start", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "frames").iterdir())) == 8
