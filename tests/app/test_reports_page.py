"""Pages from templates: escaping, pictures, what a block read."""

import base64
import io
import re
from pathlib import Path

import av
import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from packforcing.app.reports import page
from packforcing.app.reports.page import picture_url, read_paths, sample_frames, save_page
from packforcing.config import Policy
from packforcing.errors import OutputError


@pytest.fixture
def video(tmp_path) -> Path:
    """Nine lossless frames of 40 by 20 pixels, each of one gray, 25 levels apart."""
    path = tmp_path / "a.mkv"
    with av.open(path, "w") as container:
        stream = container.add_stream("ffv1", rate=8, width=40, height=20, pix_fmt="bgr0")
        for number in range(9):
            pixels = np.full((20, 40, 3), 25 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_every_value_is_escaped(tmp_path):
    save_page(
        tmp_path / "verify.html", "verify.html.j2", model="<script>", verdict="&", low=-4, high=2,
        about={"<b>": "<i>"}, graphs={"<u>": {"good": '"', "bad": ""}}, tolerances="<s>",
        checks=[],
    )  # fmt: skip
    text = (tmp_path / "verify.html").read_text()
    assert not re.search(r"<script>|<b>|<i>|<u>|<s>", text)
    assert "&lt;script&gt;: &amp;" in text and "&lt;i&gt;" in text


def test_a_missing_value_is_an_error_and_no_page(tmp_path):
    with pytest.raises(UndefinedError):
        save_page(tmp_path / "demo.html", "demo.html.j2", prompt="a red star")
    assert not any(tmp_path.iterdir())


def test_a_page_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "base.html").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*base\.html"):
        save_page(tmp_path / "base.html", "base.html.j2")
    assert [path.name for path in tmp_path.iterdir()] == ["base.html"]


def test_pages_load_nothing_from_elsewhere():
    """A model card is no page: it links to what it names."""
    templates = Path(page.__file__).parent / "templates"
    parts = [path for path in templates.iterdir() if not path.name.endswith(".md.j2")]
    assert len(parts) >= 8  # pages, what they share, their style and their script
    for template in parts:
        text = template.read_text(encoding="utf-8")
        assert not re.search(r"https?:|<script |<link|@import|url\(|\bfetch\b", text), template.name


def test_samples_include_first_and_last_frame_and_are_made_smaller(video):
    samples = list(sample_frames(video, frames=9, samples=3, width=10))
    assert [index for index, _ in samples] == [0, 4, 8]
    for index, picture in samples:
        assert picture.size == (10, 5)
        assert np.abs(np.asarray(picture, np.int16) - 25 * index).max() <= 1
    assert next(sample_frames(video, 9, 3, width=80))[1].size == (40, 20)  # never larger


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_a_picture_url_holds_the_picture(kind):
    picture = Image.fromarray(np.full((6, 8, 3), (200, 30, 90), np.uint8))
    head, _, data = picture_url(picture, kind).partition(",")
    decoded = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == f"data:image/{kind};base64" and decoded.format == kind.upper()
    assert np.abs(np.asarray(decoded, np.int16) - np.asarray(picture, np.int16)).max() <= 3


def test_each_block_reads_sink_mid_and_recent():
    """One sink and two recent blocks: block 5 reads 0, 3 and 4, and the archived block 1."""
    policy = Policy(sink=1, mid=1, recent=2)
    paths = read_paths([[], [], [], [], [1], [1]], policy)
    squares = {name: re.findall(r"M(\d+) (\d+)", path) for name, path in paths.items()}
    assert ("5", "0") in squares["sink"] and squares["mid"] == [("4", "1"), ("5", "1")]
    assert [old for block, old in squares["recent"] if block == "5"] == ["3", "4"]


def test_blocks_after_a_resume_keep_their_numbers():
    policy = Policy(sink=1, mid=1, recent=2)
    whole = read_paths([[], [], [], [], [1], [2]], policy)
    resumed = read_paths([[1], [2]], policy, first_block=4)
    assert resumed["mid"] == whole["mid"]
    assert whole["recent"].endswith(resumed["recent"]) and "M3 " not in resumed["recent"]
