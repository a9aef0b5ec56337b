"""Configs, policies and presets: what is refused, and what the derived sizes are."""

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from packforcing import Policy
from packforcing.config import WORD_COUNT
from packforcing.errors import ConfigError
from packforcing.presets import MODELS, model_config, policies, trained_timesteps
from packforcing.words import VOCABULARY
from tests.helpers import assert_refused, run

WAN = model_config("wan-1.3b")


def test_the_words_encoder_has_one_channel_per_word():
    assert len(set(VOCABULARY)) == WORD_COUNT
    assert model_config("demo").text_dim == WORD_COUNT
    with pytest.raises(ConfigError, match="text_dim of at least 22"):
        msgspec.structs.replace(model_config("demo"), text_dim=21).__post_init__()


def test_full_history_has_as_many_slots_as_the_video_has_earlier_blocks():
    full = Policy(sink=0, mid=0, recent=1_000_000)
    own = Policy(sink=1, mid=6, recent=2)
    assert full.fit_to_video(50, own).recent == 49
    assert full.fit_to_video(1, own).recent == own.recent
    assert own.fit_to_video(50, own) == own


def test_full_resolution_blocks_are_the_first_and_the_latest():
    policy = Policy(sink=2, mid=4, recent=3)
    for block in range(40):
        sink, recent = policy.full_resolution_blocks(block)
        earlier = list(range(block))
        assert list(sink) == earlier[:2]
        assert list(recent) == earlier[2:][-3:]


def test_fewer_steps_need_weights_that_were_trained_for_them():
    """Causal-Forcing publishes weights of one size for four, two and one step, CausVid for three
    and four; there are none of the demo's size."""
    for model in MODELS.values():
        assert trained_timesteps(model, len(model.timesteps)) == model.timesteps
    for name, count, others in (
        ("causal-forcing-frame", 2, r": causal-forcing-frame-2step \("),
        ("causal-forcing-frame", 1, r": causal-forcing-frame-1step \("),
        ("self-forcing", 3, r": causvid \("),
        ("self-forcing", 2, "no published weights of these sizes"),
        ("demo", 4, "demo takes 8 steps, .* no published weights of these sizes"),
    ):
        with pytest.raises(ConfigError, match=others):
            trained_timesteps(model_config(name), count)


@pytest.mark.parametrize("name", MODELS)
def test_policies_compare_at_equal_memory(name):
    """A window holds as many full blocks as the model's own sink, mid and recent take up."""
    config = model_config(name)
    presets = policies(config)
    room = config.context_tokens
    for window in ("sliding-window", "sink-window"):
        used = msgspec.structs.replace(config, policy=presets[window]).context_tokens
        assert room - config.block_tokens < used <= room
    assert presets["sink-window"].sink == (config.policy.sink or 1)
    if config.policy.mid:
        assert presets["packforcing"] == config.policy


def test_packforcing_keeps_the_papers_frames_whatever_the_block():
    """8 sink and 4 recent frames, rounded up to whole blocks, and 16 compressed blocks."""
    sizes = {
        name: (policy.sink, policy.mid, policy.recent)
        for name in ("longlive", "causal-forcing-frame")
        for policy in [policies(model_config(name))["packforcing"]]
    }
    assert sizes == {"longlive": (3, 16, 2), "causal-forcing-frame": (8, 16, 4)}


def test_the_high_branch_alone_needs_a_compressor():
    policy = Policy(sink=1, mid=4, recent=1, branches="high")
    with pytest.raises(ConfigError, match="no compressor"):
        msgspec.structs.replace(model_config("longlive"), policy=policy).__post_init__()


@pytest.mark.parametrize("change", [
    {"heads": 5}, {"height": 100}, {"block_frames": 0}, {"timesteps": ()},
    {"timesteps": (500, 750)}, {"compressor_widths": (1, 2)}, {"height": 32, "width": 32},
])  # fmt: skip
def test_impossible_configs_are_refused(change):
    with pytest.raises(ConfigError):
        msgspec.structs.replace(WAN, **change).__post_init__()


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((1920, 1080), "1920x1072 or 1920x1088"),
        ((854, 480), "848x480 or 864x480"),
        ((1280, 718), "1280x720 or 1280x704"),
        ((100, 100), "96x96 or 96x112"),
        ((480, 1), "480x64"),  # mid blocks need four tokens each way
        ((1, 1), "64x64"),
    ],
)
def test_an_invalid_size_names_the_nearest_valid_ones(size, nearest):
    with pytest.raises(ConfigError, match=rf"multiples of 16; nearest: {nearest}$"):
        msgspec.structs.replace(model_config("wan-1.3b"), width=size[0], height=size[1])


@given(st.sampled_from(["wan-1.3b", "demo"]), st.integers(1, 3000), st.integers(1, 3000))
def test_nearest_sizes_are_valid_and_none_is_nearer(name, width, height):
    config = model_config(name)
    cell = config.spatial_factor * config.patch
    assume(width % cell or height % cell)
    with pytest.raises(ConfigError) as refusal:
        msgspec.structs.replace(config, width=width, height=height)
    first = str(refusal.value).rpartition("nearest: ")[2].split(" or ")[0]
    sizes = {"width": int(first.split("x")[0]), "height": int(first.split("x")[1])}
    msgspec.structs.replace(config, **sizes)
    for name, side in ("width", width), ("height", height):
        valid = range(4 * cell, side + 8 * cell, cell)
        assert abs(sizes[name] - side) == min(abs(other - side) for other in valid)


@pytest.mark.parametrize("command", [("export", "--random-weights", "--out", "a"), ("plan",)])
def test_every_command_with_a_size_names_them(command):
    result = run(*command, "--model", "wan-1.3b", "--size", "1920x1080")
    assert_refused(result, "multiples of 16", "1920x1072 or 1920x1088")
