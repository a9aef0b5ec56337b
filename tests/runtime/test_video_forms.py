"""Forms of outputs: what is in the files, that renders in each resume, and standard output."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from packforcing.errors import ConfigError, OutputError, RenderStopped
from packforcing.runtime.video_files import check_output
from packforcing.runtime.video_forms import output_target
from tests.clips import HEIGHT, WIDTH, flat, write
from tests.helpers import PROMPT, frames_of, render, run, stop_after

COLORS = ((250, 10, 20), (30, 200, 40), (10, 40, 220))


@pytest.mark.parametrize(
    ("name", "container", "codec"),
    [
        ("a.mp4", "mov", "h264"),
        ("A.MP4", "mov", "h264"),
        ("a.Mov", "mov", "h264"),
        ("a.webm", "matroska", "vp9"),
        ("a.GIF", "gif", "gif"),
        ("a.mkv", "matroska", "ffv1"),
    ],
)
def test_a_suffix_names_container_and_codec(tmp_path, name, container, codec):
    frames = flat(*COLORS, repeat=16)
    write(tmp_path / name, frames)
    with av.open(tmp_path / name) as file:
        stream = file.streams.video[0]
        assert container in file.format.name
        assert stream.codec_context.name == codec
        assert abs(float(file.duration or 0) / av.time_base - 3) <= 0.05
        decoded = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
    assert len(decoded) == 48
    assert np.abs(np.stack(decoded).astype(int) - frames).max() <= 6


def test_a_gif_repeats_and_has_the_colors_of_each_frame(tmp_path):
    write(tmp_path / "a.gif", flat(*COLORS, repeat=2))
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["loop"] == 0
        for number in range(6):
            image.seek(number)
            pixel = image.convert("RGB").getpixel((WIDTH // 2, HEIGHT // 2))
            assert np.abs(np.subtract(pixel, COLORS[number // 2])).max() <= 3


@pytest.mark.parametrize("name", ["a.mov", "a.webm", "a.gif"])
def test_a_resumed_render_has_the_same_frames(plain, tmp_path, name):
    alone = render(plain, tmp_path / f"alone-{name}")
    for block in (3, 7):
        with pytest.raises(RenderStopped):
            render(plain, tmp_path / name, resume=True, on_block=stop_after(plain, block))
    resumed = render(plain, tmp_path / name, resume=True)
    assert resumed.frames == alone.frames
    frames = frames_of(tmp_path / name)
    np.testing.assert_array_equal(frames, frames_of(tmp_path / f"alone-{name}"))
    assert len(frames) == alone.frames
    assert {path.name for path in tmp_path.iterdir()} == {name, f"alone-{name}"}


@pytest.mark.parametrize("name", ["a.avi", "a.mp4 ", "a.mp4.", "A.GIF. "])
def test_another_name_is_refused_with_a_right_one(tmp_path, name):
    message = r"\.mp4, \.mkv \(lossless\), \.mov, \.webm, \.gif, a folder|name it '[aA]\.\w+'"
    with pytest.raises(OutputError, match=message):
        check_output(f"{tmp_path}/{name}", 1, WIDTH, HEIGHT)


def test_a_hyphen_in_a_folder_is_a_name(tmp_path):
    form, target = output_target(tmp_path / "-")
    assert (form.codec, target) == ("png", tmp_path / "-")


# Standard output

COMMAND = [sys.executable, "-m", "packforcing.app.cli", "render", PROMPT, "--seconds", "3"]


def test_standard_output_gets_the_video_alone(plain, tiny_bundle, tmp_path):
    command = [*COMMAND, "--bundle", str(tiny_bundle), "--out", "-"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    render(plain, tmp_path / "a.mp4", seconds=3, seed=0, checkpoint_seconds=60)
    with av.open(io.BytesIO(done.stdout)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    np.testing.assert_array_equal(np.stack(frames), frames_of(tmp_path / "a.mp4"))
    assert b"moof" in done.stdout
    assert b"standard output: 24 frames" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_reader_that_leaves_is_one_line(tiny_bundle, tmp_path):
    command = [*COMMAND, "--bundle", str(tiny_bundle), "--out", "-"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        lines = process.stderr.read().decode().splitlines()
    assert process.returncode == 2
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == [lines[-1]] and "Broken pipe" in errors[0]
    assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize("options", [["--json"], ["--resume"]])
def test_standard_output_with_what_it_cannot_do_is_refused(tiny_bundle, options):
    result = run("render", PROMPT, "--bundle", tiny_bundle, "--out", "-", *options)
    assert result.exit_code == 2
    assert options[0] in result.stderr


def test_a_stream_is_not_resumed(plain):
    with pytest.raises(ConfigError, match="cannot be resumed"):
        render(plain, "-", resume=True)


@pytest.mark.parametrize("command", ["demo", "export", "encode-prompt", "import-checkpoint"])
def test_no_other_result_goes_to_standard_output(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(command, "--out", "-")
    assert result.exit_code == 2
    assert "only render writes to standard output" in result.stderr
    assert not Path("-").exists()
