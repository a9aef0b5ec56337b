"""What files say about how they were made, read by other programs and by `inspect`."""

from __future__ import annotations

import json

import av
import pytest
from PIL import Image

from packforcing import __version__
from packforcing.errors import VideoError
from packforcing.prompts import Switch
from packforcing.runtime.metadata import read_metadata
from tests.helpers import PROMPT, assert_one_line, render, run

OTHER = "a white circle over sand dots"
SCENES = [Switch(0, PROMPT), Switch(1.5, OTHER, "recompute", over=2)]


def comment_of(path) -> dict:
    """As players and picture viewers read it."""
    if path.is_dir():
        with Image.open(path / "frame_000000.png") as image:
            return json.loads(image.text["Comment"])
    with av.open(path) as file:
        entries = {key.lower(): text for key, text in file.metadata.items()}
    return json.loads(entries["comment"])


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.mkv", "frames"])
def test_a_file_says_how_it_was_made(plain, tiny_bundle, tmp_path, name):
    path = tmp_path / name
    target = f"{path}/" if name == "frames" else path
    render(plain, target, prompt=SCENES, seconds=3, seed=2**63)
    config = plain.config
    comment = comment_of(path)
    switches = [(one["prompt"], one["history"], one["over"]) for one in comment.pop("prompts")]
    assert switches == [(PROMPT, "keep", 1), (OTHER, "recompute", 2)]
    assert comment == {
        "packforcing": __version__,
        "model": config.name,
        "bundle": json.loads((tiny_bundle / "manifest.json").read_bytes())["sha256"],
        "license": "",
        "policy": str(config.policy),
        "denoising": "renoise at 1000 750 500 250, shift 5",
        "seed": 2**63,
        "started": False,
        "filters": "",
    }
    metadata = read_metadata(path)
    assert (metadata.seed, metadata.bundle) == (2**63, comment["bundle"])
    assert [one.prompt for one in metadata.prompts] == [PROMPT, OTHER]
    assert metadata.prompts[1].seconds >= 1.5


def test_inspect_shows_it_unless_it_was_left_out(tiny_bundle, tmp_path):
    command = ("render", "a red star", "--seconds", 0.5, "--out")
    assert run(*command, tmp_path / "a.mp4").exit_code == 0
    shown = json.loads(run("inspect", tmp_path / "a.mp4", "--json").stdout)
    assert [one["prompt"] for one in shown["prompts"]] == ["a red star"]
    text = run("inspect", tmp_path / "a.mp4").stdout
    assert "a red star" in text and shown["bundle"] in text and shown["policy"] in text
    assert shown["license"] == "Apache-2.0" and "Apache-2.0" in text  # the demo model's
    for name, options in (("b.mp4", ["--no-metadata"]), ("c.gif", [])):
        assert run(*command, tmp_path / name, "--bundle", tiny_bundle, *options).exit_code == 0
        result = run("inspect", tmp_path / name)
        assert_one_line(result.exit_code, result.stdout, result.stderr, "does not say how")
        assert b"a red star" not in (tmp_path / name).read_bytes()


def test_a_file_from_elsewhere_commands_no_terminal(plain, tmp_path):
    render(plain, tmp_path / "a.mkv", seconds=1)
    data = (tmp_path / "a.mkv").read_bytes()
    before, after = PROMPT.encode(), rb"\u001b[2J\u009b".ljust(len(PROMPT))
    assert data.count(before) == 1 and len(after) == len(before)
    (tmp_path / "a.mkv").write_bytes(data.replace(before, after))
    result = run("inspect", tmp_path / "a.mkv")
    assert result.exit_code == 0 and "?[2J?" in result.stdout


def test_what_is_no_video_says_nothing(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(VideoError, match="does not say"):
        read_metadata(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match="cannot read"):
        read_metadata(tmp_path / "b.mp4")
