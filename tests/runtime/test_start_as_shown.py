"""What players do before they show a frame is done to a start: expected colors by construction."""

from __future__ import annotations

import struct
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from packforcing.errors import ConfigError, VideoError
from packforcing.runtime.start_clip import load_start, read_start
from tests.clips import FPS, HEIGHT, WIDTH, noise

RED, GREEN, BLUE, WHITE = (250, 10, 20), (30, 200, 40), (10, 40, 220), (230, 230, 230)


def card(height: int = 64, width: int = 96) -> np.ndarray:
    """Red, green over blue, white: no turn or flip gives the same again."""
    top = np.repeat(np.array([[RED, GREEN]], np.uint8), width // 2, axis=1)
    bottom = np.repeat(np.array([[BLUE, WHITE]], np.uint8), width // 2, axis=1)
    return np.repeat(np.concatenate([top, bottom]), height // 2, axis=0)


def quadrants(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    rows, columns = (height // 4, 3 * height // 4), (width // 4, 3 * width // 4)
    return np.array([[frame[row, column] for column in columns] for row in rows]).astype(int)


def encode(path: Path, frames, codec="libx264", layout="yuv444p", times=None, **fields) -> None:
    """Write frames [H, W, 3 or 4] to a clip; `fields` are of the frame or of the stream."""
    options = {
        "libx264": {"crf": "1", **fields.pop("options", {})},
        "libvpx": {"auto-alt-ref": "0", "crf": "4", "b": "20M"},
        "libvpx-vp9": {"lossless": "1"},
    }
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options.get(codec, {}))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = layout
        stream.codec_context.sample_aspect_ratio = fields.pop("aspect", 1)
        for name in ("colorspace", "color_range", "color_trc", "color_primaries"):
            if name in fields:
                setattr(stream.codec_context, name, fields[name])
        for index, pixels in enumerate(frames):
            name = {np.dtype(np.uint8): "rgba" if pixels.shape[2] == 4 else "rgb24"}
            frame = av.VideoFrame.from_ndarray(pixels, format=name.get(pixels.dtype, "rgb48le"))
            frame = frame.reformat(
                format=layout,
                dst_colorspace=fields.get("matrix"),
                dst_color_range=fields.get("color_range"),
            )
            for attribute in ("colorspace", "color_range", "color_trc", "color_primaries"):
                if attribute in fields:
                    setattr(frame, attribute, fields[attribute])
            frame.pts = index if times is None else times[index]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def turn_track(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Write a matrix into the track header, after ISO/IEC 14496-12: x' = ax + cy, y' = bx + dy."""
    data = bytearray(path.read_bytes())
    one = 1 << 16
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = matrix
    path.write_bytes(data)


MATRICES = [
    (a, b, c, d)
    for a, b, c, d in (
        (1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
        (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, -1, 0), (0, -1, -1, 0),
    )
]  # fmt: skip


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_display_matrix_is_applied(tmp_path, matrix):
    """Each corner of the card lies where the matrix puts it."""
    encode(tmp_path / "a.mp4", [card()] * 2)
    turn_track(tmp_path / "a.mp4", *matrix)
    a, b, c, d = matrix
    size = (WIDTH, HEIGHT) if a else (HEIGHT, WIDTH)
    start = load_start(tmp_path / "a.mp4", *size, FPS, limit=8)
    shown = quadrants(start.frames[0])
    for x, y, color in ((-1, -1, RED), (1, -1, GREEN), (-1, 1, BLUE), (1, 1, WHITE)):
        column, row = (a * x + c * y + 1) // 2, (b * x + d * y + 1) // 2
        assert np.abs(shown[row, column] - color).max() <= 4
    assert start.size == ((96, 64) if a else (64, 96))


def test_a_slanted_display_matrix_is_refused(tmp_path):
    encode(tmp_path / "a.mp4", [card()] * 2)
    turn_track(tmp_path / "a.mp4", 1, 1, -1, 1)
    with pytest.raises(VideoError, match="no multiple of 90 degrees"):
        read_start(tmp_path / "a.mp4", WIDTH, HEIGHT, FPS, limit=8)


def test_pixels_that_are_not_square_are_widened(tmp_path):
    """Shown twice as wide as stored, only the white middle half is in the video's shape."""
    picture = np.full((64, 96, 3), RED, np.uint8)
    picture[:, 24:72] = WHITE
    encode(tmp_path / "a.mp4", [picture] * 2, aspect=2)
    start = load_start(tmp_path / "a.mp4", WIDTH, HEIGHT, FPS, limit=8)
    assert (start.size, start.change) == ((192, 64), "cropped to 96x64")
    assert np.abs(start.frames[0][:, 2:-2].astype(int) - WHITE).max() <= 4


@pytest.mark.parametrize("matrix", [1, 5, 9])
@pytest.mark.parametrize("color_range", [1, 2])
@pytest.mark.parametrize("layout", ["yuv444p", "yuv444p10le"])
def test_matrix_and_range_are_those_of_the_tags(tmp_path, matrix, color_range, layout):
    tags = {"colorspace": matrix, "color_range": color_range, "matrix": matrix}
    encode(tmp_path / "a.mp4", [card()] * 2, layout=layout, **tags)
    start = read_start(tmp_path / "a.mp4", WIDTH, HEIGHT, FPS, limit=8)
    assert np.abs(quadrants(start[0]) - quadrants(card())).max() <= 5


def test_an_untagged_clip_of_high_definition_is_bt709(tmp_path):
    encode(tmp_path / "a.mp4", [card(720, 1280)] * 2, matrix=1, colorspace=2)
    start = read_start(tmp_path / "a.mp4", 128, 72, FPS, limit=8)
    assert np.abs(quadrants(start[0]) - quadrants(card())).max() <= 5


@pytest.mark.parametrize(
    ("name", "codec", "layout"),
    [
        ("a.webm", "libvpx", "yuva420p"),
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.mov", "qtrle", "argb"),
    ],
)
def test_a_transparent_clip_is_shown_over_black(tmp_path, name, codec, layout):
    frame = np.dstack([card(), np.full((64, 96), 255, np.uint8)])
    frame[:32, 48:, 3], frame[32:, 48:, 3] = 128, 0
    encode(tmp_path / name, [frame] * 2, codec, layout)
    start = read_start(tmp_path / name, WIDTH, HEIGHT, FPS, limit=8)
    expected = quadrants(card()) * np.array([[1, 128 / 255], [1, 0]])[..., None]
    assert np.abs(quadrants(start[0]) - expected).max() <= 8


PQ_203, HLG_203 = 0.5807, 0.75  # reference white of 203 cd/m2, as in ITU-R BT.2408


def gray_start(path: Path, level: float, transfer: int) -> np.ndarray:
    frame = np.full((64, 96, 3), round(level * 65535), np.uint16)
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": transfer, "matrix": 9}
    encode(path, [frame] * 2, layout="yuv444p10le", color_range=1, **tags)
    start = load_start(path, WIDTH, HEIGHT, FPS, limit=8)
    assert "BT.2446" in start.notes[0]
    return start.frames[0].reshape(-1, 3).mean(axis=0)


def test_hdr_is_tone_mapped(tmp_path):
    """Black, reference white and the peak of 1000 cd/m2 in both transfers, after BT.2408."""
    path = tmp_path / "a.mp4"
    for pq, hlg, low, high in ((0, 0, 0, 1), (PQ_203, HLG_203, 170, 225), (0.7518, 1, 254, 255)):
        levels = gray_start(path, pq, 16), gray_start(path, hlg, 18)
        assert np.abs(levels[0] - levels[1]).max() <= 2
        assert np.ptp(levels[0]) <= 2
        assert low <= levels[0].mean() <= high


def test_frames_of_uneven_times_are_held_until_the_next(tmp_path):
    frames = [np.full((HEIGHT, WIDTH, 3), 50 * k, np.uint8) for k in range(4)]
    encode(tmp_path / "a.mkv", frames, "ffv1", "bgr0", times=[0, 1, 4, 5])
    start = read_start(tmp_path / "a.mkv", WIDTH, HEIGHT, FPS, limit=100)
    assert [int(frame.mean()) for frame in start] == [0, 50, 50, 50, 100, 150]


def weave(step: int) -> list[np.ndarray]:
    """A white bar that moves so many columns from field to field, two fields to a frame, the lower
    one first."""
    frames = np.zeros((6, 64, 96, 3), np.uint8)
    for time in range(2 * len(frames)):
        left = 8 + step * time
        frames[time // 2, 1 - time % 2 :: 2, left : left + 16] = 255
    return list(frames)


def test_interlaced_frames_have_no_comb(tmp_path):
    """Each shows its first field alone: the bar at one place in all rows. The same frames that are
    said to be progressive keep their comb."""
    for name, options in (("fields", {"x264-params": "bff=1"}), ("frames", {})):
        path = tmp_path / f"{name}.mp4"
        encode(path, weave(4), layout="yuv420p", options=options)
        start = load_start(path, 96, 64, FPS, limit=8)
        assert len(start.frames) == 6
        assert start.notes == (["deinterlaced"] if name == "fields" else [])
        for number, frame in enumerate(start.frames[1:-1], 1):
            rows = frame[16:48, :, 1].astype(int)  # away from the bar's ends
            comb = np.abs(np.diff(rows, axis=0)).max()
            if name == "frames":
                assert comb > 200
            else:
                assert comb < 40
                columns = np.flatnonzero(rows.mean(axis=0) > 127)
                assert columns[0] == pytest.approx(8 + 8 * number, abs=1)
                assert len(columns) == pytest.approx(16, abs=2)


def write_streams(path: Path, *streams: str) -> None:
    """Write a file of silence, a red cover, a blue clip or a green one that is the default."""
    colors = {"cover": RED, "clip": BLUE, "default": GREEN}
    disposition = av.stream.Disposition
    with av.open(path, "w") as container:
        encoders = []
        for name in streams:
            if name == "silence":
                stream = container.add_stream("aac", rate=8000, layout="mono")
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                frame.sample_rate = 8000
            else:
                stream = container.add_stream("mjpeg" if name == "cover" else "libx264", rate=FPS)
                stream.height, stream.width = HEIGHT, WIDTH
                stream.pix_fmt = "yuvj444p" if name == "cover" else "yuv444p"
                kinds = {"cover": disposition.attached_pic, "default": disposition.default}
                stream.disposition = kinds.get(name, disposition(0))
                picture = np.full((HEIGHT, WIDTH, 3), colors[name], np.uint8)
                frame = av.VideoFrame.from_ndarray(picture).reformat(format=stream.pix_fmt)
            frame.pts = 0
            encoders.append((stream, frame))
        for stream, frame in encoders:
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("streams", "expected"),
    [
        (("silence",), "it has no video, only audio"),
        (("silence", "cover"), "it has audio and a cover picture"),
        (("cover", "clip"), BLUE),
        (("clip", "cover", "default"), GREEN),
        (("default", "clip"), GREEN),
    ],
)
def test_of_several_streams_the_one_that_players_show_is_read(tmp_path, streams, expected):
    """A cover of an audio file is no clip, and one beside a clip is not what it begins with."""
    write_streams(tmp_path / "a.mp4", *streams)
    if isinstance(expected, str):
        with pytest.raises(VideoError, match=expected):
            read_start(tmp_path / "a.mp4", WIDTH, HEIGHT, FPS, limit=8)
    else:
        start = read_start(tmp_path / "a.mp4", WIDTH, HEIGHT, FPS, limit=8)
        assert np.abs(quadrants(start[0]) - expected).max() <= 6


def test_a_playlist_is_not_followed(tmp_path):
    encode(tmp_path / "a.mp4", [card()] * 2)
    (tmp_path / "a.m3u8").write_text("#EXTM3U\n#EXTINF:1,\na.mp4\n")
    with pytest.raises(VideoError, match="cannot start from"):
        read_start(tmp_path / "a.m3u8", WIDTH, HEIGHT, FPS, limit=8)


# Pictures


def stored(orientation: int) -> np.ndarray:
    """The card as a camera stores it, after the EXIF standard's table of rows and columns."""
    turned = card() if orientation < 5 else card().swapaxes(0, 1)
    vertical = orientation in (3, 4, 7, 8) if orientation < 5 else orientation in (6, 7)
    horizontal = orientation in (2, 3) if orientation < 5 else orientation in (7, 8)
    return np.ascontiguousarray(turned[:: -1 if vertical else 1, :: -1 if horizontal else 1])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "tiff"])
def test_every_orientation_is_upright(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if suffix == "webp" else {"quality": 100}
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(stored(orientation)).save(path, exif=exif, **options)
    start = read_start(path, WIDTH, HEIGHT, FPS, limit=8)
    assert np.abs(quadrants(start[0]) - quadrants(card())).max() <= 12


def test_a_profile_is_converted_to_srgb(tmp_path):
    """A profile with red and blue exchanged shows blue where the file stores red."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack_from(">I", profile, 128)[0]
    tags = {bytes(profile[132 + 12 * k : 136 + 12 * k]): 132 + 12 * k for k in range(count)}
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    profile[red + 4 : red + 12], profile[blue + 4 : blue + 12] = (
        profile[blue + 4 : blue + 12],
        profile[red + 4 : red + 12],
    )
    Image.fromarray(card()).save(tmp_path / "a.png", icc_profile=bytes(profile))
    start = read_start(tmp_path / "a.png", WIDTH, HEIGHT, FPS, limit=8)
    assert np.abs(quadrants(start[0]) - quadrants(card())[..., ::-1]).max() <= 3


def test_an_srgb_profile_changes_nothing(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = noise(1)[0]
    Image.fromarray(picture).save(tmp_path / "a.png", icc_profile=profile)
    start = read_start(tmp_path / "a.png", WIDTH, HEIGHT, FPS, limit=8)
    np.testing.assert_array_equal(start[0], picture)


def write_coded(path: Path, color: tuple[int, int, int], primaries: int, transfer: int) -> None:
    """Write a PNG whose cICP chunk says what its numbers mean."""
    info = PngImagePlugin.PngInfo()
    info.add(b"cICP", bytes([primaries, transfer, 0, 1]))
    Image.fromarray(np.full((64, 96, 3), color, np.uint8)).save(path, pnginfo=info)


def test_the_colors_that_a_png_codes_are_converted_to_srgb(tmp_path):
    """Display P3 by its matrix to sRGB's primaries, in linear light; sRGB's own stay."""
    color, path = np.array((200, 100, 50)), tmp_path / "a.png"
    signal = color / 255
    linear = np.where(signal > 0.04045, ((signal + 0.055) / 1.055) ** 2.4, signal / 12.92)
    matrix = [[1.22494, -0.22494, 0], [-0.04206, 1.04206, 0], [-0.01964, -0.07864, 1.09828]]
    expected = 255 * (1.055 * (matrix @ linear) ** (1 / 2.4) - 0.055)
    for primaries, levels in ((12, expected), (1, color)):
        write_coded(path, tuple(color), primaries, 13)
        start = read_start(path, WIDTH, HEIGHT, FPS, limit=8)
        assert np.abs(start[0].reshape(-1, 3) - levels).max() <= 2


def test_a_png_in_hdr_is_tone_mapped_as_a_clip_is(tmp_path):
    level = round(PQ_203 * 255)
    write_coded(tmp_path / "a.png", (level, level, level), 9, 16)
    start = load_start(tmp_path / "a.png", WIDTH, HEIGHT, FPS, limit=8)
    assert "BT.2446" in start.notes[0]
    clip = gray_start(tmp_path / "a.mp4", level / 255, 16)
    assert np.abs(start.frames[0].reshape(-1, 3).mean(axis=0) - clip).max() <= 2


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_is_a_clip_with_its_durations(tmp_path, suffix):
    pictures = [Image.fromarray(np.full((32, 48, 3), level, np.uint8)) for level in (0, 255, 0)]
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"a.{suffix}"
    durations = [250, 500, 120]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, **options)
    start = load_start(path, WIDTH, HEIGHT, FPS, limit=100)
    assert [int(frame.mean()) for frame in start.frames] == [0] * 4 + [255] * 8 + [0] * 2
    assert "animation" in start.notes[0]


def test_of_several_pages_the_first_is_shown(tmp_path):
    pages = [Image.fromarray(card()), Image.fromarray(card()[::-1].copy())]
    for name in ("a.tiff", "a.mpo"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        start = load_start(tmp_path / name, WIDTH, HEIGHT, FPS, limit=8)
        assert start.notes == ["the first of 2 pictures in the file"]
        assert np.abs(quadrants(start.frames[0]) - quadrants(card())).max() <= 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC pictures are not read"),
        (b"v/1\x01\x02\0\0\0" + bytes(100), "of no format that is read"),
        (b"#?RADIANCE\n", "of no format that is read"),
    ],
)
def test_what_is_not_read_is_refused(tmp_path, content, message):
    (tmp_path / "a.dat").write_bytes(content)
    with pytest.raises(VideoError, match=message):
        read_start(tmp_path / "a.dat", WIDTH, HEIGHT, FPS, limit=8)


def test_floating_point_is_refused(tmp_path):
    Image.fromarray(np.ones((32, 48), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(VideoError, match="floating point"):
        read_start(tmp_path / "a.tiff", WIDTH, HEIGHT, FPS, limit=8)


# Another aspect


@pytest.mark.parametrize(
    ("fit", "left", "center", "change"),
    [
        ("fill", WHITE, WHITE, "cropped to 96x64"),
        ("fit", (0, 0, 0), WHITE, "bars of 16 rows in all at the top and bottom"),
        ("stretch", RED, WHITE, "stretched by 0.50 in width over height"),
    ],
)
def test_another_aspect_fills_fits_or_stretches(tmp_path, fit, left, center, change):
    """A picture twice as wide as the video: white between red sides."""
    picture = np.full((64, 192, 3), RED, np.uint8)
    picture[:, 48:144] = WHITE
    Image.fromarray(picture).save(tmp_path / "a.png")
    start = load_start(tmp_path / "a.png", WIDTH, HEIGHT, FPS, limit=8, fit=fit)
    corner = start.frames[0][2, 2] if fit != "stretch" else start.frames[0][16, 4]
    assert tuple(corner) == left
    assert tuple(start.frames[0][HEIGHT // 2, WIDTH // 2]) == center
    assert start.change == change


def test_an_unknown_fit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="fill, fit, stretch, not 'crop'"):
        read_start(tmp_path / "a.png", WIDTH, HEIGHT, FPS, limit=8, fit="crop")  # type: ignore[arg-type]
