"""Prompt schedules: when a switch takes effect, what it does to the history, and the published
rules of LongLive's prompt switch and of rolling windows, with numbers worked out by hand."""

import json
import re
import shutil

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import packforcing.prompts
import packforcing.runtime.rollout
from packforcing import MODELS, Policy
from packforcing.app.cli import main
from packforcing.errors import ConfigError, PromptError
from packforcing.model import Model
from packforcing.prompts import Switch, plan_prompts, plan_switches, read_schedule
from packforcing.reference import PastBlock, recompute_recent, rollout, rope_tensors
from packforcing.rope import block_positions, compressed_positions
from packforcing.runtime import Session
from packforcing.runtime.bundle import read_manifest, write_manifest
from packforcing.runtime.device import view
from packforcing.runtime.rollout import Rollout
from packforcing.sampler import draw_noise
from packforcing.transformer import rotate
from packforcing.words import encode_words
from tests.emulated import gpu_session
from tests.helpers import POLICIES, SEED, TINY, assert_follows_reference, frames_of
from tests.helpers import run as run_command

STAR, CIRCLE, SQUARE = "a red star over navy stripes", "a blue circle over sand", "a white square"
EFFECTS = "keep", "recompute", "cut"


@pytest.fixture(scope="module")
def session(tiny_bundle):
    """On an emulated GPU: what is not brought across from the host and back is not there."""
    with Session.open(tiny_bundle) as session:
        yield gpu_session(session)


def video(session, prompt, seconds=9.0, seed=SEED):
    return np.concatenate(list(session.stream(prompt, seconds, seed)))


def history(run):
    """Keys and values in the context, [L, 2, 1, H, tokens, d]."""
    run.device.synchronize()
    return view(run.buffers.context)[..., : run.cache.layout().valid, :].copy()


# When: blocks of TINY are 12 frames, a scene's first 9, at 8 frames a second


@given(
    times=st.lists(st.floats(0.01, 20), max_size=6).map(sorted),
    effects=st.lists(st.sampled_from(EFFECTS), min_size=6, max_size=6),
    frames=st.integers(1, 160),
)
@example(times=[1.125, 2.625], effects=["cut"] * 6, frames=30)
@example(times=[2.5, 2.625], effects=["cut"] * 6, frames=60)  # both due at frame 21
@example(times=[2.5], effects=["cut"] * 6, frames=57)  # a sixth block, for the frames trimmed twice
@example(times=[0.01], effects=["keep"] * 6, frames=60)  # due at frame 0, as the first is
def test_a_switch_takes_effect_with_the_first_block_that_begins_at_or_after_it(
    times, effects, frames
):
    """Against a walk through the video, frame by frame delivered, that takes each switch when it
    is due; where that would skip one or leave one over, the schedule is refused."""
    schedule = [Switch(0, STAR), *map(Switch, times, [CIRCLE] * 6, effects)]
    expected: dict[int, Switch] = {}
    waiting, delivered, block = schedule, 0, 0
    while delivered < frames:
        due = [switch for switch in waiting if round(switch.time * 8) <= delivered]
        if due:
            expected[block], waiting = due[0], waiting[1:]
        if len(due) > 1:
            break
        delivered += 9 if due and (block == 0 or due[0].history == "cut") else 12
        block += 1
    try:
        blocks, switches = plan_switches(schedule, TINY, frames)
    except PromptError:
        assert waiting or sorted(set(times)) != times
    else:
        assert (blocks, switches) == (block, expected) and not waiting


def test_switches_fall_where_longlive_has_them():
    """Published: switches asked for at latent frames 40, 80, 120, 160 and 200 happen at 42, 81,
    120, 162 and 201, the next multiples of three. Latent frame n begins with frame 4 n - 3."""
    config = MODELS["longlive"]
    schedule = [
        Switch(0, STAR),
        *(Switch((4 * n - 3) / 16, CIRCLE) for n in (40, 80, 120, 160, 200)),
    ]
    blocks, switches = plan_switches(schedule, config, frames=957)  # 240 latent frames
    assert [3 * block for block in switches] == [0, 42, 81, 120, 162, 201]
    assert blocks == 80


# What: the published rules


def test_longlives_prompt_switch(tiny_bundle, monkeypatch):
    """Asked for at latent frame 40, in blocks of 3 with a sink of 3 frames and 6 of history.

    It happens with block 14 (frames 42 to 44), which reads frames 0-2 and 36-41. Those of the
    window, blocks 12 and 13, were recomputed before, at t = 0, in order and at their absolute
    positions; 12 has only the sink before it. The sink keeps the old prompt's keys and values.
    """
    steps = [1000.0, 937.5, 2500 / 3, 625.0]  # 1000, 750, 500, 250, shifted by 5
    calls, switched = [], []
    call, switch = Rollout.call_denoiser, Rollout.switch

    def record_call(run, timestep):
        if switched:
            layout = run.cache.layout()
            read = {slot.block: slot.start for slot in layout.slots}
            calls.append((run.cache.committed, timestep, read, layout.start))
        call(run, timestep)

    def record_switch(run, text, effect):
        sink = history(run)[..., : TINY.block_tokens, :]
        switched.append(run.cache.committed)
        switch(run, text, effect)
        np.testing.assert_array_equal(history(run)[..., : TINY.block_tokens, :], sink)

    monkeypatch.setattr(Rollout, "call_denoiser", record_call)
    monkeypatch.setattr(Rollout, "switch", record_switch)
    schedule = [Switch(0, STAR), Switch((4 * 40 - 3) / TINY.fps, CIRCLE, "recompute")]
    frames = 15 * 12 - 3
    with Session.open(tiny_bundle, policy=MODELS["longlive"].policy) as session:
        assert len(video(session, schedule, frames / TINY.fps)) == frames
    assert switched == [14]
    at_14 = {0: 0, 12: 36, 13: 39}
    assert calls == [
        (12, 0, {0: 0}, 36),
        (13, 0, {0: 0, 12: 36}, 39),
        *((14, pytest.approx(timestep), at_14, 42) for timestep in steps),
        (14, 0, at_14, 42),
    ]


# What: each effect, in the reference and the runtime


@pytest.mark.parametrize("positions", ["packed", "absolute"])
@torch.inference_mode()
def test_recompute_is_one_pass_with_a_causal_mask(tiny_model, positions):
    """Blocks 5 and 6 behind a sink block and mids 1, 2 and 4: what is computed block by block is
    what one call over both gives under a block-causal mask, and not what it gives without one,
    as LongLive makes it."""
    policy = Policy(sink=1, mid=3, recent=2, mid_span=2.5, positions=positions)
    config = msgspec.structs.replace(TINY, policy=policy)
    model = Model(config, tiny_model.transformer, tiny_model.autoencoder, tiny_model.compressor)
    torch.manual_seed(0)

    def random_kv(tokens):
        size = 1, config.heads, tokens, config.head_dim
        return [(torch.randn(size), torch.randn(size)) for _ in range(config.layers)]

    n = config.block_tokens
    history = [
        PastBlock(block, random_kv(n), random_kv(config.compressed_tokens),
             clean=torch.randn(1, n, config.token_dim))
        for block in range(7)
    ]  # fmt: skip
    cross = model.transformer.cross_kv(torch.from_numpy(encode_words(CIRCLE, config)))
    before = [*history[0].full], [history[block].compressed for block in (1, 2, 4)]
    starts = {"packed": (0, 3, 5.5, 8, 10.5, 13.5), "absolute": (0, 3, 6, 12, 15, 18)}[positions]
    span = 2.5 if positions == "packed" else 3
    context_rope = rope_tensors(config, np.concatenate([
        block_positions(config, starts[0]),
        *(compressed_positions(config, start, span) for start in starts[1:4]),
    ]))  # fmt: skip
    new_rope = rope_tensors(
        config, np.concatenate([block_positions(config, at) for at in starts[4:]])
    )
    owner = torch.arange(2 * n) // n
    causal = torch.cat((
        torch.ones(2 * n, n + 3 * config.compressed_tokens, dtype=torch.bool),
        owner[:, None] >= owner[None],
    ), 1)  # fmt: skip

    def one_pass(mask):
        layers, layers_seen = iter(range(config.layers)), []

        def attend(q, k, v):
            layer = next(layers)
            old = [before[0][layer], *(block[layer] for block in before[1])]
            old_k, old_v = (torch.cat([kv[i] for kv in old], 2) for i in range(2))
            layers_seen.append((k, v))
            keys = torch.cat((rotate(old_k, context_rope), rotate(k, new_rope)), 2)
            values = torch.cat((old_v, v), 2)
            return F.scaled_dot_product_attention(rotate(q, new_rope), keys, values, mask)

        tokens = torch.cat([history[block].clean for block in (5, 6)], 1)
        times = model.transformer.embed_time(torch.zeros(1, 1))
        model.transformer.run(tokens, None, *times, cross, attend)
        return layers_seen

    masked, unmasked = one_pass(causal), one_pass(None)
    recompute_recent(model, cross, history, [1, 2, 4])
    for layer in range(config.layers):
        for i in range(2):
            cached = torch.cat([history[block].full[layer][i] for block in (5, 6)], 2)
            torch.testing.assert_close(cached, masked[layer][i], atol=1e-5, rtol=0)
    assert not torch.allclose(masked[-1][0], unmasked[-1][0], atol=1e-2)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_scheduled_blocks_equal_the_reference_given_the_same_history(session, tiny_model, policy):
    """Each effect, before and after the context is full, and within a second scene, whose first
    block takes the steps of a first block."""
    config = msgspec.structs.replace(
        TINY, policy=policy or TINY.policy, first_timesteps=(1000, 400)
    )
    model = Model(config, tiny_model.transformer, tiny_model.autoencoder, tiny_model.compressor)
    text = {prompt: encode_words(prompt, config) for prompt in (STAR, CIRCLE, SQUARE)}
    switches = {
        2: (CIRCLE, "recompute"), 4: (STAR, "keep"), 6: (SQUARE, "recompute"), 7: (STAR, "cut"),
        9: (CIRCLE, "recompute"), 13: (SQUARE, "recompute"),
    }  # fmt: skip
    expected = rollout(
        model, torch.from_numpy(text[STAR]), 14,
        lambda block, step: draw_noise(config, SEED, block, step), seed=SEED,
        switches={at: (torch.from_numpy(text[p]), how) for at, (p, how) in switches.items()},
    )  # fmt: skip
    run = Rollout(config, session.backend)
    run.begin(text[STAR], 14, SEED)
    for block in expected:
        if block.index in switches:
            prompt, how = switches[block.index]
            run.switch(text[prompt], how)
        assert_follows_reference(run, [block], 1e-4, 1e-4, 1e-4)


def test_a_scheduled_video_is_the_references(session, tiny_model):
    """From prompts and times to frames: what is trimmed, what is read, and what is told."""
    # begins at frames 0, 9, 21 | 33, 42, 54: the third switch is due at frame 30, a cut at 33
    schedule = [Switch(0, STAR), Switch(1, CIRCLE, "recompute"), Switch(3.75, SQUARE, "cut")]
    star, circle, square = (
        torch.from_numpy(encode_words(prompt, TINY)) for prompt in (STAR, CIRCLE, SQUARE)
    )
    noise = lambda block, step: draw_noise(TINY, SEED, block, step)  # noqa: E731
    switches = {1: (circle, "recompute"), 3: (square, "cut")}
    blocks = list(rollout(tiny_model, star, 6, noise, seed=SEED, switches=switches))
    expected = [block.frames[3 if block.index in (0, 3) else 0 :] for block in blocks]
    expected = torch.cat(expected)[:60].permute(0, 2, 3, 1).numpy()
    infos = []
    frames = np.concatenate(list(session.stream(schedule, 7.5, SEED, on_block=infos.append)))
    assert frames.shape == expected.shape
    assert np.abs(frames / 255 - expected).max() < 0.01
    assert [info.read for info in infos] == [block.read for block in blocks]
    assert {info.index: info.switch for info in infos if info.switch} == {
        0: schedule[0], 1: schedule[1], 3: schedule[2],
    }  # fmt: skip


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    prompts=st.lists(st.tuples(st.sampled_from((STAR, CIRCLE, SQUARE)), st.sampled_from(EFFECTS)),
                     min_size=1, max_size=3),
    seed=st.integers(0, 2**64 - 1),
    data=st.data(),
)  # fmt: skip
def test_any_schedule_is_followed_and_repeats(session, prompts, seed, data):
    """Every block is made with the prompt that the schedule says, and all of it once more."""
    gaps = data.draw(st.lists(st.integers(12, 20), min_size=len(prompts), max_size=len(prompts)))
    times = [frame / TINY.fps for frame in np.cumsum(gaps).tolist()]
    schedule = [Switch(0, STAR), *(Switch(t, *prompt) for t, prompt in zip(times, prompts))]
    frames = sum(gaps) + 20
    timeline = plan_prompts(schedule, TINY, frames)
    stream, parts = session.stream(schedule, frames / TINY.fps, seed), []
    for block, part in enumerate(stream):
        switch = timeline.switches[max(at for at in timeline.switches if at <= block)]
        text = session.rollout.buffers.text.host
        np.testing.assert_array_equal(text, encode_words(switch.prompt, TINY))
        parts.append(part)
    assert block + 1 == timeline.blocks
    made = np.concatenate(parts)
    assert len(made) == frames
    np.testing.assert_array_equal(made, video(session, schedule, frames / TINY.fps, seed))


def test_keeping_all_under_the_same_prompt_changes_nothing(session):
    schedule = [Switch(time, STAR) for time in (0, 2, 5, 7)]
    np.testing.assert_array_equal(video(session, schedule), video(session, STAR))


@pytest.mark.parametrize(
    "policy", [policy for name, policy in POLICIES.items() if name != "last step"]
)
def test_recomputing_under_the_same_prompt_changes_nothing_while_nothing_was_dropped(
    session, policy
):
    """Up to then a recent block has the context it had when it was made, so its keys and values
    come out the same; later ones have lost what stood before them. What its last step committed
    is replaced by what the call at t = 0 yields."""
    config = msgspec.structs.replace(TINY, policy=policy or TINY.policy)
    text = encode_words(STAR, config)
    run = Rollout(config, session.backend)
    run.begin(text, 12, SEED)
    for _ in range(min(12, config.policy.sink + config.policy.recent)):
        run.next_block()
        before = history(run)
        run.switch(text, "recompute")
        np.testing.assert_allclose(history(run), before, atol=1e-5)
    run.switch(encode_words(CIRCLE, config), "recompute")
    changed = np.abs(history(run) - before).max() > 1e-3
    assert changed == (config.policy.recent > 0)


def test_recomputing_leaves_every_mid_where_it_is_read(session):
    """Also where mids take more room than a block: on their way they come to lie on their own."""
    config = msgspec.structs.replace(TINY, policy=Policy(sink=0, mid=40, recent=1))
    assert 40 * config.compressed_tokens > config.block_tokens
    run = Rollout(config, session.backend)
    run.begin(encode_words(STAR, config), 41, SEED)
    rng = np.random.default_rng(0)
    for _ in range(41):
        run.next_block(clean=rng.standard_normal(run.buffers.latents.shape[1:], np.float32))
    run.switch(encode_words(CIRCLE, config), "recompute")
    stored = history(run)
    slots = [slot for slot in run.cache.layout().slots if slot.compressed]
    assert [slot.block for slot in slots] == list(range(40))
    for slot in slots:
        mid = stored[..., slot.first : slot.first + config.compressed_tokens, :]
        np.testing.assert_array_equal(mid, run.archive.get(slot.block))


def test_a_cut_begins_a_video_of_its_own(session, monkeypatch):
    """From the cut on, every byte is that of the new prompt's own video, with noise counted on."""
    schedule = [Switch(0, STAR), Switch(4, CIRCLE, "cut")]
    frames = video(session, schedule, 12)  # the cut is at block 3, frame 33
    monkeypatch.setattr(
        packforcing.runtime.rollout, "draw_noise",
        lambda config, seed, block, step: draw_noise(config, seed, block + 3, step),
    )  # fmt: skip
    np.testing.assert_array_equal(frames[33:], video(session, CIRCLE, (96 - 33) / 8))


# What people get wrong


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ([], "empty: begin it with a prompt at time 0"),
        ([Switch(1, STAR)], "switch 1: .*at time 0, not at 1"),
        ([Switch(0, STAR, "cut")], "switch 1: the first prompt has no history to cut"),
        ([Switch(0, "a red stra")], "switch 1: .*did you mean 'star'"),
        ([Switch(0, np.zeros((2, 7)))], "switch 1: .*float64 .2, 7."),
        ([Switch(0, STAR), Switch(3, STAR, "forget")], "switch 2: .*keep, recompute, cut, not"),
        ([Switch(0, STAR), Switch(-1, STAR)], "-1 s is outside of the video, which ends at 5 s"),
        ([Switch(0, STAR), Switch(float("nan"), STAR)], "switch 2: .*nan s is outside"),
        ([Switch(0, STAR), Switch(1e308, STAR)], r"switch 2: .*1e\+308 s is outside"),
        ([Switch(0, STAR), Switch(5, STAR)], "switch 2: 5 s is outside of the video"),
        ([Switch(0, STAR), Switch(4.9, STAR)], "switch 2: .*between 4.9 s and the end.* at 5 s"),
        ([Switch(0, STAR), Switch(3, STAR), Switch(2, STAR)], "switch 3: .*2 s follows 3 s"),
        ([Switch(0, STAR), Switch(3, STAR), Switch(3.1, STAR)], "switch 3: .*further apart"),
    ],
)  # fmt: skip
def test_a_schedule_that_cannot_be_followed_is_refused_before_any_work(session, switches, message):
    with pytest.raises(PromptError, match=message):
        session.stream(switches, 5)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (7, "a prompt must be words or an embedding, not 7"),
        (None, "a prompt must be words or an embedding, not None"),
        ([STAR], "switch 1: a schedule lists Switch.*, not 'a red star"),
        ([Switch("0", STAR)], "switch 1: a schedule lists"),
        ([Switch(0, 3)], "switch 1: a prompt must be words or an embedding, not 3"),
        ([Switch(0, STAR), Switch(2, None)], "switch 2: a prompt must be words"),
        ([Switch(0, STAR), Switch(2, STAR, ["cut"])], "switch 2: history must be one of"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt, message):
    with pytest.raises(PromptError, match=f"^{message}"):
        plan_prompts(prompt, TINY, 40)


def test_an_embedding_that_changes_later_is_the_one_that_was_given(session):
    rows = encode_words(CIRCLE, TINY)[0]
    schedule = [Switch(0, STAR), Switch(2, rows)]
    expected = video(session, [Switch(0, STAR), Switch(2, CIRCLE)], 4)
    stream = session.stream(schedule, 4, SEED)
    rows[:] = np.nan
    np.testing.assert_array_equal(np.concatenate(list(stream)), expected)


@pytest.fixture
def encoded(monkeypatch):
    """The words that are encoded, in order."""
    words: list[str] = []

    def count(prompt, config):
        words.append(prompt)
        return encode_words(prompt, config)

    monkeypatch.setattr(packforcing.prompts, "encode_words", count)
    return words


def test_every_prompt_is_encoded_once(session, encoded, tiny_bundle, tmp_path):
    schedule = [Switch(0, STAR), Switch(2, CIRCLE, "recompute"), Switch(4, SQUARE, "cut")]
    video(session, schedule, 6)
    assert encoded == [STAR, CIRCLE, SQUARE]
    encoded.clear()
    words = FILE.replace('embedding = "circle.safetensors"', f'prompt = "{CIRCLE}"')
    result = render(tmp_path, words, "--bundle", tiny_bundle, "--seconds", 5)
    assert result.exit_code == 0, result.stderr
    assert encoded == [STAR, CIRCLE]


def test_a_schedule_is_checked_without_encoding(encoded):
    schedule = [Switch(0, "words of another encoder"), Switch(2, CIRCLE), Switch(1, CIRCLE)]
    with pytest.raises(PromptError, match="switch 3: times must rise"):
        plan_switches(schedule, TINY, 40)
    plan_switches(schedule[:2], TINY, 40)
    with pytest.raises(PromptError, match=r"switch 2: .* \[2, 3\]"):
        plan_switches([Switch(0, STAR), Switch(2, np.zeros((2, 3)))], TINY, 40)
    assert not encoded


def test_a_timeline_of_another_video_is_refused(session):
    schedule = [Switch(0, STAR), Switch(2, CIRCLE)]
    timeline = plan_prompts(schedule, TINY, 40)
    np.testing.assert_array_equal(video(session, timeline, 5), video(session, schedule, 5))
    with pytest.raises(PromptError, match="planned for another video"):
        session.stream(timeline, 9)
    wider = msgspec.structs.replace(TINY, text_dim=TINY.text_dim + 1)
    with pytest.raises(PromptError, match="planned for another video"):
        plan_prompts(timeline, wider, 40)


def test_a_cut_within_the_start_is_refused(session):
    start = np.zeros((21, 64, 96, 3), np.uint8)  # two blocks
    schedule = [Switch(0, STAR), Switch(1, CIRCLE, "cut")]
    with pytest.raises(ConfigError, match=r"the cut at 1 s .*start.*2 blocks"):
        session.stream(schedule, 5, start=start)
    schedule[1] = Switch(2, CIRCLE, "cut")
    assert sum(map(len, session.stream(schedule, 5, start=start))) == 40


FILE = """
[[switch]]
time = 0
prompt = "a red star over navy stripes"

[[switch]]
time = 2.5
embedding = "circle.safetensors"
history = "recompute"
"""


def test_a_file_says_the_same_as_a_list(tmp_path):
    circle = encode_words(CIRCLE, TINY)[0]
    save_file({"text": circle}, tmp_path / "circle.safetensors")
    (tmp_path / "plan.toml").write_text(FILE)
    first, second = read_schedule(tmp_path / "plan.toml")
    assert first == Switch(0, STAR)
    assert (second.time, second.history) == (2.5, "recompute")
    np.testing.assert_array_equal(second.prompt.text, circle)


def render(tmp_path, text, *options):
    (tmp_path / "plan.toml").write_text(text, encoding="utf-8")
    args = ["render", "--schedule", tmp_path / "plan.toml", "--out", tmp_path / "a.mp4", *options]
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_the_command_renders_a_schedule_and_says_what_it_did(tiny_bundle, tmp_path):
    options = "--bundle", tiny_bundle, "--seconds", 5
    save_file({"text": encode_words(CIRCLE, TINY)[0]}, tmp_path / "circle.safetensors")
    result = render(tmp_path, FILE, *options)
    assert result.exit_code == 0, result.stderr
    assert "\nfrom 2.6 s (recompute): another embedding\n" in result.stdout
    words = FILE.replace('embedding = "circle.safetensors"', f'prompt = "{CIRCLE}"')
    result = render(tmp_path, words, *options, "--json")
    assert json.loads(result.stdout)["prompts"] == [
        {"block": 0, "seconds": 0, "prompt": STAR, "history": "keep", "over": 1},
        {"block": 2, "seconds": 21 / 8, "prompt": CIRCLE, "history": "recompute", "over": 1},
    ]
    result = render(tmp_path, f"{words}over = 2\n", *options)
    assert f"\nfrom 2.6 s (recompute, over 2 blocks): {CIRCLE}\n" in result.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("time = 2.5", "time = 20"), r"switch 2: 20 s is outside of the video, which ends at 5 s"),
        (("time = 2.5", "time = 0"), r"switch 2: times must rise, but 0 s follows 0 s"),
        (("time = 2.5", ""), r"plan\.toml is not a schedule: .*`time`"),
        (("time = 2.5", "time = '2.5'"), r"not a schedule: Expected `float`, got `str`"),
        (("time = 2.5", "at = 2.5"), r"not a schedule: .*`at`"),
        (("time = 2.5", "time = 2,5"), r"not a schedule: .*line 7"),
        (("recompute", "forget"), r"not a schedule: Invalid enum value 'forget'"),
        (("a red star", "a red stra"), r"switch 1: .*did you mean 'star'"),
        (("circle.saf", "square.saf"), r"cannot read an embedding from .*square\.safetensors"),
        (("embedding", 'prompt = "a star"\nembedding'), r"switch 2 needs either 'prompt' or 'emb"),
        ((FILE, ""), r"not a schedule: .*`switch`"),
        ((FILE, "switch = []"), r"the schedule is empty"),
        ((FILE, "#" * (1 << 20) + "#"), r"not a schedule: it is larger than 1048576 bytes"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(tiny_bundle, tmp_path, change, message):
    save_file({"text": encode_words(CIRCLE, TINY)[0]}, tmp_path / "circle.safetensors")
    result = render(tmp_path, FILE.replace(*change), "--bundle", tiny_bundle, "--seconds", 5)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(rf"error: .*{message}.*\n", result.stderr), result.stderr
    assert not (tmp_path / "a.mp4").exists()


def test_a_file_that_is_not_there_and_two_kinds_of_prompt_are_explained(tiny_bundle, tmp_path):
    result = CliRunner().invoke(main, ["render", "--schedule", "missing.toml", "--out", "a.mp4"])
    assert (
        result.stderr
        == "error: cannot read a schedule from missing.toml: No such file or directory\n"
    )
    result = render(tmp_path, FILE, STAR)
    assert result.stderr == "error: choose one of PROMPT, --embedding and --schedule\n"


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode) | st.sampled_from(range(8)))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(b"a=" + b"[" * 20_000)
@example(b"switch=[{time=" + b"9" * 5000 + b"}]")
@example(b"switch=[{time=1" + b"0" * 400 + b", prompt=''}]")
def test_no_file_ends_in_another_error(tmp_path, text):
    """Any bytes, and the valid file with a part left out."""
    lines = FILE.splitlines(keepends=True)
    if isinstance(text, int):
        text = "".join(lines[:text] + lines[text + 1 :]).encode()
    (tmp_path / "plan.toml").write_bytes(text)
    try:
        plan_prompts(read_schedule(tmp_path / "plan.toml"), TINY, 40)
    except PromptError as error:
        assert str(error)


# What a switch does that does not say it


def test_a_switch_without_a_history_does_what_the_model_was_published_with():
    """LongLive recomputes (its pipeline's `_recache_after_switch`); the others keep."""
    schedule = [Switch(0, STAR), Switch(3, CIRCLE), Switch(5, SQUARE, "keep")]
    longlive = msgspec.structs.replace(TINY, name="longlive")
    for config, expected in ((TINY, "keep"), (longlive, "recompute")):
        timeline = plan_prompts(schedule, config, 60)
        assert [switch.effect for switch in timeline.switches.values()] == [
            "keep", expected, "keep",
        ]  # fmt: skip
        assert plan_prompts(timeline, config, 60) is timeline


def test_longlives_frames_are_recomputed_by_default_and_the_output_says_so(tiny_bundle, tmp_path):
    bundle = tmp_path / "longlive"
    shutil.copytree(tiny_bundle, bundle)
    manifest = read_manifest(bundle)
    config = msgspec.structs.replace(manifest.config, name="longlive")
    write_manifest(bundle, msgspec.structs.replace(manifest, config=config))
    with Session.open(bundle, threads=1) as session:
        default, recomputed, unchanged = (
            video(session, [Switch(0, STAR), Switch(2, CIRCLE, history)], 5)
            for history in (None, "recompute", "keep")
        )
    np.testing.assert_array_equal(default, recomputed)
    assert not np.array_equal(default, unchanged)
    scenes = tmp_path / "scenes.toml"
    scenes.write_text(
        f'[[switch]]\ntime = 0\nprompt = "{STAR}"\n[[switch]]\ntime = 2\nprompt = "{CIRCLE}"\n'
    )
    result = run_command(
        "render", "--schedule", scenes, "--bundle", bundle, "--seconds", 5, "--seed", SEED,
        "--out", tmp_path / "a.mkv",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert f"(recompute): {CIRCLE}" in result.stdout
    assert "a switch without a history: recompute, as longlive was published" in result.stdout
    np.testing.assert_array_equal(frames_of(tmp_path / "a.mkv"), default)
