"""The page about a render, also of one that was resumed."""

import html
import re

import pytest

from packforcing.app.reports.demo import write_report
from packforcing.runtime import BlockInfo, RenderSummary
from packforcing.runtime.allocations import memory_by_purpose
from tests.helpers import PROMPT, run


@pytest.fixture(scope="module")
def folder(tiny_bundle, tmp_path_factory):
    """A folder with a video of 16 frames in 4 blocks."""
    folder = tmp_path_factory.mktemp("report")
    assert run("render", PROMPT, "--bundle", tiny_bundle, "--out", folder / "a b.mp4",
               "--seconds", 2).exit_code == 0  # fmt: skip
    return folder


@pytest.fixture
def report(folder, tiny_config):
    """Write the video's page, as if its first `frames_resumed` frames came from before."""

    def write(blocks: list[float], frames_resumed: int, recovered: int = 0) -> str:
        summary = RenderSummary(
            frames=16, blocks=4, frames_resumed=frames_resumed, frames_recovered=4 * recovered,
            seconds_total=0.8 + recovered, seconds_recovered=recovered,
            seconds_graphs={"denoiser": 0.5}, seconds_video=0.1, archive_bytes=3 << 20, prompts=[],
        )  # fmt: skip
        infos = [
            BlockInfo(
                index=4 - len(blocks) + number, blocks=4, frames=0, frames_total=16, read=[],
                seconds=seconds, switch=None, recovered=number < recovered,
            )
            for number, seconds in enumerate(blocks)
        ]  # fmt: skip
        write_report(
            folder / "demo.html", folder / "a b.mp4", PROMPT, 0, tiny_config, infos, summary,
            memory_by_purpose(tiny_config), {"torch": "2"},
        )  # fmt: skip
        return html.unescape((folder / "demo.html").read_text(encoding="utf-8"))

    return write


def test_speed_and_shares_are_of_the_whole_render(report):
    text = report([0.1, 0.2, 0.2, 0.3], frames_resumed=0)
    assert "0.8 s, 2.5 times real time" in text  # 2 s of video
    assert "median 200 ms, longest 300 ms" in text and "Resumed" not in text
    assert "<td>0.50 s</td><td>125.0 ms</td><td>62%</td>" in text
    assert 'src="a%20b.mp4"' in text and "3,072 KiB" in text
    (video,) = re.findall(r"<video([^>]*)>", text)
    assert {"controls", "loop", "muted", "playsinline"} <= set(video.split())
    assert 'poster="data:image/png' in video and 'width="' in video


def test_times_have_a_scale_and_real_time_has_a_line(report):
    """Blocks of 1.5 s: the highest bar, of 2 s, ends a sixth below the top, 2.4 s."""
    text = report([0.1, 0.2, 2.0, 0.3], frames_resumed=0)
    marks = re.findall(r'<i class="(\w+)" style="\w+: ([\d.]+)%">([^<]*)', text)
    by_axis = {
        axis: {label: float(share) for kind, share, label in marks if kind == axis}
        for axis in ("down", "across")
    }
    times = {"0": 0, "500": 20.833, "1,000": 41.667, "1,500": 62.5, "2,000 ms": 83.333}
    assert by_axis["down"] == times
    assert by_axis["across"] == {"block 0": 10, "1": 35, "2": 60, "3": 85}  # below their bars
    assert '<b style="bottom: 62.500%">real time, 1,500 ms' in text
    assert "h20.000v-16.667" in text  # the highest bar, of 20


def test_after_a_resume_speed_is_of_the_frames_rendered_since(report):
    text = report([0.2, 0.4], frames_resumed=8)
    assert "after 8 frames; times are of the remaining 1.0 s" in text
    assert "0.8 s, 1.2 times real time" in text and "median 300 ms" in text
    assert "<td>0.50 s</td><td>250.0 ms</td><td>62%</td>" in text
    numbers = {int(block) for block in re.findall(r"M(\d+) \d+h\.9", text)}
    assert numbers == {2, 3}


def test_recovered_blocks_have_no_times(report):
    """An interrupted run generated block 1; this one decoded it again, which took 10 ms."""
    text = report([0.01, 0.2, 0.4], frames_resumed=4, recovered=1)
    assert "after 8 frames; times are of the remaining 1.0 s" in text
    assert "0.8 s, 1.2 times real time" in text and "median 300 ms" in text
    assert "<td>0.50 s</td><td>250.0 ms</td><td>62%</td>" in text
    bars = re.search(r'<path class="mid" d="(M[^"]* 20h[^"]*)"', text)
    assert bars is not None
    assert re.findall(r"M([\d.]+) 20h", bars[1]) == ["50.000", "75.000"]  # blocks 2 and 3 of 4
    assert "Blocks before 2 have no bar" in text and "Blocks before 1 are not drawn" in text
    assert {int(block) for block in re.findall(r"M(\d+) \d+h\.9", text)} == {1, 2, 3}


def test_a_video_that_was_finished_before_has_a_page_without_times(report):
    text = report([], frames_resumed=16)
    assert "after 16 frames" in text and "real time" not in text
    assert "Time per block" not in text and "Time by graph" not in text
    assert text.count("<figure>") == 12


def test_the_video_plays_on_a_phone(report, folder, open_on_phone):
    report([0.1, 0.2, 2.0, 0.3], frames_resumed=0)
    page = open_on_phone(folder / "demo.html")
    assert page.evaluate("document.querySelector('video').play().then(() => true)")
    page.wait_for_function("document.querySelector('video').currentTime > 0.5")
    widths = page.evaluate("[...document.querySelectorAll('.pictures img')].map((p) => p.width)")
    assert len(widths) == 12 and min(widths) > 150
