"""Videos that are steered while they are made: what was live renders again, frame for frame."""

import asyncio
import ctypes
import logging
import random
import shutil
import threading
import weakref

import msgspec
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packforcing import Policy
from packforcing.embeddings import Embedding
from packforcing.errors import BackendError, ConfigError, PromptError, RenderStopped
from packforcing.prompts import Switch, blend, encode_prompt, read_schedule, write_schedule
from packforcing.runtime import Session
from packforcing.runtime.allocations import archive_bytes, device_bytes
from packforcing.runtime.bundle import read_manifest, write_manifest
from packforcing.runtime.device import HostDevice
from packforcing.runtime.pacing import PlaybackClock
from packforcing.runtime.plan import further_video, make_plan, videos_at_once
from packforcing.runtime.turns import Turns
from packforcing.selection import evict
from tests.emulated import Cuda, gpu_session
from tests.helpers import PROMPT, SEED, TINY, frames_of

WORDS = [PROMPT, "a blue circle over sand", "a white square", "a green star over gray dots"]
RESTARTING = Policy(sink=1, mid=2, recent=1, restart=4, selection="recency")
LIMIT = 8  # archived blocks


def steer(session, switches, blocks, **begin):
    """Make an endless video, switched before the blocks that `switches` names.

    Its last block does not end a rollout. Returns its frames, and the video.
    """
    frames = []
    with session.begin(PROMPT, SEED, lead=None, **begin) as video:
        while video.block < blocks or session.rollout.cache.committed == 1:
            for prompt, history, over in switches.get(video.block, []):
                assert video.switch(prompt, history, over=over) == video.block
            frames.append(next(video).frames)
    return np.concatenate(frames), video


def random_switches(rng, blocks, count):
    switches = {}
    for block in rng.sample(range(blocks), count):
        history = rng.choice(["keep", "recompute", "cut"])
        over = 1 if history == "cut" else rng.choice([1, 1, 2, 5])
        switches.setdefault(block, []).append((rng.choice(WORDS), history, over))
    return switches


# Steered live, recorded, rendered again


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("policy", [None, RESTARTING], ids=["endless", "restarting"])
def test_a_recorded_schedule_gives_the_frames_that_were_steered_live(
    tiny_bundle, tmp_path, policy, seed
):
    """Ten switches each, of every kind; through the file as well."""
    switches = random_switches(random.Random(seed), 22, 10)
    with Session.open(tiny_bundle, policy=policy, threads=1) as session:
        live, video = steer(session, switches, 22, archive_limit=LIMIT)
        write_schedule(tmp_path / "live.toml", video.schedule)
        schedule = read_schedule(tmp_path / "live.toml")
        assert schedule == video.schedule
        assert [switch.block for switch in schedule[1:]] == sorted(set(switches) - {0})
        recorded = session.begin(
            schedule, SEED, seconds=video.seconds, lead=None, archive_limit=LIMIT
        )
        np.testing.assert_array_equal(np.concatenate([b.frames for b in recorded]), live)


def test_a_recorded_schedule_renders_through_an_interruption(tiny_bundle, tmp_path):
    """With a full archive, whose state is part of a checkpoint."""
    switches = random_switches(random.Random(7), 24, 5)
    with Session.open(tiny_bundle, threads=1) as session:
        live, video = steer(session, switches, 24, archive_limit=LIMIT)
        request = video.schedule, video.seconds, tmp_path / "video.mkv", SEED
        settings = {"archive_limit": LIMIT, "checkpoint_seconds": 3, "resume": True}
        for stop in (16, 19):
            with pytest.raises(RenderStopped):
                session.render(
                    *request, **settings,
                    on_block=lambda info, stop=stop: info.index == stop and session.stop(),
                )  # fmt: skip
        summary = session.render(*request, **settings)
    assert 0 < summary.frames_resumed < summary.frames == len(live)
    np.testing.assert_array_equal(frames_of(tmp_path / "video.mkv"), live)


def test_another_archive_limit_is_another_request(tiny_bundle, tmp_path):
    with Session.open(tiny_bundle, threads=1) as session:
        request = PROMPT, 9, tmp_path / "video.mkv", SEED
        with pytest.raises(RenderStopped):
            session.render(*request, archive_limit=LIMIT, on_block=lambda _: session.stop())
        with pytest.raises(Exception, match="archive was 8 blocks, now none"):
            session.render(*request, resume=True)


def test_a_live_cut_lengthens_a_video_that_has_an_end(tiny_bundle):
    """A cut trims the next scene's first block, so that one more block is needed."""
    with Session.open(tiny_bundle, threads=1) as session:
        seconds = 33 / TINY.fps  # three blocks: 9 + 12 + 12 frames
        frames = []
        with session.begin(PROMPT, SEED, seconds=seconds) as video:
            for block in video:
                frames.append(block.frames)
                if block.info.index == 0:
                    video.switch(WORDS[1], "cut")
        assert [len(part) for part in frames] == [9, 9, 12, 3]
        again = session.stream(video.schedule, seconds, SEED)
        np.testing.assert_array_equal(np.concatenate(list(again)), np.concatenate(frames))


def test_a_switch_replaces_what_was_to_follow(tiny_bundle):
    """The last switch before a block counts, and it ends an earlier one's blend where it is."""
    with Session.open(tiny_bundle, threads=1) as session:
        live, video = steer(
            session,
            {0: [(WORDS[1], "cut", 1)], 2: [(WORDS[2], "keep", 9)], 4: [(WORDS[0], "cut", 1),
             (WORDS[3], "keep", 2)]}, 7,
        )  # fmt: skip
        schedule = [
            Switch(0, WORDS[1]),
            Switch(21 / TINY.fps, WORDS[2], over=9),
            Switch(45 / TINY.fps, WORDS[3], over=2),
        ]
        assert [(s.time, s.prompt, s.effect, s.over) for s in video.schedule] == [
            (s.time, s.prompt, s.effect, s.over) for s in schedule
        ]
        again = session.stream(schedule, video.seconds, SEED)
        np.testing.assert_array_equal(np.concatenate(list(again)), live)


def test_switches_that_cannot_be_followed_are_refused(tiny_bundle):
    clip = np.zeros((24, TINY.height, TINY.width, 3), np.uint8)
    with Session.open(tiny_bundle, threads=1) as session:
        with session.begin(PROMPT, SEED, seconds=3, start=clip) as video:
            for arguments, message in (
                (("a fox",), "fox"),
                ((WORDS[1], "forget"), "history must be one of"),
                ((None,), "words or an embedding"),
            ):
                with pytest.raises(PromptError, match=message):
                    video.switch(*arguments)
            for over in (0, 1.5, 10**9):
                with pytest.raises(PromptError, match="over must be"):
                    video.switch(WORDS[1], over=over)
            with pytest.raises(PromptError, match="nothing to blend"):
                video.switch(WORDS[1], "cut", over=2)
            next(video)
            with pytest.raises(PromptError, match="start that the video begins with"):
                video.switch(WORDS[1], "cut")
            list(video)
            with pytest.raises(PromptError, match="has ended"):
                video.switch(WORDS[1])
        with pytest.raises(PromptError, match="block 2 of this model, block 7 was recorded"):
            session.stream([Switch(0, PROMPT), Switch(21 / TINY.fps, PROMPT, block=7)], 6)


def test_a_schedule_file_keeps_embeddings_and_every_word(tmp_path):
    """As TOML may escape them: quotes, control characters, letters beyond 16 bits."""
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    words = 'a "red"\tstar\\ \x7f\x01 \U0001f3ac\nsecond line'
    switches = [
        Switch(0, words),
        Switch(1.1, Embedding(rows, "a star", "umt5", "ab"), "recompute", 3, 7),
        Switch(2.2, rows, "cut", block=9),
    ]
    write_schedule(tmp_path / "s.toml", switches)
    back = read_schedule(tmp_path / "s.toml")
    assert back[0] == switches[0]
    assert back[1].prompt.prompt == "a star" and np.array_equal(back[1].prompt.text, rows)
    assert (back[1].time, back[1].history, back[1].over, back[1].block) == (1.1, "recompute", 3, 7)
    assert np.array_equal(back[2].prompt.text, rows) and back[2].history == "cut"


# Blends


@given(
    st.integers(0, 2**32),
    st.floats(0.01, 0.99),
    st.floats(0.1, 10),
    st.floats(0.1, 10),
)
def test_a_blend_goes_along_the_great_circle_at_constant_speed(seed, share, length, other):
    rng = np.random.default_rng(seed)
    before, after = rng.standard_normal((2, 3, 16)).astype(np.float32)
    before *= length
    after *= other
    between = blend(before, after, share).astype(np.float64)

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    def angle(a, b):
        return np.arccos(np.clip((unit(a) * unit(b)).sum(-1), -1, 1))

    whole = angle(before.astype(np.float64), after)
    np.testing.assert_allclose(angle(before, between), share * whole, atol=1e-3)
    np.testing.assert_allclose(angle(between, after), (1 - share) * whole, atol=1e-3)
    lengths = [np.linalg.norm(rows, axis=-1) for rows in (before, between, after)]
    expected = (1 - share) * lengths[0] + share * lengths[2]
    np.testing.assert_allclose(lengths[1], expected, rtol=1e-4)


def test_a_blend_begins_and_ends_exactly_and_is_straight_where_no_circle_is():
    rows = np.random.default_rng(0).standard_normal((2, 2, 8)).astype(np.float32)
    before, after = rows
    assert np.array_equal(blend(before, after, 0), before)
    assert np.array_equal(blend(before, after, 1), after)
    zeros = np.zeros_like(before)  # the padding behind a shorter prompt
    assert np.array_equal(blend(zeros, zeros, 0.5), zeros)
    np.testing.assert_allclose(blend(zeros, after, 0.25), 0.25 * after, rtol=1e-6)
    np.testing.assert_allclose(blend(before, -before, 0.5), zeros, atol=1e-6)
    np.testing.assert_allclose(blend(before, before, 0.3), before, rtol=1e-6)


def test_a_blend_is_as_many_switches_to_what_lies_between(tiny_bundle):
    embedded = [encode_prompt(words, TINY)[0] for words in WORDS[:2]]
    steps = [blend(*embedded, share / 4) for share in (1, 2, 3)]
    times = [(12 * block - 3) / TINY.fps for block in (3, 4, 5, 6)]
    with Session.open(tiny_bundle, threads=1) as session:
        for history in ("keep", "recompute"):
            blended = [Switch(0, PROMPT), Switch(times[0], WORDS[1], history, over=4)]
            apart = [Switch(0, PROMPT)] + [
                Switch(time, rows, history) for time, rows in zip(times, (*steps, WORDS[1]))
            ]
            videos = [np.concatenate(list(session.stream(s, 12, SEED))) for s in (blended, apart)]
            np.testing.assert_array_equal(*videos)


# Several videos, threads


def test_two_videos_at_once_are_the_videos_alone(session):
    alone = [np.concatenate(list(session.stream(words, 9, SEED))) for words in WORDS[:2]]
    both = zip(*(session.stream(words, 9, SEED) for words in WORDS[:2]))
    for video, frames in zip(alone, zip(*both)):
        np.testing.assert_array_equal(np.concatenate(frames), video)


def test_videos_in_threads_are_the_videos_alone(tiny_bundle):
    with Session.open(tiny_bundle) as first, Session.open(tiny_bundle) as second:
        alone = np.concatenate(list(first.stream(PROMPT, 9, SEED)))
        results = []
        threads = [
            threading.Thread(
                target=lambda s=session: results.append(
                    np.concatenate(list(s.stream(PROMPT, 9, SEED)))
                )
            )
            for session in (first, first, second)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 3
    for frames in results:
        np.testing.assert_array_equal(frames, alone)


def test_turns_come_in_the_order_in_which_they_are_asked_for():
    turns, order, queued = Turns(), [], threading.Semaphore(0)

    def wait_for_turn(name):
        with turns.turn(queued.release):  # called while waiting
            order.append(name)

    threads = [threading.Thread(target=wait_for_turn, args=(name,)) for name in range(4)]
    with turns.turn(lambda: None):
        for thread in threads:
            thread.start()
            queued.acquire()
        assert not order
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3]


def test_who_gives_up_waiting_does_not_hold_the_others():
    turns = Turns()

    def give_up():
        raise RenderStopped("enough")

    with turns.turn(lambda: None):
        thread_errors = []

        def wait():
            try:
                with turns.turn(give_up):
                    raise AssertionError
            except RenderStopped as error:
                thread_errors.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
        assert thread_errors
    with turns.turn(give_up):  # nobody is before us
        pass


def test_the_buffers_of_a_video_that_has_ended_serve_the_next_one(tiny_bundle):
    """Two videos at once take two sets, to the byte, and a third in their place none."""
    cuda = Cuda()
    with Session.open(tiny_bundle, threads=1) as host:
        session = gpu_session(host, cuda)
        before = cuda.used("device")
        buffers = sum(device_bytes(session.config).values())
        first, second = (session.begin(PROMPT, seed, lead=None) for seed in range(2))
        next(first)
        assert cuda.used("device") - before == buffers
        next(second)
        assert cuda.used("device") - before == 2 * buffers
        first.close()
        list(session.stream(PROMPT, 2))
        assert cuda.used("device") - before == 2 * buffers
        config = session.config
        plan = make_plan(config, "sm89")
        assert further_video(plan) == buffers
        for videos in (1, 2, 5):
            budget = plan.total + (videos - 1) * buffers
            assert videos_at_once(plan, budget) == videos
            assert videos_at_once(plan, budget - 1) == videos - 1
        third, fourth = (session.begin(PROMPT, seed, lead=None) for seed in range(2))
        next(third)
        cuda.total = cuda.used("device") + buffers - 1
        with pytest.raises(BackendError, match="the buffers of another video needs"):
            next(fourth)
        next(third)  # is not disturbed


def test_a_dropped_video_gives_its_memory_back(tiny_bundle):
    cuda = Cuda()
    with Session.open(tiny_bundle, threads=1) as host:
        session = gpu_session(host, cuda)
        session.rollout = None
        before = cuda.used("device")
        next(session.begin(PROMPT))
        session.rollout = None
        assert cuda.used("device") == before


# Stopping, pausing, pacing


def test_a_stop_comes_before_the_next_call_and_commits_nothing(session):
    alone = np.concatenate(list(session.stream(PROMPT, 9, SEED)))
    steps = []

    def stop_in_the_middle(step):
        steps.append((step.block, step.step, step.steps))
        if step.block == 4 and step.step == 1:
            video.stop()
            video.seconds_then = session.graph_seconds()

    video = session.begin(PROMPT, SEED, seconds=9, lead=None, on_step=stop_in_the_middle)
    frames = np.concatenate([block.frames for block in video])
    assert video.stopped and video.block == 4
    assert session.graph_seconds() == video.seconds_then  # not a single call more
    assert session.rollout.cache.committed == 4
    np.testing.assert_array_equal(frames, alone[: len(frames)])
    assert len(frames) == 9 + 3 * 12
    count = len(TINY.timesteps)
    assert steps == [(b, s, count) for b in range(4) for s in range(count)] + [
        (4, 0, count), (4, 1, count)
    ]  # fmt: skip
    np.testing.assert_array_equal(np.concatenate(list(session.stream(PROMPT, 9, SEED))), alone)


def test_a_stop_is_seen_at_every_call_of_a_block(tiny_bundle):
    """Recompute, denoise, decode, compress, commit: whichever call is next, it is not made."""
    schedule = [Switch(0, PROMPT), Switch(57 / TINY.fps, WORDS[1], "recompute")]
    with Session.open(tiny_bundle, threads=1) as session:
        calls = count_calls(session, schedule, None)
        assert calls > 10
        for last in range(calls):
            assert count_calls(session, schedule, last) == last


def count_calls(session, schedule, last):
    """Count the calls of block 5; stop in the call number `last`."""
    video = session.begin(schedule, SEED, seconds=9, lead=None)
    for _ in range(5):
        next(video)
    calls, hooks = [0], session.rollout.hooks
    check = hooks.before_call

    def before_call():
        if calls[0] == last:
            video.stop()
        check()
        calls[0] += 1

    hooks.before_call = before_call
    try:
        block = next(video, None)
    finally:
        del hooks.before_call
    assert (block is None) == (last is not None)
    video.close()
    return calls[0]


def test_a_video_that_is_closed_while_a_block_is_made_lends_its_buffers_once(tiny_bundle):
    """Not before the block's last call: they would be another video's meanwhile."""
    with Session.open(tiny_bundle, threads=1) as session:
        alone = np.concatenate(list(session.stream(PROMPT, 4, SEED)))
        meanwhile = []

        def close(step):
            if step.block == 1:
                video.close()
                meanwhile.append(
                    session.lend_rollout(session.config.policy, None)
                )  # what another video would get
                session.return_rollout(meanwhile[0])

        video = session.begin(WORDS[1], SEED, lead=None, on_step=close)
        next(video)
        own = session.rollout
        assert next(video, None) is None and video.block == 1
        assert meanwhile[0] is not own
        np.testing.assert_array_equal(np.concatenate(list(session.stream(PROMPT, 4, SEED))), alone)


def test_stopping_the_session_stops_every_video(tiny_bundle):
    with Session.open(tiny_bundle, threads=1) as session:
        videos = [session.begin(PROMPT, seed, lead=None) for seed in range(3)]
        next(videos[0])
        session.stop()
        assert all(next(video, None) is None and video.stopped for video in videos)
        assert len(list(session.stream(PROMPT, 2))) == 2


def test_a_paused_video_begins_no_block_and_can_be_stopped(tiny_bundle):
    with Session.open(tiny_bundle, threads=1) as session:
        for pause in ("video", "session"):
            video = session.begin(PROMPT, SEED, lead=None)
            next(video)
            (video if pause == "video" else session).pause()
            thread = threading.Thread(target=next, args=(video, None))
            thread.start()
            video.stop()
            thread.join()
            assert video.stopped and video.block == 1
            session.proceed()


def test_closing_the_session_ends_its_videos_with_an_error(tiny_bundle):
    session = Session.open(tiny_bundle, threads=1)
    video = session.begin(PROMPT)
    next(video)
    session.close()
    with pytest.raises(BackendError, match="closed"):
        next(video)
    assert next(video, None) is None


class Clock:
    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


@given(
    st.floats(0.5, 4),
    st.lists(st.tuples(st.integers(1, 16), st.floats(0, 3)), min_size=1, max_size=40),
)
def test_playback_is_never_further_behind_than_the_lead_and_one_block(lead, blocks):
    """Against a viewer that is simulated frame by frame, whatever time the blocks take."""
    now, fps = Clock(), 8.0
    clock = PlaybackClock(fps, lead, now)
    ends, waited = 0.0, 0.0  # when all that is there will have been shown
    for index, (frames, seconds) in enumerate(blocks):
        now.seconds += clock.wait_seconds()
        if index:
            assert ends - now.seconds <= lead + 1e-9
        now.seconds += seconds
        if index and now.seconds > ends:
            waited += now.seconds - ends
        ends = max(ends, now.seconds) + frames / fps
        clock.add(frames)
        assert ends - now.seconds <= lead + frames / fps + 1e-9
        assert clock.behind_seconds == pytest.approx(waited, abs=1e-6)


def test_a_pause_is_not_counted_as_being_behind():
    now = Clock()
    clock = PlaybackClock(8, 1, now)
    clock.add(16)
    assert clock.wait_seconds() == 1
    clock.pause()
    now.seconds += 60
    clock.pause()
    assert clock.wait_seconds() == 0
    clock.proceed()
    clock.proceed()
    assert clock.wait_seconds() == 1
    now.seconds += 3
    assert clock.wait_seconds() == 0
    clock.add(16)
    assert clock.behind_seconds == 1


def test_a_lead_that_is_none_is_refused(session):
    for lead in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match="lead"):
            session.begin(PROMPT, lead=lead)


# asyncio


def test_an_async_loop_gets_the_same_frames(session):
    async def collect():
        video = session.begin(PROMPT, SEED, seconds=6, lead=None)
        return np.concatenate([block.frames async for block in video])

    alone = np.concatenate(list(session.stream(PROMPT, 6, SEED)))
    np.testing.assert_array_equal(asyncio.run(collect()), alone)


def test_cancelling_the_task_stops_the_work(session):
    """When the cancelled task is done, so is the call of the graph that was going on."""

    async def cancelled():
        video = session.begin(PROMPT, SEED, lead=None, on_step=lambda step: reached(step))
        loop, begun = asyncio.get_running_loop(), asyncio.Event()

        def reached(step):
            if step.block == 2:
                loop.call_soon_threadsafe(begun.set)

        async def watch():
            async for _ in video:
                pass

        task = asyncio.create_task(watch())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert video.stopped
        seconds = session.graph_seconds()
        await asyncio.get_running_loop().run_in_executor(None, lambda: None)
        assert session.graph_seconds() == seconds
        assert next(video, None) is None

    asyncio.run(cancelled())


# Endless


@given(st.integers(3, 12), st.integers(1, 60), st.integers(0, 2**32))
def test_a_full_archive_spans_the_whole_past_evenly(limit, extra, seed):
    """What is needed is never given up, the first block stays, and no gap is over four times what
    an even spread would have."""
    rng = random.Random(seed)
    blocks, needed = list(range(limit)), []
    for block in range(limit, limit + extra):
        needed = rng.sample(blocks, rng.randrange(0, min(2, limit - 1)))
        evicted = evict(blocks, needed)
        assert evicted in blocks and evicted not in needed
        blocks.remove(evicted)
        blocks.append(block)
    assert len(blocks) == limit and blocks == sorted(blocks)
    if not needed:
        return
    assert blocks[-1] == limit + extra - 1


def test_an_endless_video_has_a_bounded_archive_and_bounded_positions(tiny_bundle):
    with Session.open(tiny_bundle, threads=1) as session:
        video = session.begin(PROMPT, SEED, lead=None, archive_limit=LIMIT)
        starts = []
        for block in video:
            assert block.info.blocks is None and block.info.frames_total is None
            assert len(session.rollout.archive.rows) <= LIMIT
            assert set(session.rollout.cache.mids) <= set(session.rollout.archive.rows)
            starts.append(session.rollout.cache.layout().start)
            if block.info.index == 60:
                video.stop()
        full = TINY.policy.sink + TINY.policy.recent
        bound = full * TINY.block_frames + TINY.policy.mid * TINY.policy.mid_span
        assert max(starts) == starts[-1] == bound
        assert video.stopped and len(session.rollout.archive.key_values) == LIMIT
        stored = [*session.rollout.archive.rows]
        assert stored[0] == TINY.policy.sink and stored[-1] == 60  # the first and the last


@pytest.mark.full
def test_a_day_of_video_takes_no_more_memory_than_its_first_hour(tiny_bundle, tmp_path):
    """14,400 blocks of six seconds, a switch of every kind each hour. Prints the time per block."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = read_manifest(bundle)
    config = msgspec.structs.replace(manifest.config, fps=2)
    write_manifest(bundle, msgspec.structs.replace(manifest, config=config))
    process, hour = psutil.Process(), 600
    memory, seconds, starts = [], [], set()
    with Session.open(bundle, threads=1) as session:
        video = session.begin(PROMPT, SEED, lead=None, archive_limit=40)
        for block in video:
            seconds.append(block.info.seconds)
            starts.add(session.rollout.cache.layout().start)
            if video.block % hour == 0:
                memory.append(process.memory_info().rss)
                number = video.block // hour
                history, over = [("keep", 5), ("recompute", 1), ("cut", 1)][number % 3]
                video.switch(WORDS[number % 4], history, over=over)
            if video.seconds > 24 * 3600:
                video.stop()
    assert len(memory) == 24 and len(video.schedule) == 25
    assert max(memory) - memory[0] < 4 << 20, [f"{m / 1e6:.1f} MB" for m in memory]
    full = TINY.policy.sink + TINY.policy.recent
    assert max(starts) == full * TINY.block_frames + TINY.policy.mid * TINY.policy.mid_span
    parts = [1e3 * np.median(seconds[first : first + hour]) for first in (hour, 23 * hour)]
    print(f"ms per block: {parts[0]:.2f} in the second hour, {parts[1]:.2f} in the last")


def test_an_endless_video_asks_for_no_more_than_a_small_machine_has(tiny_bundle, monkeypatch):
    monkeypatch.setattr("packforcing.runtime.request.total_memory", lambda: 1 << 30)
    with Session.open(tiny_bundle, threads=1) as session:
        row = archive_bytes(TINY, TINY.policy.sink + 1)
        assert session.begin(PROMPT).request.archive_limit == (1 << 28) // row


def test_a_long_video_keeps_no_embeddings_of_its_past(tiny_bundle, monkeypatch):
    """Nor all steps of a long blend: each takes 8 MB in the full-size model."""
    encoded, blended = [], []

    def keep_track(function, references):
        def tracked(*args):
            result = function(*args)
            references.append(weakref.ref(result))
            return result

        return tracked

    monkeypatch.setattr(
        "packforcing.runtime.video.encode_prompt", keep_track(encode_prompt, encoded)
    )
    monkeypatch.setattr("packforcing.prompts.blend", keep_track(blend, blended))
    with Session.open(tiny_bundle, threads=1) as session:
        video = session.begin(PROMPT, SEED, lead=None)
        for block in video:
            video.switch(WORDS[video.block % 4], "keep", over=1000)
            if block.info.index == 19:
                video.stop()
        assert len(encoded) == 20 and len(blended) > 20
        alive = [array for reference in (*encoded, *blended) if (array := reference()) is not None]
        # the first prompt, which the request has; the one that is followed and the next one, each
        # with what its blend begins from
        assert len({id(array) for array in alive}) <= 5


def test_an_archive_that_is_not_full_changes_nothing(tiny_bundle):
    with Session.open(tiny_bundle, threads=1) as session:
        videos = [
            np.concatenate([
                block.frames
                for block in session.begin(PROMPT, SEED, seconds=18, lead=None, archive_limit=limit)
            ])
            for limit in (None, 13)  # blocks beyond the sink
        ]  # fmt: skip
        np.testing.assert_array_equal(*videos)
        row = archive_bytes(TINY, TINY.policy.sink + 1)
        limit = session.begin(PROMPT, archive_limit=f"{100 * row / 1024:.9f} KiB").request
        assert limit.archive_limit == 100
        for few in (5, f"{5.5 * row / 1000:.3f} kB"):
            with pytest.raises(ConfigError, match="archive_limit must be 6 blocks or more"):
                session.begin(PROMPT, archive_limit=few)


# Frames and latents for other libraries


def test_frames_come_in_the_form_that_is_asked_for(tiny_bundle):
    with Session.open(tiny_bundle, threads=1) as session:
        videos = {
            form: session.begin(PROMPT, SEED, seconds=4, lead=None, frames=form)
            for form in ("uint8", "float32", "device")
        }
        for block in videos["uint8"]:
            floats, device = next(videos["float32"]), next(videos["device"])
            assert floats.frames.dtype == np.float32 and floats.frames.flags.c_contiguous
            np.testing.assert_array_equal(np.rint(floats.frames * 255), block.frames)
            lent = np.from_dlpack(device.frames)
            np.testing.assert_array_equal(lent.transpose(0, 2, 3, 1), floats.frames)
            np.testing.assert_array_equal(block.latents, device.latents)
            assert block.latents.shape == (
                TINY.block_frames,
                TINY.latent_channels,
                *TINY.latent_size,
            )


def test_host_memory_is_lent_without_a_copy():
    """To NumPy and to torch; it lives as long as one of them uses it."""
    array = HostDevice().allocate("test", (3, 4), "float32", host=True)
    array.host[...] = np.arange(12).reshape(3, 4)
    lent, tensor = np.from_dlpack(array), torch.from_dlpack(array.rows(1, 3))
    assert lent.ctypes.data == array.address
    assert tensor.data_ptr() == array.address + 16 and tensor.shape == (2, 4)
    array.host[1, 0] = 99
    assert lent[1, 0] == tensor[0, 0] == 99
    expected = array.host.copy()
    del array
    np.testing.assert_array_equal(lent, expected)
    assert tensor.tolist() == expected[1:].tolist()


class DLTensor(ctypes.Structure):
    """DLPack's DLTensor, from its specification."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("type_bits", ctypes.c_uint8),
        ("type_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def test_gpu_memory_is_lent_without_a_copy(tiny_bundle):
    """The capsule names the GPU's own address, whichever part of a block it is."""
    cuda = Cuda()
    with Session.open(tiny_bundle, threads=1) as host:
        session = gpu_session(host, cuda)
        video = session.begin(PROMPT, SEED, frames="device", lead=None)
        for trimmed in (TINY.trimmed_frames, 0):
            frames = next(video).frames
            copies = sum(entry[0] == "copy" for entry in cuda.log)
            assert frames.__dlpack_device__() == (2, 0)  # kDLCUDA
            capsule = frames.__dlpack__(stream=1)
            get = ctypes.pythonapi.PyCapsule_GetPointer
            get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
            tensor = DLTensor.from_address(get(capsule, b"dltensor"))
            pixels = session.rollout.buffers.pixels
            frame_bytes = 3 * TINY.height * TINY.width * 4
            assert tensor.data == pixels.address + trimmed * frame_bytes
            shape = (TINY.block_pixel_frames - trimmed, 3, TINY.height, TINY.width)
            assert tuple(tensor.shape[: tensor.ndim]) == shape
            strides = (3 * TINY.height * TINY.width, TINY.height * TINY.width, TINY.width, 1)
            assert tuple(tensor.strides[: tensor.ndim]) == strides
            assert (tensor.type_code, tensor.type_bits, tensor.type_lanes) == (2, 32, 1)
            assert (tensor.device_type, tensor.device_id, tensor.byte_offset) == (2, 0, 0)
            assert sum(entry[0] == "copy" for entry in cuda.log) == copies


def test_a_gpu_that_is_not_there_is_named(tiny_bundle):
    from tests.emulated import cuda_device

    with pytest.raises(BackendError, match="no GPU 3: the visible ones are 0 to 0"):
        cuda_device(Cuda(), 3)


# The log


def test_the_log_tells_blocks_switches_and_checkpoints(tiny_bundle, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "packforcing")
    with Session.open(tiny_bundle, threads=1) as session:
        schedule = [Switch(0, PROMPT), Switch(21 / TINY.fps, WORDS[1], "cut")]
        session.render(schedule, 6, tmp_path / "video.mkv", checkpoint_seconds=3)
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert ("INFO", "block 2: switched (cut)") in lines
    assert sum(text.startswith("block 1: ") for level, text in lines if level == "DEBUG") == 1
    assert any(level == "INFO" and text.startswith("checkpoint") for level, text in lines)
    assert not any(PROMPT in text or WORDS[1] in text for _, text in lines)
