"""Progress on stderr where there is no terminal: a line every 30 seconds, by a clock of our own."""

from types import SimpleNamespace

import pytest

from packforcing.app.cli.progress import LINE_SECONDS, FileMeters, LineMeter, frame_meter, meter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_line_is_printed_every_thirty_seconds(clock, capsys):
    frames = LineMeter("rendering", "frames", clock)
    for done in range(0, 130, 10):  # five seconds each
        frames.update(done, 1200)
        clock.now += 5
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "rendering: 60 of 1,200 frames, 0:00:30 elapsed, about 0:09:30 left",
        "rendering: 120 of 1,200 frames, 0:01:00 elapsed, about 0:09:00 left",
    ]


def test_a_resumed_task_counts_what_it_did_itself(clock, capsys):
    frames = LineMeter("rendering", "frames", clock)
    clock.now += 7
    frames.update(600, 1200)
    clock.now += LINE_SECONDS
    frames.update(660, 1200)
    line = "rendering: 660 of 1,200 frames, 0:00:37 elapsed, about 0:04:30 left\n"
    assert capsys.readouterr().err == line


def test_recovered_frames_promise_no_speed(clock, capsys, monkeypatch):
    monkeypatch.setattr(LineMeter.__init__, "__defaults__", (clock,))
    with frame_meter() as show_block:
        for frames in range(100, 1100, 100):  # a second for 100 frames, then ten for each
            clock.now += 1 if frames <= 600 else 10
            recovered = frames <= 600
            show_block(SimpleNamespace(frames=frames, frames_total=1600, recovered=recovered))
    line = "rendering: 900 of 1,600 frames, 0:00:36 elapsed, about 0:01:10 left\n"
    assert capsys.readouterr().err == line


def test_without_a_total_no_time_is_left(clock, capsys):
    tensors = LineMeter("importing", "tensors", clock)
    clock.now += LINE_SECONDS
    tensors.update(12)
    assert capsys.readouterr().err == "importing: 12 tensors, 0:00:30 elapsed\n"


def test_a_short_task_prints_nothing(capsys):
    with frame_meter() as show_block:
        show_block(SimpleNamespace(frames=8, frames_total=16, recovered=False))
    assert capsys.readouterr() == ("", "")


def test_a_quiet_task_prints_nothing(capsys):
    with meter("building", "%", quiet=True) as percent:
        percent.update(50, 100)
        percent.write("denoiser: up to date")
    assert capsys.readouterr() == ("", "")


def test_file_meters_take_the_calls_of_a_tqdm(capsys):
    with FileMeters("fetching", quiet=False)(
        total=10, initial=4, desc="a.pt", unit="B", unit_scale=True
    ) as file:
        file.update(3)
        assert file.n == 7
    assert capsys.readouterr() == ("", "")
