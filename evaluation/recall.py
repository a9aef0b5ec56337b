"""Recall: does a place look as it did when the subject comes back to it? NumPy; the demo model.

A world is a schedule of visits. The first visit to a place names the place, its ground and its
pattern ("a red star at the harbor over navy stripes"), the return names the place alone ("a red
star at the harbor"). Between the two the subject visits other places, and grounds without a name.
So what a return has to show is in the history and nowhere else: not in the prompt, not in the sink
(the video begins on a ground without a name), not in the recent blocks (`AWAY`). Every visit's
ground differs from the one before, so that a video that stands still scores nothing; a guess among
the other five grounds scores 1/5.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from packforcing.config import Config
from packforcing.prompts import Switch
from packforcing.words import COLORS, GROUNDS, PATTERNS, PLACES, SHAPES, make_prompt

SEED = 20261127  # of all worlds; world i is drawn from (SEED, i)
JUDGED = 48  # worlds that results are of, from 0 on; nothing is trained or tuned on them
VISIT = (3, 4)  # blocks
AWAY = 8  # blocks, at least, between two visits to a place
SHORTEST = 20.0  # seconds of a video, in which two places come back
CHANCE = 1 / (len(GROUNDS) - 1)


class Visit(NamedTuple):
    """A stretch of blocks under one prompt.

    Attributes:
        block: The first of them.
        blocks: How many.
        prompt: What they follow.
        place: The place's name; None where it has none.
        ground: What is to be seen.
        first: Index of the first visit to the place, of a return; None otherwise.
    """

    block: int
    blocks: int
    prompt: str
    place: str | None
    ground: str
    first: int | None


def draw_world(number: int, blocks: int) -> list[Visit]:
    """Draw a world.

    Args:
        number: Which; the same number is the same world.
        blocks: Blocks of the video. All places are shown in its first half, and come back, each
            once, in the second; in a short video they are fewer.

    Returns:
        Visits that fill the video, in order.
    """
    rng = np.random.default_rng([SEED, number])
    color, shape = str(rng.choice(COLORS)), str(rng.choice(SHAPES))
    half = (blocks // 2 - VISIT[1]) * 2 // sum(VISIT)  # visits of each half
    count = min(len(PLACES), half // 2)
    places = [str(name) for name in rng.permutation(PLACES)[:count]]
    grounds = {place: str(rng.choice(GROUNDS)) for place in places}
    patterns = {place: str(rng.choice(PATTERNS)) for place in places}
    nobody: list[str | None] = [None] * (half - count)
    while True:
        order: list[str | None] = [None]
        for _ in range(2):
            order += [[*places, *nobody][i] for i in rng.permutation(half)]
        lengths = [VISIT[1], *(int(n) for n in rng.choice(VISIT, len(order) - 1))]
        starts = np.cumsum([0, *lengths]).tolist()
        visits = list[Visit]()
        for index, (place, start, length) in enumerate(zip(order, starts, lengths)):
            first = order.index(place) if place in order[:index] and place else None
            around = [grounds.get(name or "") for name in order[index + 1 : index + 2]]
            around += [visits[-1].ground] if visits else []
            if place:
                ground, pattern = grounds[place], patterns[place]
            else:
                free = [ground for ground in GROUNDS if ground not in around]
                ground, pattern = str(rng.choice(free)), str(rng.choice(PATTERNS))
            words = {} if first is not None else {"ground": ground, "pattern": pattern}
            prompt = make_prompt(color, shape, **words, place=place)
            visits.append(Visit(start, length, prompt, place, ground, first))
        pairs = itertools.pairwise(visits)
        apart = [v.block - starts[v.first + 1] for v in visits if v.first is not None]
        if all(a.ground != b.ground for a, b in pairs) and min(apart, default=AWAY) >= AWAY:
            break
    visits = [visit for visit in visits if visit.block < blocks]
    last = visits[-1]
    return [*visits[:-1], last._replace(blocks=blocks - last.block)]


def schedule(config: Config, world: Sequence[Visit]) -> list[Switch]:
    """Return the schedule that a video of a world follows; the history is kept throughout."""
    frames = [max(0, _first_frame(config, visit.block)) for visit in world]
    return [
        Switch(frame / config.fps, visit.prompt, "keep" if visit.block else None, block=visit.block)
        for frame, visit in zip(frames, world)
    ]


class Return(NamedTuple):
    """A return to a place.

    Attributes:
        frame: With which it begins.
        share: Of its frames, how many show the right ground.
        scored: Whether most frames of the first visit showed the ground that its prompt named:
            what was never there cannot be recalled.
        retrieved: Whether its first block read a block of the first visit from the archive.
    """

    frame: int
    share: float
    scored: bool
    retrieved: bool


def judge_recall(
    config: Config,
    world: Sequence[Visit],
    grounds: Sequence[str],
    read: Sequence[Collection[int]],
) -> list[Return]:
    """Judge the returns of a video.

    Args:
        config: The model.
        world: The visits that the video follows.
        grounds: What each frame shows, as `demo_judge.read_scene` reads it.
        read: The archived blocks that each block read.
    """
    shares = []
    for visit in world:
        start = max(0, _first_frame(config, visit.block))
        shown = grounds[start : _first_frame(config, visit.block + visit.blocks)]
        shares.append(sum(ground == visit.ground for ground in shown) / max(1, len(shown)))
    returns = []
    for visit, share in zip(world, shares):
        if visit.first is not None:
            before = world[visit.first]
            shown_by = range(before.block, before.block + before.blocks)
            is_read = any(block in read[visit.block] for block in shown_by)
            frame = _first_frame(config, visit.block)
            returns.append(Return(frame, share, shares[visit.first] > 0.5, is_read))
    return returns


def _first_frame(config: Config, block: int) -> int:
    return block * config.block_pixel_frames - config.trimmed_frames
