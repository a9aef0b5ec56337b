"""What is measured of videos, against videos whose answers are known."""

import importlib
import itertools
import json
import re
import wave
import weakref
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from packforcing import model_config
from packforcing.app.cli import main
from packforcing.evaluation import demo_judge
from packforcing.evaluation.measures import (
    DEMO_MEASURES,
    MEASURES,
    SEGMENT,
    evaluate_video,
    measure_frames,
)
from packforcing.evaluation.video_reader import SHORT_SIDE
from packforcing.runtime.video_files import open_video

ROOT = Path(__file__).parents[2]
FPS = 16


@pytest.fixture(scope="module")
def world():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples" / "demo_model")
        yield importlib.import_module("world")


def texture(seed=0, size=256):
    """A picture that flow can follow, uint8 [size, size, 3]."""
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 4), None, 30, 225, cv2.NORM_MINMAX)


def pan(steps):
    """The texture seen through a window of 96x96 that has moved right by so many pixels."""
    picture = texture()
    return [
        cv2.getRectSubPix(picture, (96, 96), (80 + float(x), 128)) for x in np.cumsum([0, *steps])
    ]


def values(frames, prompt=None):
    return measure_frames(frames, FPS, prompt).total()


def test_a_still_picture_does_not_change():
    still = values([texture()] * 20)
    assert still.pop("subject_consistency") is None  # nothing moves
    assert still == pytest.approx({
        "background_consistency": 1, "structure_consistency": 1, "colour_drift": 0, "motion": 0,
        "dynamic_degree": 0, "smoothness": 1, "flicker": 0,
    }, abs=1e-3)  # fmt: skip


@pytest.mark.parametrize(("step", "dynamic"), [(0.75, 0), (1.5, 1)])
def test_motion_is_the_speed_of_a_pan(step, dynamic):
    """VBench's threshold, 6 pixels of 256 in an eighth of a second, lies at 1.125 of 96 here."""
    seen = values(pan([step] * 20))
    assert seen["motion"] == pytest.approx(100 * step * FPS / 96, rel=0.1)
    assert seen["dynamic_degree"] == dynamic


def test_flicker_is_what_motion_does_not_explain():
    frames = pan([1.0] * 20)
    lit = [cv2.add(frame, np.full_like(frame, 20 * (i % 2))) for i, frame in enumerate(frames)]
    assert values(frames)["flicker"] < 1.5
    assert values(lit)["flicker"] == pytest.approx(20, rel=0.1)


def test_jerks_are_not_smooth():
    even, jerky = values(pan([1.5] * 24)), values(pan([0, 3] * 12))
    assert 1 - jerky["smoothness"] > 2 * (1 - even["smoothness"])


def test_color_drift_is_a_distance_in_cielab_from_the_first_second():
    gray, bright = np.full((64, 64, 3), 100, np.uint8), np.full((64, 64, 3), 140, np.uint8)

    def lightness(level):  # CIE 1976, of an sRGB gray
        linear = ((level / 255 + 0.055) / 1.055) ** 2.4
        return 116 * linear ** (1 / 3) - 16

    frames = [gray] * int(SEGMENT * FPS) + [bright] * 32
    before, after = (segment.values for segment in measure_frames(frames, FPS).segments())
    assert before["colour_drift"] == pytest.approx(0, abs=1e-3)
    assert after["colour_drift"] == pytest.approx(lightness(140) - lightness(100), rel=0.01)
    assert before["background_consistency"] == pytest.approx(1)
    # all three channels alike before; lightness shares no bin after: two of three, and the last
    # frame before agrees but once
    expected = (2 / 3 + (2 / 3 + 31) / 32) / 2
    assert after["background_consistency"] == pytest.approx(expected, abs=0.01)


def test_structure_is_what_colors_do_not_show():
    """The same pixels upside down, from half of the video on."""
    same, turned = values([texture()] * 48), values([texture()] * 24 + [texture()[::-1]] * 24)
    for name in ("background_consistency", "colour_drift"):
        assert turned[name] == pytest.approx(same[name], abs=1e-3)
    assert same["structure_consistency"] > 0.999 > 0.98 > turned["structure_consistency"]


def test_the_subject_is_what_moves_against_the_camera():
    """A disc crosses a still ground; then its color changes while the ground's does not."""

    def frame(t, color):
        return cv2.circle(texture(size=160), (30 + 2 * t, 80), 24, color, -1, cv2.LINE_AA)

    same = values([frame(t, (240, 40, 40)) for t in range(48)])
    changed = values([frame(t, (240, 40, 40) if t < 24 else (40, 40, 240)) for t in range(48)])
    assert same["subject_consistency"] > changed["subject_consistency"] + 0.05
    assert same["background_consistency"] == pytest.approx(
        changed["background_consistency"], abs=0.01
    )


def test_the_detectors_read_drawn_clips_exactly(world):
    rng = np.random.default_rng(5)
    for _ in range(6):
        clip = world.make_clip(rng, 40)
        seen = values(clip.frames, clip.prompt)
        for name in ("colour", "shape", "colour_and_shape", "ground"):
            assert seen[name] == 1, clip.prompt
        centers = [np.argwhere(mask > 127).mean(0) for mask in clip.masks]
        speed = np.linalg.norm(np.diff(centers, axis=0), axis=1).mean() * FPS / world.SIZE
        assert seen["speed"] == pytest.approx(100 * speed, rel=0.05)
        assert seen["subject_consistency"] > 0.99


@pytest.mark.parametrize("name", demo_judge.SHAPE_OUTLINES)
def test_an_uneven_outline_is_the_shape_it_is_nearest(name):
    """As a model draws them, a disc with dents of a tenth of its radius is a circle, not a star,
    and a star with thick arms is one: wherever it is, and as small as subjects are drawn."""
    rng = np.random.default_rng(3)
    corners = demo_judge.SHAPE_OUTLINES[name]
    sides = zip(corners, np.roll(corners, -1, 0))
    corners = np.concatenate([np.linspace(a, b, 32, endpoint=False) for a, b in sides])
    for _ in range(30):
        dents = np.repeat(rng.uniform(-1, 1, 9), -(-len(corners) // 9))[: len(corners)]
        dents = 1 + 0.1 * cv2.GaussianBlur(dents[None], (0, 0), len(corners) / 40)[0]
        thick = np.maximum(np.hypot(*corners.T), 0.6)  # 0.45 between the arms, as drawn
        outline = corners * (thick / np.hypot(*corners.T) * dents)[:, None]
        frame = np.full((128, 128, 3), demo_judge.GROUND_RGB["gray"][0], np.uint8)
        points = rng.uniform(30, 98, 2) + rng.uniform(22, 28) * outline
        cv2.fillPoly(frame, [np.rint(points).astype(np.int32)], demo_judge.SUBJECT_RGB["red"])
        assert demo_judge.read_scene(frame).shape == name


def test_another_clips_prompt_is_not_what_is_seen(world):
    clip = world.make_clip(np.random.default_rng(1), 20, color="red", shape="star", ground="navy")
    seen = values(clip.frames, "a blue star over plain sand")
    assert (seen["colour"], seen["shape"], seen["colour_and_shape"], seen["ground"]) == (0, 1, 0, 0)


def test_a_tour_returns_to_its_places_and_another_tours_places_differ(world):
    tours = [
        world.make_tour(np.random.default_rng(seed), 200, ground="navy", beyond="sand")
        for seed in range(6)
    ]
    places = [list(demo_judge.visits(tour.prompt, iter(tour.frames))) for tour in tours]
    for tour, visits in zip(tours, places):
        errors = [visit.error for visit in demo_judge.returns(tour.prompt, tour.frames)]
        assert len(errors) == len(visits) - 2
        assert np.mean(errors) < 0.05 and max(errors) < 0.15  # cut short, a visit shows less sky
        widest = (
            demo_judge.ELSEWHERE * world.SIZE**2 / (world.SIZE - world.SKY)
        )  # pixels, of its ground
        for visit in visits:  # the camera stands within a few pixels of the place
            camera = tour.camera[visit.start : visit.stop]
            away = camera if camera.mean() < world.SIZE / 2 else world.SIZE - camera
            assert away.max() <= widest + 1  # the subject hides some
    first = [(visit, np.median(tour.frames[visit.start][0], 0).tolist())
             for tour, visits in zip(tours, places) for visit in visits[:2]]  # fmt: skip
    pairs = [
        (demo_judge.view_error(a, b), sky == other)
        for (a, sky), (b, other) in itertools.combinations(first, 2)
        if a.place == b.place
    ]
    assert len(pairs) == 30 and len(set(same for _, same in pairs)) == 2
    for error, same in pairs:
        assert error == pytest.approx(0 if same else 1, abs=0.05)
    plain = world.make_clip(np.random.default_rng(1), 40)
    assert not list(demo_judge.visits(plain.prompt, plain.frames))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0, 128), min_size=1, max_size=30))
def test_what_came_back_was_in_view_and_then_out_of_it(world, camera):
    seen = [{x for x in range(2 * world.SIZE) if at <= x <= at + world.SIZE - 1} for at in camera]
    for t, columns in enumerate(world.came_back(np.array(camera))):
        back = {
            x
            for u in range(max(t - world.AWAY, 0), t)
            for x in set().union(*seen[:u]) - seen[u]
            if x in seen[t]
        }
        first = int(np.ceil(camera[t]))
        assert {first + c for c in np.flatnonzero(columns)} == back


def test_the_rim_of_a_subject_is_no_landmark():
    """Two places with nothing but a subject, outlined in another ground's color, are none that
    could be known again; one that stood there twice is."""

    def frame(ground, x, landmark):
        picture = np.full((128, 128, 3), demo_judge.GROUND_RGB[ground][0], np.uint8)
        if landmark:
            cv2.circle(picture, (90, 100), 24, demo_judge.GROUND_RGB["maroon"][0], -1)
        cv2.circle(picture, (x, 40), 25, demo_judge.GROUND_RGB["forest"][0], -1)
        cv2.circle(picture, (x, 40), 23, demo_judge.SUBJECT_RGB["red"], -1)
        return picture

    for landmark, error in ((False, 1), (True, 0)):
        video = [frame(ground, 40 + 8 * i, landmark)
                 for i, ground in enumerate(["navy", "sand", "navy", "sand"])
                 for _ in range(8)]  # fmt: skip
        errors = demo_judge.loop_closure("a red circle over plain navy and sand", np.stack(video))
        assert errors == [error, error]


def test_memory_does_not_grow_with_the_video():
    alive = most = 0

    def gone():
        nonlocal alive
        alive -= 1

    def frames():
        nonlocal alive, most
        for picture in pan([0.5] * 100):
            frame = picture.copy()
            weakref.finalize(frame, gone)
            alive += 1
            most = max(most, alive)
            yield frame
            del frame

    measure_frames(frames(), FPS)
    assert most <= 4


# Files


@pytest.fixture(scope="module")
def tour(world, tmp_path_factory):
    """A drawn tour of 21 seconds, and its file."""
    drawn = world.make_tour(np.random.default_rng(3), 21 * FPS)
    path = tmp_path_factory.mktemp("videos") / "tour.mp4"
    with open_video(path, world.SIZE, world.SIZE, FPS) as video:
        video.write(drawn.frames)
    return drawn, path


def run(*args):
    return CliRunner().invoke(main, ["evaluate", *map(str, args)])


def test_a_file_is_measured_by_ten_seconds(tour):
    drawn, path = tour
    progress = []
    evaluation = evaluate_video(
        path, drawn.prompt, lambda done, total: progress.append((done, total))
    )
    assert [(part.start, part.stop) for part in evaluation.segments] == [
        (0, 10),
        (10, 20),
        (20, 21),
    ]
    assert evaluation.frames == len(drawn.frames) and progress[-1] == (2 * evaluation.frames,) * 2
    assert evaluation.values["colour_and_shape"] == 1  # H.264 and all
    assert (
        evaluation.values["ground"] > 0.95
    )  # amid a pan a sky is at times larger than either ground
    errors = [one.error for one in demo_judge.returns(drawn.prompt, drawn.frames)]
    assert (
        evaluation.values["returns"]
        == len(errors)
        == sum(p.values["returns"] for p in evaluation.segments)
    )
    assert evaluation.values["loop_closure"] < 0.02


def test_the_command_prints_a_row_per_segment_or_json(world, tour, tmp_path):
    drawn, path = tour
    short = tmp_path / "short.mkv"
    with open_video(short, world.SIZE, world.SIZE, FPS) as video:
        video.write(drawn.frames[:20])
    text = run(path, short).stdout.splitlines()
    assert [line.split()[0] for line in text[2:6]] == ["0-10", "10-20", "20-21", "all"]
    assert text[6] == "" and text[9].split()[0] == "0-1.25" and len(text) == 10
    printed = json.loads(run(short, "--prompt", drawn.prompt, "--json").stdout)
    (video,) = printed["videos"]
    assert set(video["values"]) == {*MEASURES, *DEMO_MEASURES} <= set(printed["measures"])
    assert video["values"]["loop_closure"] is None and video["values"]["returns"] == 0


def test_mistakes_are_explained_in_one_line(tour, tmp_path):
    _, path = tour
    whole, demo = path.read_bytes(), model_config("demo")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mkv").write_bytes(b"")
    small, odd, two = tmp_path / "small.mkv", tmp_path / "odd.mkv", tmp_path / "two.mkv"
    for file, side, count in ((small, SHORT_SIDE[0] // 2, 9), (odd, 64, 9), (two, 64, 2)):
        with open_video(file, side, side, FPS) as video:
            video.write(np.zeros((count, side, side, 3), np.uint8))
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    for args, message in (
        ((), "Missing argument 'VIDEO...'"),
        ((tmp_path / "none.mp4",), "cannot read .*none.mp4: No such file"),
        ((tmp_path,), "cannot read .*: Is a directory"),
        ((tmp_path / "text.mp4",), "cannot read .*text.mp4: Invalid data"),
        ((tmp_path / "cut.mkv",), "cannot read .*cut.mkv"),
        ((tmp_path / "sound.wav",), "holds no video"),
        ((small,), "too small to measure, 32 pixels"),
        ((two,), "has 2 frames: three are needed"),
        ((tmp_path / "cut.mp4",), "damaged after 2.. frames"),
        ((path, "--prompt", "a fox"), "does not know 'fox'"),
        (
            (odd, "--prompt", "a red star"),
            f"is 64x64 and .* are {demo.width}x{demo.height}",
        ),
    ):
        result = run(*args)
        assert (result.exit_code, result.stdout) == (2, ""), (args, result.output)
        assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
        assert re.search(message, result.stderr), result.stderr
