"""Worlds whose places come back: only the history knows what a return shows; judges are exact."""

import msgspec
import numpy as np
import pytest

from packforcing.evaluation.compare import Comparison
from packforcing.evaluation.demo_judge import read_scene
from packforcing.evaluation.recall import AWAY, JUDGED, SHORTEST, draw_world, judge_recall, schedule
from packforcing.evaluation.video_reader import read_frames
from packforcing.presets import model_config
from packforcing.prompts import plan_switches
from packforcing.words import GROUNDS, PATTERNS
from tests.helpers import assert_refused, run

CONFIG = model_config("demo")
SECONDS = (SHORTEST, 60.0, 120.0)


def blocks_of(seconds):
    return CONFIG.blocks(CONFIG.frames(seconds))


def grounds_of(world, seconds, shown):
    """A ground for every frame of a video, `shown` by each visit."""
    frames = []
    for visit in world:
        stop = (visit.block + visit.blocks) * CONFIG.block_pixel_frames - CONFIG.trimmed_frames
        frames += [shown(visit)] * (stop - len(frames))
    return frames[: CONFIG.frames(seconds)]


@pytest.mark.parametrize("seconds", SECONDS)
def test_only_the_history_knows_what_a_return_shows(seconds):
    for number in range(JUDGED):
        world = draw_world(number, blocks_of(seconds))
        assert world[0].place is None  # so that the sink does not know it
        for visit, before in zip(world[1:], world):
            assert visit.block == before.block + before.blocks and visit.ground != before.ground
            words = set(visit.prompt.split())
            assert (visit.place is None) == ("at" not in words)
            if visit.first is None:
                assert words & set(GROUNDS) == {visit.ground}
            else:
                first = world[visit.first]
                assert (first.place, first.ground, first.first) == (visit.place, visit.ground, None)
                assert not words & {*GROUNDS, *PATTERNS}
                assert visit.block - first.block - first.blocks >= AWAY
        assert world[-1].block + world[-1].blocks == blocks_of(seconds)
        returns = [visit.place for visit in world if visit.first is not None]
        assert len(set(returns)) == len(returns) == {SHORTEST: 2}.get(seconds, 8)


def test_a_world_is_the_same_whenever_it_is_drawn():
    assert draw_world(7, 121) == draw_world(7, 121) != draw_world(8, 121)


def test_a_schedule_switches_at_the_blocks_of_the_world():
    world = draw_world(3, blocks_of(60.0))
    blocks, switches = plan_switches(schedule(CONFIG, world), CONFIG, CONFIG.frames(60.0))
    assert blocks == blocks_of(60.0)
    assert [(at, s.prompt) for at, s in switches.items()] == [(v.block, v.prompt) for v in world]
    assert {switch.effect for switch in switches.values()} == {"keep"}


def test_a_perfect_video_recalls_everything_and_one_that_stands_still_nothing():
    world = draw_world(0, blocks_of(60.0))
    read = [range(max(0, block - 3)) for block in range(blocks_of(60.0))]
    right = judge_recall(CONFIG, world, grounds_of(world, 60.0, lambda v: v.ground), read)
    assert len(right) == 8 and all(v.share == 1 and v.scored and v.retrieved for v in right)

    def standing(visit):
        earlier = [other for other in world[: world.index(visit) + 1] if other.first is None]
        return earlier[-1].ground  # of the last prompt that named one

    still = judge_recall(CONFIG, world, grounds_of(world, 60.0, standing), read)
    after_a_told_one = [
        v.share for v, at in zip(still, [i for i, v in enumerate(world) if v.first is not None])
        if world[at - 1].first is None
    ]  # fmt: skip
    assert len(after_a_told_one) >= 3 and not any(after_a_told_one)


def test_what_was_never_shown_is_not_scored_and_what_was_not_read_not_retrieved():
    world = draw_world(0, blocks_of(60.0))
    other = {ground: GROUNDS[i - 1] for i, ground in enumerate(GROUNDS)}
    places = [visit.place for visit in world if visit.first is not None]
    missing, unread = places[:2]

    def shown(visit):
        return other[visit.ground] if visit.place == missing else visit.ground

    first = next(visit for visit in world if visit.place == unread)
    hidden = range(first.block, first.block + first.blocks)
    read = [
        {b for b in range(max(0, block - 3)) if b not in hidden}
        for block in range(blocks_of(60.0))
    ]  # fmt: skip
    judged = judge_recall(CONFIG, world, grounds_of(world, 60.0, shown), read)
    assert [visit.scored for visit in judged] == [place != missing for place in places]
    assert [visit.retrieved for visit in judged] == [place != unread for place in places]


def compare(folder, *options):
    return run("compare", "--task", "recall", "--out", folder, *options)


def test_compare_measures_the_recall_of_worlds(tmp_path):
    options = ("--policy", "packforcing", "--seconds", 20, "--prompts", 1, "--seed", 1000)
    result = compare(tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert "recall" in result.stdout and "retrieved" in result.stdout
    comparison = msgspec.json.decode((tmp_path / "compare.json").read_bytes(), type=Comparison)
    (pair,) = comparison.pairs
    world = draw_world(1000, blocks_of(20.0))
    assert pair.prompt == world[0].prompt and len(pair.read) == blocks_of(20.0)
    grounds = [read_scene(frame).ground for frame in read_frames(tmp_path / pair.video)]
    judged = judge_recall(CONFIG, world, grounds, pair.read)
    values = pair.evaluation.values
    assert values["revisits"] == len(judged) == 2
    assert values["scored"] == sum(visit.scored for visit in judged)
    assert values["retrieved"] == np.mean([visit.retrieved for visit in judged])
    assert values["recall"] == pytest.approx(np.mean([v.share for v in judged if v.scored]))
    assert (tmp_path / "compare.html").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompts", "worlds.txt"), "draws its own prompts"),
        (("--seconds", 19), "20 s or more"),
        (("--bundle", "tiny"), "with the demo model alone; this is tiny"),
    ],
)
def test_recall_of_what_has_none_is_refused_in_one_line(tiny_bundle, tmp_path, options, message):
    options = [tiny_bundle if option == "tiny" else option for option in options]
    result = compare(tmp_path / "out", *options)
    assert_refused(result, message)
    assert not (tmp_path / "out").exists()
