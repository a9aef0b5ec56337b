"""Positions, schedule, noise and selection: formulas against independent ones."""

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packforcing import MODELS, Policy, model_config, transformer
from packforcing.errors import ConfigError, PromptError
from packforcing.presets import policies
from packforcing.rope import axis_pairs, block_positions, compressed_positions, rope_table
from packforcing.sampler import advance, denoising_steps, draw_noise
from packforcing.selection import affinity, select
from packforcing.words import VOCABULARY, encode_words

WAN = model_config("wan-1.3b")


def rotate(keys: np.ndarray, positions: np.ndarray, dtype=np.float64) -> np.ndarray:
    """Keys [n, d] rotated to positions [n, 3] by the model's own rotation, rounded to `dtype`."""
    tables = [torch.from_numpy(table).double() for table in rope_table(positions, keys.shape[-1])]
    rotated = transformer.rotate(torch.from_numpy(keys).double()[None, None], tuple(tables))
    return rotated[0, 0].numpy().astype(dtype)


def test_rope_splits_a_head_as_wan_does():
    assert axis_pairs(128) == (22, 21, 21)


def test_rope_equals_complex_exponentials():
    positions = np.random.default_rng(0).uniform(0, 100, (50, 3))
    pairs = axis_pairs(32)
    expected = np.concatenate(
        [
            np.exp(1j * positions[:, [axis]] * 10000.0 ** (-np.arange(n) / n))
            for axis, n in enumerate(pairs)
        ],
        axis=1,
    )
    cos, sin = rope_table(positions, 32)
    np.testing.assert_allclose(cos + 1j * sin, expected, atol=1e-7)


def test_rotation_composes_and_stored_rotations_drift():
    """The paper's incremental rotation equals rotating when read; in fp16 it drifts.

    After 500 shifts by a block the worst error, as a share of the largest key, is below 1e-4 in
    float64 (the tables are float32), but 0.08 in half precision, where a key stored before RoPE
    and rotated once keeps 5e-4. That is why keys are stored before RoPE.
    """
    rng = np.random.default_rng(0)
    keys, positions = rng.standard_normal((64, 128)), rng.integers(0, 30, (64, 3)).astype(float)
    shift = np.tile([4.0, 0, 0], (64, 1))
    target = rotate(keys, positions + 500 * shift)
    exact, half = rotate(keys, positions), rotate(keys, positions, np.float16)
    for _ in range(500):
        exact, half = rotate(exact, shift), rotate(half, shift, np.float16)
    scale = np.abs(target).max()
    assert np.abs(exact - target).max() / scale < 1e-4
    read = rotate(keys.astype(np.float16), positions + 500 * shift)
    drift, once = (np.abs(x - target).max() / scale for x in (half, read))
    assert once < 5e-4 < 0.02 < drift < 0.2


def test_spatial_channels_ignore_time():
    keys = np.random.default_rng(0).standard_normal((1, 128))
    moved = rotate(keys, np.array([[7.0, 0, 0]]))
    np.testing.assert_array_equal(moved[:, 44:], keys[:, 44:])
    assert (moved[:, :44] != keys[:, :44]).any()


def test_compressed_tokens_sit_at_the_centre_of_their_cells():
    at = compressed_positions(WAN, 8.0, 4.0).reshape(2, 7, 13, 3)
    assert at[0, 0, 0].tolist() == [8.5, 1.5, 1.5]
    assert at[1, 6, 12].tolist() == [10.5, 25.5, 49.5]
    full = block_positions(WAN, 8.0).reshape(4, 30, 52, 3)
    np.testing.assert_allclose(full[2:4, 4:8, 8:12].mean((0, 1, 2)), at[1, 1, 2])


def test_mid_span_scales_time_alone():
    at = compressed_positions(WAN, 0.0, 2.0).reshape(2, -1, 3)
    assert set(at[0, :, 0]) == {0.0} and set(at[1, :, 0]) == {1.0}


def test_odd_block_centres_stop_at_its_last_frame():
    three = msgspec.structs.replace(WAN, block_frames=3)
    assert sorted(set(compressed_positions(three, 0.0, 3.0)[:, 0])) == [0.5, 2.0]


def test_denoising_steps_are_self_forcings():
    timesteps, now, then = zip(*denoising_steps(WAN, 0))
    assert np.allclose(timesteps, [1000, 937.5, 1000 * 5 / 6, 625])
    assert np.allclose(now, [1, 0.9375, 5 / 6, 0.625]) and np.allclose(then[:-1], now[1:])
    assert then[-1] == 0


def test_causvids_timesteps_are_not_shifted():
    timesteps, now, then = zip(*denoising_steps(model_config("causvid"), 0))
    assert timesteps == (1000, 757, 522)
    assert np.allclose(now, [1, 0.756757, 0.521739], atol=1e-6) and then == (*now[1:], 0)


def test_two_step_models_take_four_steps_for_the_first_block():
    config = model_config("causal-forcing-frame-2step")
    assert denoising_steps(config, 0) == denoising_steps(WAN, 0)
    assert np.allclose(denoising_steps(config, 1), [(1000, 1, 5 / 6), (1000 * 5 / 6, 5 / 6, 0)])


@given(st.floats(0.01, 1.0), st.floats(0, 0.99), st.integers(0, 2**32))
def test_both_samplers_reach_x0_with_the_true_flow(now, then, seed):
    """With flow = noise - x0 a step lands on the line between x0 and noise, at any level."""
    rng = np.random.default_rng(seed)
    x0, noise, fresh = rng.standard_normal((3, 4, 4))
    x = (1 - now) * x0 + now * noise
    euler = advance(msgspec.structs.replace(WAN, sampler="euler"), x, noise - x0, None, now, then)
    np.testing.assert_allclose(euler, (1 - then) * x0 + then * noise, atol=1e-9)
    renoised = advance(WAN, x, noise - x0, fresh, now, then)
    np.testing.assert_allclose(renoised, (1 - then) * x0 + then * fresh, atol=1e-9)


def test_noise_depends_on_seed_block_and_step_alone(tiny_config):
    first = draw_noise(tiny_config, 1, 2, 3)
    draw_noise(tiny_config, 9, 9, 9)
    assert np.array_equal(first, draw_noise(tiny_config, 1, 2, 3))
    others = [draw_noise(tiny_config, *key) for key in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (1, 3, 2))]
    assert all(abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.1 for other in others)
    assert abs(first.mean()) < 0.1 and abs(first.std() - 1) < 0.1


def test_pooled_score_is_the_papers_double_sum():
    """Equation 11: raw scaled logits of all query-key pairs, summed; here as means."""
    rng = np.random.default_rng(0)
    layers, heads, d, n, keys_each = 2, 3, 8, 20, 5
    q = rng.standard_normal((layers, heads, n, d))
    k = rng.standard_normal((4, layers, heads, keys_each, d))
    double_sum = np.zeros(4)
    for m in range(4):
        for layer in range(layers):
            for head in range(heads):
                for i in range(n):
                    for j in range(keys_each):
                        double_sum[m] += q[layer, head, i] @ k[m, layer, head, j] / np.sqrt(d)
    pooled = affinity(q.mean(2), k.mean(3))
    np.testing.assert_allclose(pooled * layers * heads * n * keys_each, double_sum)


@given(
    st.lists(st.floats(-1, 1, allow_nan=False), min_size=0, max_size=30),
    st.integers(1, 10),
    st.sampled_from(["affinity", "recency", "random"]),
)
def test_selection_is_the_best_in_time_order(scores, mid, selection):
    policy = Policy(sink=1, mid=mid, recent=1, selection=selection)
    candidates = np.arange(1, 1 + len(scores))
    chosen = select(policy, candidates, np.array(scores), seed=5, block=7)
    assert len(chosen) == min(mid, len(scores))
    assert list(chosen) == sorted(set(chosen)) and set(chosen) <= set(candidates)
    if selection == "affinity" and len(chosen):
        left = [s for c, s in zip(candidates, scores) if c not in chosen]
        assert not left or max(left) <= min(scores[c - 1] for c in chosen)
    if selection == "recency":
        assert list(chosen) == list(candidates[len(candidates) - len(chosen) :])
    again = select(policy, candidates, np.array(scores), seed=5, block=7)
    assert np.array_equal(chosen, again)


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
    kept = {
        name: (policy.sink, policy.mid, policy.recent)
        for name in ("longlive", "causal-forcing-frame")
        for policy in [policies(model_config(name))["packforcing"]]
    }
    assert kept == {"longlive": (3, 16, 2), "causal-forcing-frame": (8, 16, 4)}


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


def test_prompts_become_one_hot_rows_in_any_order():
    config = model_config("demo")
    first = encode_words("A red star, over the NAVY stripes!", config)
    assert first.shape == (1, config.text_len, config.text_dim) and first.sum() == 4
    names = [VOCABULARY[i] for i in first[0].argmax(1)[:4]]
    assert names == ["red", "star", "navy", "stripes"] and not first[0, 4:].any()
    swapped = encode_words("navy stripes red star", config)
    assert {row.tobytes() for row in first[0]} == {row.tobytes() for row in swapped[0]}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a red stra over navy stripes", "'stra' .did you mean 'star'"),
        ("a red star over navy zzz", "does not know 'zzz'"),
        ("", "names nothing"),
        ("over the", "names nothing"),
        ("red " * 9, "9 words, at most 8"),
    ],
)
def test_prompts_the_model_cannot_read_are_explained(prompt, message):
    with pytest.raises(PromptError, match=message):
        encode_words(prompt, model_config("demo"))


def test_other_encoders_are_not_faked():
    with pytest.raises(PromptError, match="umt5-xxl"):
        encode_words("a red star", WAN)
