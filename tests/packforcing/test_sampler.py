"""Denoising steps, samplers and noise."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packforcing import model_config
from packforcing.errors import ConfigError
from packforcing.sampler import (
    StepOverrides,
    advance,
    denoising_steps,
    describe_steps,
    draw_noise,
)

WAN = model_config("wan-1.3b")


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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"timesteps": ()}, "empty: name one"),
        ({"timesteps": (1000, 750, 500, 250, 0)}, "1000,750,500,250,0 end in 0.*leave it out"),
        ({"timesteps": (250, 500, 750, 1000)}, "250,500,750,1000 do not decrease"),
        ({"timesteps": (1000, 1000)}, "do not decrease"),
        ({"timesteps": (1001, 500)}, "not all from 1 to 1000"),
        ({"first_timesteps": (1000, 0.5)}, "not all from 1 to 1000"),
        ({"timesteps": (1000, math.nan)}, "not all from 1 to 1000"),
        ({"timesteps": (1000, -5)}, "not all from 1 to 1000"),
        ({"shift": 0}, "shift must be above 0"),
        ({"shift": math.nan}, "shift must be above 0"),
        ({"shift": math.inf}, "shift must be above 0"),
    ],
)
def test_steps_that_cannot_be_denoised_at_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        StepOverrides(**overrides).apply(WAN)


def test_overrides_change_what_they_name_alone():
    config = model_config("causal-forcing-frame-2step")
    assert StepOverrides().apply(config) == config
    changed = StepOverrides(timesteps=(1000, 757, 522), shift=8).apply(config)
    assert (changed.timesteps, changed.shift) == ((1000, 757, 522), 8)
    assert changed.first_timesteps == config.first_timesteps
    assert changed.policy == config.policy
    shorter = StepOverrides(commit="last-step").apply(config)
    assert shorter.policy == msgspec.structs.replace(config.policy, commit="last-step")
    assert msgspec.structs.replace(shorter, policy=config.policy) == config


@given(
    st.lists(st.floats(1, 1000), min_size=1, max_size=6, unique=True),
    st.floats(0.01, 100),
)
def test_steps_are_described_exactly(timesteps, shift):
    timesteps = tuple(sorted(timesteps, reverse=True))
    text = describe_steps(StepOverrides(timesteps, shift=shift).apply(WAN))
    listed, _, rest = text.removeprefix("renoise at ").partition(", shift ")
    assert (tuple(map(float, listed.split())), float(rest)) == (timesteps, shift)
