"""Frames that are added and enlarged, against the pictures that they stand for."""

import json

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packforcing.errors import ConfigError, OutputError, RenderStopped, ResumeError
from packforcing.runtime.metadata import read_metadata
from packforcing.runtime.video_filters import VideoFilters
from tests.helpers import PROMPT, frames_of, render, run, stop_after
from tests.helpers import RENDER_SECONDS as SECONDS

TWICE = VideoFilters(scale=2, interpolate=2)


def wave(x, y):
    """A picture that is known at every point, with waves 16 pixels long: uint8 RGB."""
    channels = [np.sin(0.39 * x + c) * np.cos(0.31 * y - c) for c in (0, 1, 2)]
    return np.rint(127.5 + 100 * np.stack(channels, -1)).astype(np.uint8)


def picture(height, width, step=1.0, shift=0.0):
    """Sample the picture; a sample stands for the center of its pixel."""
    y, x = np.meshgrid(*((np.arange(n) + 0.5) * step for n in (height, width)), indexing="ij")
    return wave(x + shift, y)


@pytest.mark.parametrize("factor", [2, 3])
def test_a_scaled_picture_is_the_picture_sampled_more_finely(factor):
    (scaled,) = VideoFilters(scale=factor).apply([picture(48, 64)[None]])
    expected = picture(48 * factor, 64 * factor, 1 / factor)
    edge = 4 * factor  # beyond it the filter knows nothing
    error = np.abs(scaled[0].astype(int) - expected)[edge:-edge, edge:-edge]
    assert error.mean() < 1
    repeated = picture(48, 64).repeat(factor, 0).repeat(factor, 1).astype(int)
    assert error.mean() < np.abs(repeated - expected)[edge:-edge, edge:-edge].mean() / 5


def test_frames_between_two_are_where_things_have_moved_to_meanwhile():
    moving = np.stack([picture(64, 96, shift=2 * time) for time in range(8)])
    out = np.concatenate(list(VideoFilters(interpolate=2).apply([moving])))
    np.testing.assert_array_equal(out[::2], moving)
    np.testing.assert_array_equal(out[-1], moving[-1])
    truth = np.stack([picture(64, 96, shift=2 * time + 1) for time in range(7)]).astype(int)
    inside = np.s_[:, 16:-16, 16:-16]
    error = np.abs(out[1:-1:2] - truth)[inside].mean()
    repeated = np.abs(moving[:-1] - truth)[inside].mean()
    assert error < repeated / 4


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_a_video_lasts_as_long_and_keeps_its_own_frames(scale, interpolate, parts, seed):
    """Whatever the parts that it comes in, and for videos of one frame."""
    filters, rng = VideoFilters(scale, interpolate), np.random.default_rng(seed)
    frames = rng.integers(0, 256, (sum(parts), 32, 48, 3), np.uint8)
    out = list(filters.apply(np.split(frames, np.cumsum(parts)[:-1])))
    assert sum(map(len, out)) == filters.rate(len(frames))
    width, height = filters.size(48, 32)
    assert {part.shape[1:] for part in out} == {(height, width, 3)}
    if scale == 1:
        np.testing.assert_array_equal(np.concatenate(out)[::interpolate], frames)
    again = np.concatenate(list(filters.apply([frames])))
    np.testing.assert_array_equal(np.concatenate(out), again)


def test_no_filters_are_no_work():
    parts = [np.zeros((2, 4, 4, 3), np.uint8)]
    assert next(iter(VideoFilters().apply(parts))) is parts[0]
    assert not VideoFilters() and TWICE and str(VideoFilters()) == ""
    with pytest.raises(ConfigError, match="scale must be from 1 to 4"):
        VideoFilters(scale=5)


@pytest.mark.parametrize("target", ["a.mkv", "a.mp4", "frames/"])
def test_a_filtered_render_resumes_to_the_same_file(plain, truth, tmp_path, target):
    path = tmp_path / target
    for stop in (1, 4, 10):
        with pytest.raises(RenderStopped):
            render(plain, f"{tmp_path}/{target}", filters=TWICE, resume=True,
                   on_block=stop_after(plain, stop))  # fmt: skip
    with pytest.raises(ResumeError, match="filters was 2 times the frames"):
        render(plain, f"{tmp_path}/{target}", resume=True)
    render(plain, f"{tmp_path}/{target}", filters=TWICE, resume=True)
    assert [left.name for left in tmp_path.iterdir()] == [path.name]
    assert read_metadata(path).filters == str(TWICE)
    expected = np.concatenate(list(TWICE.apply([truth])))
    if target == "a.mp4":
        render(plain, tmp_path / "b.mp4", filters=TWICE)
        assert path.read_bytes() == (tmp_path / "b.mp4").read_bytes()
        with av.open(path) as container:
            (stream,) = container.streams
            assert stream.average_rate == 2 * plain.config.fps
            assert (stream.width, stream.height) == (192, 128)
            assert stream.duration * stream.time_base == pytest.approx(SECONDS)
            assert sum(1 for _ in container.decode(video=0)) == len(expected)
    else:
        np.testing.assert_array_equal(frames_of(path), expected)


def test_the_size_that_is_written_is_checked_before_any_work(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "packforcing.runtime.video_files.video_bytes",
        lambda form, frames, width, height: frames * width * height * 10**9,
    )
    with pytest.raises(OutputError, match=r"a video of 240 frames"):
        render(plain, tmp_path / "a.mp4", filters=TWICE)


def test_the_command_says_what_it_writes(tiny_bundle, tmp_path):
    ask = (
        "render",
        PROMPT,
        "--bundle",
        tiny_bundle,
        "--seconds",
        1,
        "--scale",
        2,
        "--interpolate",
        2,
    )
    result = run(*ask, "--out", tmp_path / "a.mp4")
    assert result.exit_code == 0, result.stderr
    assert "written at 192x128, 16 frames/s: 2 times the frames" in result.stdout
    assert len(frames_of(tmp_path / "a.mp4")) == 16
    fields = json.loads(run(*ask, "--out", tmp_path / "b.mkv", "--json").stdout)
    assert (fields["fps"], fields["frames"]) == (16, 8)
    assert "scaled by 2" in run("inspect", tmp_path / "a.mp4").stdout


def test_a_stream_is_filtered_as_it_is_made(plain, tmp_path, monkeypatch):
    """Standard output goes through the same frames."""
    from packforcing.runtime import video_files

    monkeypatch.setattr(video_files, "_standard_output", lambda: (tmp_path / "s.mp4").open("wb"))
    render(plain, "-", seconds=2, filters=TWICE)
    frames = frames_of(tmp_path / "s.mp4")
    assert frames.shape == (2 * 2 * plain.config.fps, 128, 192, 3)
