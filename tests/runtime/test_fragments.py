"""Fragments: whole from any of them on, and no matter which are missing."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from packforcing.runtime.fragments import FragmentEncoder, join_fragments

WIDTH, HEIGHT, FPS = 96, 64, 12
SIZES = [3, 6, 6, 1, 6]  # frames of each block
FIRST = [0, 3, 9, 15, 16]  # frames before each


def clip(count, first):
    """Make frames whose brightness tells their number, under a texture that moves."""
    texture = np.random.default_rng(0).integers(-12, 13, (HEIGHT, WIDTH, 3))
    frames = [20 + 8 * n + np.roll(texture, n, axis=1) for n in range(first, first + count)]
    return np.stack(frames).astype(np.uint8)


@pytest.fixture(scope="module")
def encoded():
    encoder = FragmentEncoder(WIDTH, HEIGHT, FPS)
    fragments = [encoder.encode(clip(n, k), k) for n, k in zip(SIZES, FIRST)]
    encoder.close()
    return encoder.header, fragments, encoder.mime


def shown(data):
    """Return the frame numbers by time, and those that the pictures show."""
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
        tags = {(frame.colorspace, frame.color_range) for frame in frames}
        assert tags == {(6, 1)}  # smpte170m, tv
        assert all(Fraction(f.duration) * f.time_base == Fraction(1, FPS) for f in frames)
        times = [frame.pts * frame.time_base * FPS for frame in frames]
        pictures = [frame.to_ndarray(format="rgb24").mean() for frame in frames]
    return times, [round((mean - 20) / 8) for mean in pictures]


def numbers(blocks):
    return [FIRST[block] + n for block in blocks for n in range(SIZES[block])]


@pytest.mark.parametrize(
    "blocks",
    [range(5), range(2, 5), [0, 1, 4], [1, 3]],
    ids=["all", "a late viewer", "two lost", "every other"],
)
def test_any_fragments_after_the_header_are_a_video(encoded, blocks):
    header, fragments, _ = encoded
    times, pictures = shown(header + b"".join(fragments[block] for block in blocks))
    assert times == pictures == numbers(blocks)


def test_a_fragment_begins_with_moof_and_the_header_names_the_codec(encoded):
    header, fragments, mime = encoded
    assert header[4:8] == b"ftyp" and b"moof" not in header
    assert all(fragment[4:8] == b"moof" and b"moov" not in fragment for fragment in fragments)
    # high profile without constraints, of the smallest level that fits
    assert mime == 'video/mp4; codecs="avc1.64000a"'


def test_frames_may_be_skipped_between_blocks(encoded):
    """As where blocks come faster than they can be encoded."""
    encoder = FragmentEncoder(WIDTH, HEIGHT, FPS)
    data = encoder.header + encoder.encode(clip(6, 3), 3) + encoder.encode(clip(6, 16), 16)
    times, pictures = shown(data)
    assert times == pictures == numbers([1, 4])


def test_joined_fragments_begin_at_zero_and_play_while_they_load(encoded, tmp_path):
    header, fragments, _ = encoded
    (tmp_path / "recording").write_bytes(header + b"".join(fragments[1:]))
    join_fragments(tmp_path / "recording", tmp_path / "video.mp4")
    data = (tmp_path / "video.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat") and b"moof" not in data
    times, pictures = shown(data)
    assert times == [*range(19)] and pictures == numbers(range(1, 5))
